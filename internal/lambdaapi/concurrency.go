package lambdaapi

import (
	"net/http"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// A function's reserved concurrency is its limit of executions in the whole
// cluster; without one the default holds for it alone.

type concurrencyInput struct{ ReservedConcurrentExecutions *int }

func (c *call) putConcurrency() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	var in concurrencyInput
	if err := c.decode(&in); err != nil {
		return err
	}
	var v violations
	if n := in.ReservedConcurrentExecutions; n == nil {
		v.missing("reservedConcurrentExecutions")
	} else {
		v.between("reservedConcurrentExecutions", int64(*n), 0, blixard.MaxFunctionConcurrent)
	}
	if err := v.err(); err != nil {
		return err
	}
	change := &state.ConcurrencyChange{Max: *in.ReservedConcurrentExecutions}
	if _, err := c.propose("concurrency", &state.SetFunction{Name: t.name, Concurrency: change}); err != nil {
		return c.functionError(err, t)
	}
	return c.answer(http.StatusOK, concurrency{change.Max})
}

func (c *call) getConcurrency() error {
	_, f, _, err := c.found()
	if err != nil {
		return err
	}
	if !f.Reserved {
		return c.answer(http.StatusOK, struct{}{})
	}
	return c.answer(http.StatusOK, concurrency{f.MaxConcurrent})
}

func (c *call) deleteConcurrency() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	if _, err := c.propose("concurrency", &state.SetFunction{Name: t.name, Concurrency: &state.ConcurrencyChange{Clear: true}}); err != nil {
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) listProvisioned() error {
	if _, _, _, err := c.found(); err != nil {
		return err
	}
	return listNothing("ProvisionedConcurrencyConfigs")(c)
}

func (c *call) getProvisioned() error {
	if _, _, _, err := c.found(); err != nil {
		return err
	}
	return refuse("ProvisionedConcurrencyConfigNotFoundException", "No Provisioned Concurrency Config found for this function")
}

func (c *call) deleteProvisioned() error {
	if _, _, _, err := c.found(); err != nil {
		return err
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) getAccountSettings() error {
	view, err := c.view()
	if err != nil {
		return err
	}
	var out struct {
		AccountLimit struct {
			TotalCodeSize, CodeSizeUnzipped, CodeSizeZipped      int64
			ConcurrentExecutions, UnreservedConcurrentExecutions int
		}
		AccountUsage struct {
			TotalCodeSize int64
			FunctionCount int
		}
	}
	limit := &out.AccountLimit
	// Nodes' disks bound the code, each zip is bounded by itself.
	limit.TotalCodeSize, limit.CodeSizeUnzipped, limit.CodeSizeZipped = 1<<40, 262_144_000, 52_428_800
	limit.ConcurrentExecutions, limit.UnreservedConcurrentExecutions = c.s.opt.Limits.Concurrency, c.s.opt.Limits.Concurrency
	view.Functions(func(f *blixard.Function) bool {
		out.AccountUsage.FunctionCount++
		view.FunctionVersions(f.Name, func(v *blixard.FunctionVersion) bool {
			out.AccountUsage.TotalCodeSize += v.CodeBytes
			return true
		})
		return true
	})
	return c.answer(http.StatusOK, out)
}

// listNothing answers with a list of what is never there.
func listNothing(member string) func(*call) error {
	return func(c *call) error { return c.answer(http.StatusOK, map[string][]string{member: {}}) }
}

// noMapping is true of every UUID.
func (c *call) noMapping() error {
	return refuse("ResourceNotFoundException", "The resource you requested does not exist.")
}

func (c *call) getCodeSigning() error {
	if _, _, _, err := c.found(); err != nil {
		return err
	}
	return c.answer(http.StatusOK, struct{}{})
}

func (c *call) getRecursion() error {
	if _, _, _, err := c.found(); err != nil {
		return err
	}
	return c.answer(http.StatusOK, struct{ RecursiveLoop string }{"Terminate"})
}

func (c *call) getRuntimeManagement() error {
	t, _, fv, err := c.found()
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, struct{ UpdateRuntimeOn, FunctionArn string }{"Auto", c.s.arn(t.name, blixard.VersionName(fv.Number))})
}
