package state

import (
	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// The encodings of rows about functions. Fields are only ever appended; what
// stands in lists is a record, so that it can grow too.

func codeFunctionSpec(c *wire.Coder, s *blixard.FunctionSpec) {
	c.Record(func(c *wire.Coder) {
		wire.String(c, &s.Description)
		wire.String(c, &s.Runtime)
		wire.String(c, &s.Handler)
		wire.String(c, &s.Architecture)
		wire.Strings(c, &s.Command)
		wire.Int(c, &s.Port)
		wire.Int(c, &s.MemoryMiB)
		wire.Int(c, &s.VCPUs)
		wire.Int(c, &s.TimeoutMS)
		wire.Int(c, &s.InitMS)
		wire.List(c, &s.Env, codeLabel)
		wire.Int(c, &s.EphemeralMiB)
		wire.String(c, &s.Network)
		wire.Int(c, &s.TargetConcurrency)
		wire.Int(c, &s.MinInstances)
		wire.Int(c, &s.MaxInstances)
		wire.Int(c, &s.ScaleDownDelayMS)
		wire.Int(c, &s.Burst)
		wire.Int(c, &s.RecycleCalls)
		wire.String(c, &s.Snapshot)
		wire.Strings(c, &s.Placement.Strategies)
		wire.List(c, &s.Placement.Constraints, codeConstraint)
		wire.List(c, &s.Placement.Preferences, func(c *wire.Coder, p *blixard.Preference) {
			codeConstraint(c, &p.Constraint)
			wire.Int(c, &p.Weight)
		})
		wire.Strings(c, &s.Placement.DataHints)
		wire.String(c, &s.Role)
	})
}

// inRecord codes each element of a list as a record.
func inRecord[T any](code func(*wire.Coder, *T)) func(*wire.Coder, *T) {
	return func(c *wire.Coder, v *T) { c.Record(func(c *wire.Coder) { code(c, v) }) }
}

func codeFunction(c *wire.Coder, f *blixard.Function) {
	wire.String(c, &f.Name)
	wire.Uint(c, &f.UID)
	wire.Int(c, &f.MaxConcurrent)
	wire.Bool(c, &f.Reserved)
	wire.List(c, &f.Aliases, inRecord(codeAlias))
	wire.List(c, &f.Async, inRecord(codeAsyncConfig))
	wire.List(c, &f.URLs, inRecord(codeURL))
	wire.List(c, &f.Triggers, inRecord(codeTrigger))
	wire.List(c, &f.Policy, inRecord(codePolicy))
	wire.List(c, &f.Tags, codeLabel)
	wire.Int(c, &f.RateLimit)
	wire.Int(c, &f.CallerLimit)
	wire.Int(c, &f.NextNumber)
	wire.Bool(c, &f.Deleting)
	wire.Uint(c, &f.Version)
	wire.Int(c, &f.CreatedMS)
	wire.Int(c, &f.UpdatedMS)
}

func codeAlias(c *wire.Coder, a *blixard.FunctionAlias) {
	wire.String(c, &a.Name)
	wire.String(c, &a.Description)
	wire.Int(c, &a.Number)
	wire.Int(c, &a.Second)
	wire.Int(c, &a.SecondShare)
	wire.String(c, &a.RevisionID)
	wire.Uint(c, &a.Version)
}

func codeAsyncConfig(c *wire.Coder, a *blixard.AsyncConfig) {
	wire.String(c, &a.Qualifier)
	wire.Int(c, &a.MaxRetries)
	wire.Int(c, &a.MaxAgeMS)
	wire.String(c, &a.OnSuccess)
	wire.String(c, &a.OnFailure)
	wire.Int(c, &a.ModifiedMS)
}

func codeURL(c *wire.Coder, u *blixard.FunctionURL) {
	wire.String(c, &u.Qualifier)
	wire.String(c, &u.ID)
	wire.String(c, &u.Auth)
	wire.String(c, &u.InvokeMode)
	wire.Optional(c, &u.CORS, func(c *wire.Coder, x *blixard.CORS) {
		wire.Bool(c, &x.AllowCredentials)
		wire.Strings(c, &x.AllowHeaders)
		wire.Strings(c, &x.AllowMethods)
		wire.Strings(c, &x.AllowOrigins)
		wire.Strings(c, &x.ExposeHeaders)
		wire.Int(c, &x.MaxAgeSeconds)
	})
	wire.Int(c, &u.CreatedMS)
	wire.Int(c, &u.ModifiedMS)
}

func codeTrigger(c *wire.Coder, t *blixard.Trigger) {
	wire.String(c, &t.ID)
	wire.String(c, &t.Kind)
	wire.String(c, &t.Qualifier)
	wire.String(c, &t.Path)
	wire.Strings(c, &t.Methods)
	wire.String(c, &t.Host)
	wire.Int(c, &t.CreatedMS)
}

func codePolicy(c *wire.Coder, p *blixard.PolicyStatement) {
	wire.String(c, &p.ID)
	wire.String(c, &p.Qualifier)
	wire.String(c, &p.JSON)
}

// codeFunctionVersion codes a version. A former one is never more than one deep.
func codeFunctionVersion(c *wire.Coder, v *blixard.FunctionVersion) { codeVersionDeep(c, v, 1) }

func codeVersionDeep(c *wire.Coder, v *blixard.FunctionVersion, deep int) {
	wire.String(c, &v.Function)
	wire.Int(c, &v.Number)
	codeFunctionSpec(c, &v.Spec)
	wire.String(c, &v.CodeDigest)
	wire.Int(c, &v.CodeBytes)
	wire.Uint(c, &v.Seq)
	wire.String(c, &v.RevisionID)
	wire.Int(c, &v.ModifiedMS)
	wire.String(c, &v.Builder)
	wire.Uint(c, &v.BuilderEpoch)
	wire.String(c, &v.State)
	wire.String(c, &v.StateReason)
	wire.String(c, &v.StateCode)
	if deep > 0 {
		wire.Optional(c, &v.Previous, func(c *wire.Coder, p *blixard.FunctionVersion) { codeVersionDeep(c, p, deep-1) })
	}
}

func codeSlots(c *wire.Coder, s *blixard.FunctionSlots) {
	wire.String(c, &s.Function)
	wire.String(c, &s.Node)
	wire.Uint(c, &s.NodeEpoch)
	wire.Int(c, &s.Count)
	wire.Int(c, &s.Short)
	wire.Int(c, &s.ShortMS)
}

func codeAsyncEvent(c *wire.Coder, e *blixard.AsyncEvent) {
	wire.String(c, &e.ID)
	wire.String(c, &e.Function)
	wire.String(c, &e.Qualifier)
	c.Blob(&e.Payload)
	wire.String(c, &e.Context)
	wire.String(c, &e.Owner)
	wire.Uint(c, &e.OwnerEpoch)
	wire.Int(c, &e.Attempts)
	wire.Int(c, &e.Tries)
	wire.Int(c, &e.NotBeforeMS)
	wire.Int(c, &e.AcceptedMS)
	wire.Int(c, &e.MaxRetries)
	wire.Int(c, &e.MaxAgeMS)
	wire.Int(c, &e.Hops)
	wire.String(c, &e.LastError)
	wire.Bool(c, &e.Dead)
	wire.String(c, &e.Condition)
	wire.Int(c, &e.DeadMS)
}

func codeAccessKey(c *wire.Coder, k *blixard.AccessKey) {
	wire.String(c, &k.ID)
	wire.String(c, &k.Name)
	wire.String(c, &k.Role)
	wire.Int(c, &k.CreatedMS)
	wire.Int(c, &k.ExpiresMS)
	wire.Int(c, &k.RevokedMS)
}

// functionRows emits the rows about functions, in order.
func (t *functionTables) functionRows(row func(kind uint8, code func(*wire.Coder))) {
	t.functions.Scan(func(_ blixard.FunctionName, f *blixard.Function) bool {
		row(rowFunction, func(c *wire.Coder) { codeFunction(c, f) })
		return true
	})
	t.versions.Scan(func(_ string, v *blixard.FunctionVersion) bool {
		row(rowFunctionVersion, func(c *wire.Coder) { codeFunctionVersion(c, v) })
		return true
	})
	t.slots.Scan(func(_ string, s *blixard.FunctionSlots) bool {
		row(rowSlots, func(c *wire.Coder) { codeSlots(c, s) })
		return true
	})
	t.asyncs.Scan(func(_ string, e *blixard.AsyncEvent) bool {
		row(rowAsyncEvent, func(c *wire.Coder) { codeAsyncEvent(c, e) })
		return true
	})
	t.accessKeys.Scan(func(_ string, k *blixard.AccessKey) bool {
		row(rowAccessKey, func(c *wire.Coder) { codeAccessKey(c, k) })
		return true
	})
}

// restoreFunctionRow takes a row of a snapshot in. When functions changed last
// is not kept: the snapshot's index is as good.
func (t *functionTables) restoreFunctionRow(kind uint8, c *wire.Coder, index uint64) {
	switch kind {
	case rowFunction:
		f := new(blixard.Function)
		codeFunction(c, f)
		t.putFunction(f, index)
	case rowFunctionVersion:
		v := new(blixard.FunctionVersion)
		codeFunctionVersion(c, v)
		t.putVersion(v)
	case rowSlots:
		s := new(blixard.FunctionSlots)
		codeSlots(c, s)
		t.putSlots(s)
	case rowAsyncEvent:
		e := new(blixard.AsyncEvent)
		codeAsyncEvent(c, e)
		t.putAsync(e)
	case rowAccessKey:
		k := new(blixard.AccessKey)
		codeAccessKey(c, k)
		t.accessKeys.Set(k.ID, k)
	}
}
