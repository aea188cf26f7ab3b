package api

import (
	"strconv"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/internal/state"
)

// FunctionSpecOf reads the spec of a function and completes it with defaults.
// The error's field is as the API calls it, below "spec".
func FunctionSpecOf(m *blixardv1.FunctionSpec) (blixard.FunctionSpec, error) {
	sc, pl := m.GetScaling(), m.GetPlacement()
	s := blixard.FunctionSpec{
		Description: m.GetDescription(), Runtime: m.GetRuntime(), Handler: m.GetHandler(), Command: m.GetCommand(), Port: int(m.GetPort()),
		MemoryMiB: m.GetMemoryMib(), VCPUs: int(m.GetVcpus()), TimeoutMS: m.GetTimeoutMs(), InitMS: m.GetInitTimeoutMs(), Env: labelsOf(m.GetEnv()),
		EphemeralMiB: m.GetEphemeralMib(), Network: m.GetNetwork(), Snapshot: m.GetSnapshot(),
		TargetConcurrency: int(sc.GetTargetConcurrency()), MinInstances: int(sc.GetMinInstances()), MaxInstances: int(sc.GetMaxInstances()),
		ScaleDownDelayMS: sc.GetScaleDownDelayMs(), Burst: int(sc.GetBurst()), RecycleCalls: int(sc.GetRecycleCalls()),
		Placement: blixard.FunctionPlacement{Strategies: pl.GetStrategies(), DataHints: pl.GetDataHints()},
	}
	if sc != nil && sc.ScaleDownDelayMs != nil && *sc.ScaleDownDelayMs == 0 {
		s.ScaleDownDelayMS = 1 // 0 stands for the default below; the shortest delay is as good as none
	}
	for i, text := range pl.GetConstraints() {
		more, err := blixard.ParseConstraints(text)
		if err == nil && len(more) == 0 {
			err = blixard.Invalid("constraint", `write key=value, such as "gpu=available"`, "the constraint is empty")
		}
		if err != nil {
			return s, inField(err, "spec.placement.constraints["+strconv.Itoa(i)+"]")
		}
		s.Placement.Constraints = append(s.Placement.Constraints, more...)
	}
	for i, p := range pl.GetPreferences() {
		one, err := blixard.ParseConstraints(p.GetConstraint())
		if err == nil && len(one) == 0 {
			err = blixard.Invalid("preferences", `write key=value, such as "gpu=available"`, "the constraint is empty")
		}
		if err != nil {
			return s, inField(err, "spec.placement.preferences["+strconv.Itoa(i)+"].constraint")
		}
		for _, c := range one {
			s.Placement.Preferences = append(s.Placement.Preferences, blixard.Preference{Constraint: c, Weight: int(p.GetWeight())})
		}
	}
	s.Defaults()
	if err := s.CheckNew(); err != nil {
		return s, inSpec(err)
	}
	return s, nil
}

func functionSpecMessage(s *blixard.FunctionSpec) *blixardv1.FunctionSpec {
	m := &blixardv1.FunctionSpec{
		Description: s.Description, Runtime: s.Runtime, Handler: s.Handler, Command: s.Command, Port: int32(s.Port), MemoryMib: s.MemoryMiB, Vcpus: int32(s.VCPUs),
		TimeoutMs: s.TimeoutMS, InitTimeoutMs: s.InitMS, Env: labelMap(s.Env), EphemeralMib: s.EphemeralMiB, Network: s.Network, Snapshot: s.Snapshot,
		Scaling: &blixardv1.FunctionScaling{
			MinInstances: int32(s.MinInstances), MaxInstances: int32(s.MaxInstances), TargetConcurrency: int32(s.TargetConcurrency),
			ScaleDownDelayMs: new(s.ScaleDownDelayMS), Burst: int32(s.Burst), RecycleCalls: int32(s.RecycleCalls),
		},
		Placement: &blixardv1.FunctionPlacement{Strategies: s.Placement.Strategies, DataHints: s.Placement.DataHints},
	}
	for _, c := range s.Placement.Constraints {
		m.Placement.Constraints = append(m.Placement.Constraints, c.String())
	}
	for _, p := range s.Placement.Preferences {
		m.Placement.Preferences = append(m.Placement.Preferences, &blixardv1.Preference{Constraint: p.Constraint.String(), Weight: int32(p.Weight)})
	}
	return m
}

