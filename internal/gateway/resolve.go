package gateway

import (
	"context"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/state"
)

// target is what a call is for, in one view.
type target struct {
	view     *state.View
	function *blixard.Function
	version  *blixard.FunctionVersion
	callable bool
}

// raw tells whether the function gets HTTP requests as they are, not as events.
func (t target) raw() bool { return blixard.RuntimeKind(t.version.Spec.Runtime) == "http" }

func (t target) revision() route.Revision {
	return route.Revision{Function: t.function.Name, UID: t.function.UID, Number: t.version.Number, Seq: t.version.Seq}
}

// Resolve finds a function and the version that a qualifier stands for: "" and
// "$LATEST", a number, or an alias, of which it takes one of the versions by
// their weights. The error is an *Error of CodeNotFound with Field "function" or
// "qualifier". Of a version whose update has not succeeded it is the former one.
// It need not be callable.
func (g *Gateway) Resolve(name blixard.FunctionName, qualifier string) (*blixard.Function, *blixard.FunctionVersion, error) {
	t, err := find(g.opt.View(), name, qualifier)
	if err != nil {
		return nil, nil, err
	}
	return t.function, t.version, nil
}

// resolve is Resolve for a call, which notes what was found. A name that is not
// known may be new: then the newest state is asked for, now and then.
func (g *Gateway) resolve(ctx context.Context, inv *blixard.Invocation) (target, error) {
	t, err := find(g.opt.View(), inv.Function, inv.Qualifier)
	if err != nil && err.Status == http.StatusNotFound {
		if v := g.fresh(ctx); v != nil {
			t, err = find(v, inv.Function, inv.Qualifier)
		}
	}
	if err != nil {
		return target{}, err
	}
	inv.Number, inv.Seq = t.version.Number, t.version.Seq
	return t, nil
}

// freshWithin bounds the wait for the newest state.
const freshWithin = 500 * time.Millisecond

// fresh is the newest state, for what is not known here and may be new; nil when
// it is not to be had, or was asked for too often lately: who asks for what is not
// there may not keep the cluster busy.
func (g *Gateway) fresh(ctx context.Context) *state.View {
	if g.opt.Fresh == nil || !g.asks.take(time.Now(), 1) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, freshWithin)
	defer cancel()
	v, err := g.opt.Fresh(ctx)
	if err != nil {
		return nil // what is known here has to do
	}
	return v
}

func find(v *state.View, name blixard.FunctionName, qualifier string) (target, *Error) {
	version, err := v.Resolve(name, qualifier, rand.IntN(million))
	if err != nil {
		e := errorOf(err)
		e.Err.Field = "qualifier"
		if v.Function(name) == nil {
			e.Err.Field = "function"
		}
		return target{}, e
	}
	f := v.Function(name)
	if f.Deleting {
		return target{}, &Error{Status: http.StatusNotFound, Reason: ReasonNotFound, Err: &blixard.Error{
			Code: blixard.CodeNotFound, Field: "function", Message: "the function " + string(name) + " is being deleted",
		}}
	}
	if c := version.Callable(); c != nil {
		return target{view: v, function: f, version: c, callable: true}, nil
	}
	return target{view: v, function: f, version: version}, nil
}

// million is what the weights of aliases are parts of.
const million = 1_000_000
