package cli

import (
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// functionFlags are the flags of `function create` and `function update` that
// say what the function is.
type functionFlags struct {
	config      string
	spec        *blixardv1.FunctionSpec
	memory      string
	ephemeral   string
	timeout     time.Duration
	initTimeout time.Duration
	constraints []string
	preferences []string
	env         []string
	scaleDown   time.Duration

	maxConcurrent, rateLimit, callerLimit int32
}

func (s *functionFlags) add(cmd *cobra.Command) {
	s.spec = &blixardv1.FunctionSpec{Scaling: &blixardv1.FunctionScaling{}, Placement: &blixardv1.FunctionPlacement{}}
	sc, pl := s.spec.Scaling, s.spec.Placement
	f := cmd.Flags()
	f.StringVar(&s.config, "config", "", "the code: a .nix file, a .wasm module, an executable, a directory or a .zip")
	f.StringVar(&s.config, "code", "", "the same as --config")
	f.StringVar(&s.spec.Runtime, "runtime", "", "nix, bootstrap, http or wasm; told from the code if empty")
	f.StringVar(&s.spec.Handler, "handler", "", "what in the code answers: a file for nix and wasm, _HANDLER for bootstrap")
	f.StringVar(&s.spec.Description, "description", "", "what it does, in words")
	f.StringVar(&s.memory, "memory", "128M", "memory of an instance")
	f.Int32Var(&s.spec.Vcpus, "vcpus", 1, "virtual CPUs of an instance")
	f.DurationVar(&s.timeout, "timeout", 30*time.Second, "how long one call may take, at most 15m")
	f.DurationVar(&s.initTimeout, "init-timeout", 10*time.Second, "how long the code may take to start")
	f.StringVar(&s.ephemeral, "ephemeral-storage", "512M", "size of /tmp")
	f.StringArrayVarP(&s.env, "env", "e", nil, "environment of the code, KEY=VALUE")
	f.StringVar(&s.spec.Network, "network", "", "user (default) or none")
	f.Int32Var(&s.spec.Port, "port", 8080, "http: where the server listens in the guest")
	f.Int32Var(&s.maxConcurrent, "concurrent-executions", 1000, "calls that run at once in the whole cluster; 0: none may run")
	f.Int32Var(&s.maxConcurrent, "max-concurrent", 1000, "the same as --concurrent-executions")
	f.Int32Var(&s.rateLimit, "rate-limit", 0, "calls per second in the whole cluster; 0: no limit")
	f.Int32Var(&s.callerLimit, "caller-rate-limit", 0, "calls per second of one caller; 0: no limit")
	f.Int32Var(&sc.MinInstances, "min-instances", 0, "instances that are kept warm in the whole cluster")
	f.Int32Var(&sc.MaxInstances, "max-instances", 0, "instances at most; 0: as many as --concurrent-executions needs")
	f.Int32Var(&sc.TargetConcurrency, "target-concurrency", 1, "calls at once in one instance")
	f.DurationVar(&s.scaleDown, "scale-down-delay", 5*time.Minute, "how long an idle instance is kept")
	f.Int32Var(&sc.Burst, "burst", 0, "instances that may be starting at once; 0: no limit")
	f.Int32Var(&sc.RecycleCalls, "recycle-calls", 10_000, "an instance ends after so many calls")
	f.StringVar(&s.spec.Snapshot, "snapshot", "", "on (default): instances are clones of a booted template; off: each boots")
	f.StringSliceVar(&pl.Strategies, "placement-strategy", nil, "best-fit, data-locality, network-proximity, load-balanced; several are combined")
	f.StringArrayVar(&s.constraints, "constraint", nil, `what must hold on the node, such as "gpu.memory>=8GB"`)
	f.StringArrayVar(&s.preferences, "prefer", nil, `what is better to hold on the node, such as gpu=available or gpu=available:80`)
	f.StringArrayVar(&pl.DataHints, "data-hint", nil, `where its data is: "ceph-pool:raw-data", "node:node2", "zone:a"`)
	registerValues(cmd, "runtime", "nix", "bootstrap", "http", "wasm")
	registerValues(cmd, "network", "user", "none")
	registerValues(cmd, "snapshot", "on", "off")
	registerValues(cmd, "placement-strategy", "best-fit", "data-locality", "network-proximity", "load-balanced")
}

// merge puts what was given on the command line over base.
func (s *functionFlags) merge(flags *pflag.FlagSet, base *blixardv1.FunctionSpec, command []string) (*blixardv1.FunctionSpec, error) {
	spec := base
	if spec.Scaling == nil {
		spec.Scaling = &blixardv1.FunctionScaling{}
	}
	if spec.Placement == nil {
		spec.Placement = &blixardv1.FunctionPlacement{}
	}
	given := flags.Changed
	for flag, set := range map[string]func(){
		"runtime":            func() { spec.Runtime = s.spec.Runtime },
		"handler":            func() { spec.Handler = s.spec.Handler },
		"description":        func() { spec.Description = s.spec.Description },
		"vcpus":              func() { spec.Vcpus = s.spec.Vcpus },
		"network":            func() { spec.Network = s.spec.Network },
		"port":               func() { spec.Port = s.spec.Port },
		"snapshot":           func() { spec.Snapshot = s.spec.Snapshot },
		"timeout":            func() { spec.TimeoutMs = s.timeout.Milliseconds() },
		"init-timeout":       func() { spec.InitTimeoutMs = s.initTimeout.Milliseconds() },
		"min-instances":      func() { spec.Scaling.MinInstances = s.spec.Scaling.MinInstances },
		"max-instances":      func() { spec.Scaling.MaxInstances = s.spec.Scaling.MaxInstances },
		"target-concurrency": func() { spec.Scaling.TargetConcurrency = s.spec.Scaling.TargetConcurrency },
		"burst":              func() { spec.Scaling.Burst = s.spec.Scaling.Burst },
		"recycle-calls":      func() { spec.Scaling.RecycleCalls = s.spec.Scaling.RecycleCalls },
		"scale-down-delay":   func() { spec.Scaling.ScaleDownDelayMs = new(s.scaleDown.Milliseconds()) },
		"placement-strategy": func() { spec.Placement.Strategies = s.spec.Placement.Strategies },
		"data-hint":          func() { spec.Placement.DataHints = s.spec.Placement.DataHints },
	} {
		if given(flag) {
			set()
		}
	}
	if len(command) > 0 {
		spec.Command = command
	}
	return spec, s.mergeParsed(spec, given)
}

func (s *functionFlags) mergeParsed(spec *blixardv1.FunctionSpec, given func(string) bool) error {
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{{"timeout", s.timeout}, {"init-timeout", s.initTimeout}} {
		if given(d.flag) && d.value < time.Millisecond {
			return blixard.Invalid("--"+d.flag, "give at least 1ms", "--%s is %s", d.flag, d.value)
		}
	}
	if given("scale-down-delay") && s.scaleDown < 0 {
		return blixard.Invalid("--scale-down-delay", "give a duration such as 5m; 0 ends instances at once", "--scale-down-delay is %s", s.scaleDown)
	}
	for _, n := range []struct {
		flag  string
		value int32
	}{{"vcpus", s.spec.Vcpus}, {"target-concurrency", s.spec.Scaling.TargetConcurrency}, {"recycle-calls", s.spec.Scaling.RecycleCalls}, {"port", s.spec.Port}} {
		if given(n.flag) && n.value < 1 { // 0 stands for the default in requests
			return blixard.Invalid("--"+n.flag, "give a number of at least 1", "--%s is %d", n.flag, n.value)
		}
	}
	var err error
	if given("memory") {
		if spec.MemoryMib, err = blixard.ParseMemoryMiB(s.memory); err != nil {
			return inFlag("--memory", err)
		}
		if spec.MemoryMib == 0 {
			return blixard.Invalid("--memory", "give at least 64M", "--memory is %s", s.memory)
		}
	}
	if given("ephemeral-storage") {
		if spec.EphemeralMib, err = blixard.ParseMemoryMiB(s.ephemeral); err != nil {
			return inFlag("--ephemeral-storage", err)
		}
	}
	if given("constraint") {
		spec.Placement.Constraints = nil
		for _, text := range s.constraints {
			more, err := parseConstraints(text)
			if err != nil {
				return inFlag("--constraint", err)
			}
			for _, c := range more {
				spec.Placement.Constraints = append(spec.Placement.Constraints, c.String())
			}
		}
	}
	if given("prefer") {
		spec.Placement.Preferences = nil
		for _, text := range s.preferences {
			more, err := parsePreference(text)
			if err != nil {
				return inFlag("--prefer", err)
			}
			for _, p := range more {
				spec.Placement.Preferences = append(spec.Placement.Preferences, &blixardv1.Preference{Constraint: p.Constraint.String(), Weight: int32(p.Weight)})
			}
		}
	}
	if given("env") {
		labels, err := parsePairs("--env", s.env, checkEnv)
		if err != nil {
			return inFlag("--env", err)
		}
		spec.Env = labelMap(labels)
	}
	return nil
}

// settings are what was said about all versions together, nil for nothing.
func (s *functionFlags) settings(flags *pflag.FlagSet) (*blixardv1.FunctionSettings, error) {
	out := &blixardv1.FunctionSettings{}
	said := false
	for _, n := range []struct {
		flags []string
		value *int32
		field **int32
	}{
		{[]string{"concurrent-executions", "max-concurrent"}, &s.maxConcurrent, &out.MaxConcurrent},
		{[]string{"rate-limit"}, &s.rateLimit, &out.RateLimit},
		{[]string{"caller-rate-limit"}, &s.callerLimit, &out.CallerLimit},
	} {
		for _, flag := range n.flags {
			if !flags.Changed(flag) {
				continue
			}
			if *n.value < 0 {
				return nil, blixard.Invalid("--"+flag, "", "--%s is %d; it must not be negative", flag, *n.value)
			}
			*n.field, said = n.value, true
		}
	}
	if !said {
		return nil, nil
	}
	return out, nil
}

// qualified splits NAME[:QUALIFIER].
func qualified(text string) (name, qualifier string, err error) {
	name, qualifier, found := strings.Cut(text, ":")
	if found && qualifier == "" {
		return "", "", blixard.Invalid("name", "write NAME, NAME:ALIAS or NAME:VERSION", "%q has nothing after its colon", text)
	}
	if err := blixard.CheckFunctionName(name); err != nil {
		return "", "", err
	}
	return name, qualifier, nil
}