func functionVersionMessage(v *blixard.FunctionVersion) *blixardv1.FunctionVersion {
	return &blixardv1.FunctionVersion{
		Version: blixard.VersionName(v.Number), Spec: functionSpecMessage(&v.Spec), CodeDigest: v.CodeDigest, CodeBytes: v.CodeBytes,
		State: string(v.State), StateReason: v.StateReason, StateCode: v.StateCode, RevisionId: v.RevisionID, ModifiedMs: v.ModifiedMS,
		PreviousAnswers: v.State != blixard.FunctionActive && v.Previous != nil,
	}
}

func functionMessage(view *state.View, f *blixard.Function, host func(*blixard.FunctionURL) string) *blixardv1.Function {
	m := &blixardv1.Function{
		Name: string(f.Name), Deleting: f.Deleting, Version: f.Version, CreatedMs: f.CreatedMS, UpdatedMs: f.UpdatedMS,
		Settings: &blixardv1.FunctionSettings{MaxConcurrent: new(int32(f.MaxConcurrent)), RateLimit: new(int32(f.RateLimit)), CallerLimit: new(int32(f.CallerLimit))},
		Aliases:  aliasMessages(f),
	}
	if v := view.FunctionVersion(f.Name, 0); v != nil {
		m.Latest = functionVersionMessage(v)
	}
	for _, a := range f.Async {
		m.Settings.Async = append(m.Settings.Async, &blixardv1.FunctionAsync{Qualifier: a.Qualifier, MaxRetries: new(int32(a.MaxRetries)), MaxAgeMs: a.MaxAgeMS, OnSuccess: a.OnSuccess, OnFailure: a.OnFailure})
	}
	for _, t := range f.Triggers {
		m.Triggers = append(m.Triggers, &blixardv1.FunctionTrigger{Id: t.ID, Kind: t.Kind, Qualifier: t.Qualifier, Path: t.Path, Methods: t.Methods, Host: t.Host})
	}
	for i := range f.URLs {
		m.Urls = append(m.Urls, urlMessage(&f.URLs[i], host))
	}
	return m
}

func urlMessage(u *blixard.FunctionURL, host func(*blixard.FunctionURL) string) *blixardv1.FunctionURL {
	return &blixardv1.FunctionURL{Qualifier: u.Qualifier, Auth: u.Auth, InvokeMode: u.InvokeMode, Host: host(u)}
}

func aliasMessages(f *blixard.Function) []*blixardv1.FunctionAlias {
	var out []*blixardv1.FunctionAlias
	for _, a := range f.Aliases {
		m := &blixardv1.FunctionAlias{Name: a.Name, Description: a.Description, Version: blixard.VersionName(a.Number)}
		if a.SecondShare > 0 {
			m.SecondVersion, m.SecondWeight = blixard.VersionName(a.Second), float64(a.SecondShare)/1e6
		}
		out = append(out, m)
	}
	return out
}

// numberOf reads a version's number.
func numberOf(field, version string) (int, error) {
	n, ok := blixard.ParseVersion(version)
	if !ok || version == "" {
		return 0, blixard.Invalid(field, "write a number, or $LATEST", "%.80q is no version", version)
	}
	return n, nil
}

// Report is an invocation's report as a message.
func Report(r *blixard.InvocationReport) *blixardv1.FunctionReport {
	m := &blixardv1.FunctionReport{
		RequestId: r.RequestID, Node: string(r.Node), Instance: r.Instance, Version: blixard.VersionName(r.Number), Start: string(r.Start),
		MemoryMib: r.MemoryMiB, UsedMib: r.UsedMiB, Log: r.Log, Parts: Parts(&r.Parts),
	}
	if r.Error != nil {
		m.ErrorKind, m.ErrorType = r.Error.Kind, r.Error.Type
	}
	return m
}

// Parts is a breakdown as a message.
func Parts(p *blixard.Breakdown) *blixardv1.FunctionBreakdown {
	return &blixardv1.FunctionBreakdown{
		QueueMs: millis(p.Queue), PlaceMs: millis(p.Place), CommitMs: millis(p.Commit), SpawnMs: millis(p.Spawn), RestoreMs: millis(p.Restore), BootMs: millis(p.Boot),
		InitMs: millis(p.Init), HandlerMs: millis(p.Handler), TransferMs: millis(p.Transfer), TotalMs: millis(p.Total),
	}
}
