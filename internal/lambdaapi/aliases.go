package lambdaapi

import (
	"math"
	"net/http"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

type routingConfig struct{ AdditionalVersionWeights map[string]float64 }

type aliasConfiguration struct {
	AliasArn, Name, FunctionVersion, Description string
	RoutingConfig                                *routingConfig `json:",omitempty"`
	RevisionId                                   string
}

func (s *Server) alias(f *blixard.Function, a *blixard.FunctionAlias) *aliasConfiguration {
	out := &aliasConfiguration{
		AliasArn: s.arn(f.Name, a.Name), Name: a.Name, FunctionVersion: blixard.VersionName(a.Number), Description: a.Description, RevisionId: a.RevisionID,
	}
	if a.SecondShare > 0 {
		out.RoutingConfig = &routingConfig{AdditionalVersionWeights: map[string]float64{blixard.VersionName(a.Second): float64(a.SecondShare) / 1e6}}
	}
	return out
}

type aliasInput struct {
	Name            string
	FunctionVersion *string
	Description     *string
	RoutingConfig   *routingConfig
	RevisionId      string
}

// aliasTarget is a function and the name of one of its aliases, which may not be
// there.
func (c *call) aliasTarget(name string) (target, error) {
	t, err := c.bareTarget()
	if err != nil {
		return t, err
	}
	var v violations
	switch {
	case name == "" || len(name) > maxQualifier:
		v.length("name", name, 1, maxQualifier)
	case !usable(name, nameLetters) || strings.Trim(name, "0123456789") == "":
		v.pattern("name", name, aliasPattern)
	}
	t.qualifier = name
	return t, v.err()
}

func (c *call) createAlias() error {
	var in aliasInput
	if err := c.decode(&in); err != nil {
		return err
	}
	t, err := c.aliasTarget(in.Name)
	if err != nil {
		return err
	}
	if in.FunctionVersion == nil {
		var v violations
		v.missing("functionVersion")
		return v.err()
	}
	return c.setAlias(http.StatusCreated, t, &in, blixard.FunctionAlias{Name: in.Name}, state.PutNew)
}

func (c *call) updateAlias() error {
	var in aliasInput
	if err := c.decode(&in); err != nil {
		return err
	}
	t, err := c.aliasTarget(c.args["a"])
	if err != nil {
		return err
	}
	f, old, err := c.findAlias(t)
	if err != nil {
		return err
	}
	if in.RevisionId == "" { // the change is made of what was read
		in.RevisionId = old.RevisionID
		same := *old
		if err := in.apply(&same); err == nil && same == *old { // perhaps since this request came before
			return c.answer(http.StatusOK, c.s.alias(f, old))
		}
	}
	return c.setAlias(http.StatusOK, t, &in, *old, state.PutReplace)
}

// setAlias changes a as in says, and stores it.
func (c *call) setAlias(status int, t target, in *aliasInput, a blixard.FunctionAlias, put state.Put) error {
	if err := in.apply(&a); err != nil {
		return err
	}
	if _, err := c.propose("alias@"+in.RevisionId, &state.SetAlias{Function: t.name, Alias: a, Put: put, Revision: in.RevisionId}); err != nil {
		return c.aliasError(err, t, &a)
	}
	f, made, err := c.findAlias(t)
	if err != nil {
		return err
	}
	return c.answer(status, c.s.alias(f, made))
}

func (in *aliasInput) apply(a *blixard.FunctionAlias) error {
	var v violations
	if in.Description != nil {
		if a.Description = *in.Description; len(a.Description) > 256 {
			v.length("description", a.Description, 0, 256)
		}
	}
	number := func(field, text string) int {
		n, ok := blixard.ParseVersion(text)
		if !ok || text == "" {
			v.pattern(field, text, versionPattern)
		}
		return n
	}
	if in.FunctionVersion != nil {
		a.Number = number("functionVersion", *in.FunctionVersion)
	}
	if in.RoutingConfig != nil {
		weights := in.RoutingConfig.AdditionalVersionWeights
		if len(weights) > 1 {
			return invalidParameter("Number of items in AdditionalVersionWeights cannot be greater than 1")
		}
		a.Second, a.SecondShare = 0, 0
		for version, weight := range weights {
			if weight < 0 || weight > 1 || math.IsNaN(weight) {
				v.add("routingConfig.additionalVersionWeights", "'{"+version+"=…}'", "Map value must satisfy constraint: [Member must have value less than or equal to 1.0, Member must have value greater than or equal to 0.0]")
				continue
			}
			a.Second, a.SecondShare = number("routingConfig.additionalVersionWeights", version), int(math.Round(weight*1e6))
		}
	}
	if err := v.err(); err != nil {
		return err
	}
	if a.SecondShare > 0 && a.Number == 0 {
		return invalidParameter("$LATEST is not supported for an alias pointing to more than 1 version")
	}
	if a.SecondShare > 0 && a.Number == a.Second {
		return invalidParameter("Invalid function version %s. Function version %s is already included in routing configuration.", blixard.VersionName(a.Second), blixard.VersionName(a.Number))
	}
	return nil
}

func (c *call) aliasError(err error, t target, a *blixard.FunctionAlias) error {
	switch {
	case blixard.CodeOf(err) == blixard.CodeExists:
		return refuse("ResourceConflictException", "Alias already exists: %s", c.s.arn(t.name, t.qualifier))
	case blixard.CodeOf(err) == blixard.CodeNotFound && fieldOf(err) == "version":
		return c.s.notFound(target{name: t.name, qualifier: blixard.VersionName(a.Number)})
	case blixard.CodeOf(err) == blixard.CodeNotFound && fieldOf(err) == "":
		return c.s.notFound(target{name: t.name})
	}
	return c.functionError(err, t)
}

// findAlias reads an alias anew.
func (c *call) findAlias(t target) (*blixard.Function, *blixard.FunctionAlias, error) {
	view, err := c.view()
	if err != nil {
		return nil, nil, err
	}
	f, _, err := c.s.find(view, target{name: t.name})
	if err != nil {
		return nil, nil, err
	}
	a := f.Alias(t.qualifier)
	if a == nil {
		return nil, nil, refuse("ResourceNotFoundException", "Cannot find alias arn: %s", c.s.arn(t.name, t.qualifier))
	}
	return f, a, nil
}

func (c *call) getAlias() error {
	t, err := c.aliasTarget(c.args["a"])
	if err != nil {
		return err
	}
	f, a, err := c.findAlias(t)
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, c.s.alias(f, a))
}

