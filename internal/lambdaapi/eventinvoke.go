package lambdaapi

import (
	"net/http"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

type destination struct {
	Destination string `json:",omitempty"`
}

type destinationConfig struct{ OnSuccess, OnFailure *destination }

type eventInvokeInput struct {
	MaximumRetryAttempts     *int
	MaximumEventAgeInSeconds *int64
	DestinationConfig        *destinationConfig
}

type eventInvokeConfig struct {
	LastModified             float64 // seconds since 1970
	FunctionArn              string
	MaximumRetryAttempts     int
	MaximumEventAgeInSeconds int64 `json:",omitempty"`
	DestinationConfig        struct{ OnSuccess, OnFailure destination }
}

func (s *Server) eventInvokeConfig(f *blixard.Function, a *blixard.AsyncConfig) *eventInvokeConfig {
	out := &eventInvokeConfig{LastModified: float64(a.ModifiedMS) / 1000, FunctionArn: s.arn(f.Name, a.Qualifier), MaximumRetryAttempts: a.MaxRetries}
	if a.MaxAgeMS != blixard.DefaultMaxEventAgeMS {
		out.MaximumEventAgeInSeconds = a.MaxAgeMS / 1000
	}
	out.DestinationConfig.OnSuccess.Destination = a.OnSuccess
	if a.OnFailure != blixard.OnFailureDeadLetters {
		out.DestinationConfig.OnFailure.Destination = a.OnFailure
	}
	return out
}

// asyncOf is the configuration of a qualifier itself, nil if it has none.
func asyncOf(f *blixard.Function, qualifier string) *blixard.AsyncConfig {
	for i := range f.Async {
		if f.Async[i].Qualifier == named(qualifier) {
			return &f.Async[i]
		}
	}
	return nil
}

func (c *call) noEventInvokeConfig(t target) error {
	return refuse("ResourceNotFoundException", "The function %s doesn't have an EventInvokeConfig", c.s.arn(t.name, named(t.qualifier)))
}

func (c *call) putEventInvokeConfig() error {
	return c.setEventInvokeConfig(func(t target, _ *blixard.Function) (blixard.AsyncConfig, uint64, error) {
		return blixard.AsyncConfig{Qualifier: named(t.qualifier), MaxRetries: blixard.DefaultMaxRetries, MaxAgeMS: blixard.DefaultMaxEventAgeMS}, 0, nil
	})
}

func (c *call) updateEventInvokeConfig() error {
	return c.setEventInvokeConfig(func(t target, f *blixard.Function) (blixard.AsyncConfig, uint64, error) {
		if a := asyncOf(f, t.qualifier); a != nil {
			return *a, f.Version, nil
		}
		return blixard.AsyncConfig{}, 0, c.noEventInvokeConfig(t)
	})
}

// setEventInvokeConfig changes what from returns, with the version of the
// function that it was read at, as the request says.
func (c *call) setEventInvokeConfig(from func(target, *blixard.Function) (blixard.AsyncConfig, uint64, error)) error {
	var in eventInvokeInput
	if err := c.decode(&in); err != nil {
		return err
	}
	var v violations
	if n := in.MaximumRetryAttempts; n != nil {
		v.between("maximumRetryAttempts", int64(*n), 0, 2)
	}
	if n := in.MaximumEventAgeInSeconds; n != nil {
		v.between("maximumEventAgeInSeconds", *n, 60, 21_600)
	}
	if err := v.err(); err != nil {
		return err
	}
	if in.MaximumRetryAttempts == nil && in.MaximumEventAgeInSeconds == nil && in.DestinationConfig == nil {
		return invalidParameter("You must specify at least one of error handling or destination setting.")
	}
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	a, expect, err := from(t, f)
	if err != nil {
		return err
	}
	if in.MaximumRetryAttempts != nil {
		a.MaxRetries = *in.MaximumRetryAttempts
	}
	if in.MaximumEventAgeInSeconds != nil {
		a.MaxAgeMS = *in.MaximumEventAgeInSeconds * 1000
	}
	if d := in.DestinationConfig; d != nil {
		if err := c.setDestination(&a.OnSuccess, d.OnSuccess, t); err != nil {
			return err
		}
		if err := c.setDestination(&a.OnFailure, d.OnFailure, t); err != nil {
			return err
		}
	}
	if _, err := c.propose(partAt("async", expect), &state.SetFunction{Name: t.name, ExpectVersion: expect, Async: &a}); err != nil {
		return c.functionError(err, t)
	}
	a.ModifiedMS = c.now.UnixMilli()
	return c.answer(http.StatusOK, c.s.eventInvokeConfig(f, &a))
}

// setDestination takes a function as a destination; an empty one takes it away.
func (c *call) setDestination(to *string, d *destination, self target) error {
	if d == nil {
		return nil
	}
	if d.Destination == "" {
		*to = ""
		return nil
	}
	t, err := c.s.parseFunction(d.Destination, "")
	if err != nil {
		return invalidParameter("The provided destination %.200s is invalid: Blixard's destinations are functions of this cluster", d.Destination)
	}
	if t.name == self.name {
		return invalidParameter("You can't specify the function as a destination for itself.")
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	if _, _, err := c.s.find(view, t); err != nil {
		return invalidParameter("The destination %.200s does not exist", d.Destination)
	}
	*to = c.s.arn(t.name, t.qualifier)
	return nil
}

func (c *call) getEventInvokeConfig() error {
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	a := asyncOf(f, t.qualifier)
	if a == nil {
		return c.noEventInvokeConfig(t)
	}
	return c.answer(http.StatusOK, c.s.eventInvokeConfig(f, a))
}

func (c *call) deleteEventInvokeConfig() error {
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	if asyncOf(f, t.qualifier) == nil {
		return c.noEventInvokeConfig(t)
	}
	if _, err := c.propose("unasync", &state.SetFunction{Name: t.name, DropAsync: named(t.qualifier)}); err != nil {
		if fieldOf(err) == "async" {
			return c.noEventInvokeConfig(t)
		}
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) listEventInvokeConfigs() error {
	page, err := c.page(50)
	if err != nil {
		return err
	}
	_, f, _, err := c.found()
	if err != nil {
		return err
	}
	var out struct {
		FunctionEventInvokeConfigs []*eventInvokeConfig
		NextMarker                 string `json:",omitempty"`
	}
	out.FunctionEventInvokeConfigs = []*eventInvokeConfig{}
	for i := range f.Async {
		a := &f.Async[i]
		if !page.add(a.Qualifier, func() {
			out.FunctionEventInvokeConfigs = append(out.FunctionEventInvokeConfigs, c.s.eventInvokeConfig(f, a))
		}) {
			break
		}
	}
	out.NextMarker = page.next()
	return c.answer(http.StatusOK, out)
}