// deleteAlias is done when there is no such alias, too.
func (c *call) deleteAlias() error {
	t, err := c.aliasTarget(c.args["a"])
	if err != nil {
		return err
	}
	_, err = c.propose("unalias", &state.DeleteAlias{Function: t.name, Name: t.qualifier})
	if err != nil && (blixard.CodeOf(err) != blixard.CodeNotFound || fieldOf(err) != "alias") {
		return c.functionError(err, target{name: t.name})
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) listAliases() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	page, err := c.page(10_000)
	if err != nil {
		return err
	}
	version := c.query.Get("FunctionVersion")
	view, err := c.view()
	if err != nil {
		return err
	}
	f, _, err := c.s.find(view, target{name: t.name})
	if err != nil {
		return err
	}
	var out struct {
		Aliases    []*aliasConfiguration
		NextMarker string `json:",omitempty"`
	}
	out.Aliases = []*aliasConfiguration{}
	for i := range f.Aliases {
		a := &f.Aliases[i]
		if version != "" && blixard.VersionName(a.Number) != version && (a.SecondShare == 0 || blixard.VersionName(a.Second) != version) {
			continue
		}
		if !page.add(a.Name, func() { out.Aliases = append(out.Aliases, c.s.alias(f, a)) }) {
			break
		}
	}
	out.NextMarker = page.next()
	return c.answer(http.StatusOK, out)
}
