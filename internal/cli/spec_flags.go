package cli

import (
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/blixard/blixard"
)

// specFlags are the flags of `vm create` that say what the VM is.
type specFlags struct {
	spec        blixard.VMSpec
	memory      string
	disk        string
	constraints []string
	preferences []string
	affinity    []string
	dependsOn   []string
	env, labels []string
	publish     []string
	health      string
	interval    time.Duration
	healthLimit time.Duration
	startPeriod time.Duration
	retries     int
	stopGrace   time.Duration
	restart     string
	backoff     time.Duration
	maxBackoff  time.Duration
	maxRestarts int
}

// add registers the flags; vms completes names of VMs.
func (s *specFlags) add(cmd *cobra.Command, vms cobra.CompletionFunc) {
	f := cmd.Flags()
	f.StringVar(&s.spec.Type, "type", "long-lived", "kind of VM; only long-lived")
	f.StringVar(&s.spec.Image, "image", "builtin", "builtin, sha256:… of an imported image, or a PATH (kernel+initrd or rootfs) that is imported first")
	f.IntVar(&s.spec.Replicas, "replicas", 1, "how many instances")
	f.StringVar(&s.spec.Hypervisor, "hypervisor", "", "driver that nodes must have: "+strings.Join(blixard.Hypervisors(), ", ")+"; this release has qemu; the node chooses if empty")
	f.StringVar(&s.memory, "memory", "512M", "memory of an instance, such as 512M or 2G")
	f.IntVar(&s.spec.VCPUs, "vcpus", 1, "virtual CPUs of an instance")
	f.StringVar(&s.disk, "disk", "", "disk of an instance, such as 10G")
	f.StringArrayVar(&s.constraints, "constraint", nil, `what must hold on the node, such as "storage=nvme,memory>=32GB"`)
	f.StringArrayVar(&s.preferences, "prefer", nil, `what is better to hold on the node, such as gpu=available or gpu=available:80 (weight 1 to 100)`)
	f.StringSliceVar(&s.affinity, "affinity", nil, "VMs beside which this one must run")
	f.StringVar(&s.spec.AntiAffinityGroup, "anti-affinity-group", "", "no two instances of one group share a node")
	f.StringVar(&s.spec.SpreadAcross, "spread-across", "", "node label whose values instances are spread over, such as zone")
	f.StringVar(&s.spec.Strategy, "strategy", "", "spread over nodes (default) or binpack: fill one before the next")
	f.IntVar(&s.spec.Priority, "priority", 0, "1 to 1000; higher is placed first, and preempts lower ones when it fits nowhere (default 500)")
	f.StringArrayVarP(&s.env, "env", "e", nil, "environment of the guest's command, KEY=VALUE")
	f.StringArrayVarP(&s.labels, "label", "l", nil, "label of the VM, KEY=VALUE")
	f.StringArrayVarP(&s.publish, "publish", "p", nil, "publish a guest's port on its node, [HOST:]GUEST[/udp]")
	f.StringVar(&s.health, "health-check", "", "tcp:PORT, http:PORT/PATH or exec:COMMAND")
	f.DurationVar(&s.interval, "health-interval", 0, "time between health checks (default 5s)")
	f.DurationVar(&s.healthLimit, "health-timeout", 0, "how long a health check may take (default 2s)")
	f.DurationVar(&s.startPeriod, "health-start-period", 0, "failed health checks before this has passed do not count")
	f.IntVar(&s.retries, "health-retries", 0, "failed health checks in a row that make an instance unhealthy (default 3)")
	f.BoolVar(&s.spec.Singleton, "singleton", false, "at no instant do two incarnations of an instance run")
	f.StringVar(&s.spec.OnPartition, "on-partition", "", "what a node that is cut off does: stop (default for singletons) or continue")
	f.StringVar(&s.restart, "restart", "", "always (default), on-failure or never")
	f.DurationVar(&s.backoff, "restart-backoff", 0, "time before the first restart, doubled for each further one (default 1s)")
	f.DurationVar(&s.maxBackoff, "restart-max-backoff", 0, "longest time before a restart (default 1m)")
	f.IntVar(&s.maxRestarts, "max-restarts", 0, "restarts until it is left alone; counted anew once it ran for ten minutes; 0: no limit")
	f.StringSliceVar(&s.dependsOn, "depends-on", nil, "VMs that must run before this one starts")
	f.StringVar(&s.spec.Network, "network", "", "user or bridge; the node chooses if empty")
	f.DurationVar(&s.stopGrace, "stop-grace", 0, "time the guest gets to shut down (default 10s)")
	for _, flag := range []string{"affinity", "depends-on"} {
		if err := cmd.RegisterFlagCompletionFunc(flag, listed(vms)); err != nil {
			panic("completing --" + flag + ": " + err.Error()) // the flag is not there: a bug
		}
	}
	registerValues(cmd, "hypervisor", blixard.Hypervisors()...)
	registerValues(cmd, "strategy", "spread", "binpack")
	registerValues(cmd, "on-partition", "stop", "continue")
	registerValues(cmd, "restart", "always", "on-failure", "never")
	registerValues(cmd, "network", "user", "bridge")
	registerValues(cmd, "type", "long-lived")
}

// listed completes the last of several values with commas between them.
func listed(complete cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		before := ""
		if at := strings.LastIndexByte(toComplete, ','); at >= 0 {
			before, toComplete = toComplete[:at+1], toComplete[at+1:]
		}
		names, directive := complete(cmd, nil, toComplete)
		for i := range names {
			names[i] = before + names[i]
		}
		return names, directive
	}
}

// registerValues lists the values of a flag for shells.
func registerValues(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic("completing --" + flag + ": " + err.Error()) // the flag is not there: a bug
	}
}

// merge is a spec with what was given on the command line put over it; base is
// nil when there is no document.
func (s *specFlags) merge(flags *pflag.FlagSet, base *blixard.VMSpec, command []string) (blixard.VMSpec, error) {
	spec := blixard.VMSpec{Replicas: 1}
	if base != nil {
		spec = *base
	}
	given := func(flag string) bool { return flags.Changed(flag) }
	for flag, set := range map[string]func(){
		"type":                func() { spec.Type = s.spec.Type },
		"image":               func() { spec.Image = s.spec.Image },
		"replicas":            func() { spec.Replicas = s.spec.Replicas },
		"hypervisor":          func() { spec.Hypervisor = s.spec.Hypervisor },
		"vcpus":               func() { spec.VCPUs = s.spec.VCPUs },
		"anti-affinity-group": func() { spec.AntiAffinityGroup = s.spec.AntiAffinityGroup },
		"spread-across":       func() { spec.SpreadAcross = s.spec.SpreadAcross },
		"strategy":            func() { spec.Strategy = s.spec.Strategy },
		"priority":            func() { spec.Priority = s.spec.Priority },
		"singleton":           func() { spec.Singleton = s.spec.Singleton },
		"on-partition":        func() { spec.OnPartition = s.spec.OnPartition },
		"network":             func() { spec.Network = s.spec.Network },
		"restart":             func() { spec.Restart.Mode = s.restart },
		"restart-backoff":     func() { spec.Restart.BackoffMS = s.backoff.Milliseconds() },
		"restart-max-backoff": func() { spec.Restart.MaxBackoffMS = s.maxBackoff.Milliseconds() },
		"max-restarts":        func() { spec.Restart.MaxRestarts = s.maxRestarts },
		"stop-grace":          func() { spec.StopGraceMS = s.stopGrace.Milliseconds() },
		"affinity":            func() { spec.AffinityVMs = toVMNames(s.affinity) },
		"depends-on":          func() { spec.DependsOn = toVMNames(s.dependsOn) },
	} {
		if given(flag) {
			set()
		}
	}
	if len(command) > 0 {
		spec.Command = command
	}
	for _, step := range []func(*blixard.VMSpec, func(string) bool) error{s.mergeAmounts, s.mergeLists, s.mergeHealth} {
		if err := step(&spec, given); err != nil {
			return spec, err
		}
	}
	return spec, checkSpec("", spec)
}

func toVMNames(names []string) []blixard.VMName {
	var out []blixard.VMName
	for _, n := range names {
		out = append(out, blixard.VMName(n))
	}
	return out
}

// inFlag says which flag an error is about.
func inFlag(flag string, err error) error {
	var e *blixard.Error
	if err == nil || !asError(err, &e) {
		return err
	}
	return &blixard.Error{Code: e.Code, Field: flag, Hint: e.Hint, Message: flag + ": " + e.Message}
}

func (s *specFlags) mergeAmounts(spec *blixard.VMSpec, given func(string) bool) error {
	// 0 stands for the default in requests, so what was said has to be refused
	// here.
	for _, n := range []struct {
		flag  string
		value int
	}{{"vcpus", s.spec.VCPUs}, {"priority", s.spec.Priority}, {"health-retries", s.retries}} {
		if given(n.flag) && n.value < 1 {
			return blixard.Invalid("--"+n.flag, "give a number of at least 1", "--%s is %d", n.flag, n.value)
		}
	}
	var err error
	if given("memory") {
		if spec.MemoryMiB, err = blixard.ParseMemoryMiB(s.memory); err != nil {
			return inFlag("--memory", err)
		}
		if spec.MemoryMiB == 0 {
			return blixard.Invalid("--memory", "give at least 32M", "--memory is %s", s.memory)
		}
	}
	if given("disk") {
		if spec.DiskMiB, err = blixard.ParseMemoryMiB(s.disk); err != nil {
			return inFlag("--disk", err)
		}
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{
		{"stop-grace", s.stopGrace},
		{"restart-backoff", s.backoff},
		{"restart-max-backoff", s.maxBackoff},
		{"health-interval", s.interval},
		{"health-timeout", s.healthLimit},
	} {
		if given(d.flag) && d.value < time.Millisecond {
			return blixard.Invalid("--"+d.flag, "give at least 1ms", "--%s is %s", d.flag, d.value)
		}
	}
	return nil
}

func (s *specFlags) mergeLists(spec *blixard.VMSpec, given func(string) bool) error {
	var err error
	if given("constraint") {
		spec.Constraints = nil
		for _, text := range s.constraints {
			more, err := parseConstraints(text)
			if err != nil {
				return inFlag("--constraint", err)
			}
			spec.Constraints = append(spec.Constraints, more...)
		}
	}
	if given("prefer") {
		spec.Preferences = nil
		for _, text := range s.preferences {
			more, err := parsePreference(text)
			if err != nil {
				return inFlag("--prefer", err)
			}
			spec.Preferences = append(spec.Preferences, more...)
		}
	}
	if given("publish") {
		spec.Publish = nil
		for _, text := range s.publish {
			p, err := parsePort(text)
			if err != nil {
				return inFlag("--publish", err)
			}
			spec.Publish = append(spec.Publish, p)
		}
	}
	if given("env") {
		if spec.Env, err = parsePairs("--env", s.env, checkEnv); err != nil {
			return inFlag("--env", err)
		}
	}
	if given("label") {
		if spec.Labels, err = parsePairs("--label", s.labels, checkLabel); err != nil {
			return inFlag("--label", err)
		}
	}
	return nil
}

func (s *specFlags) mergeHealth(spec *blixard.VMSpec, given func(string) bool) error {
	if given("health-check") {
		h, err := parseHealth(s.health)
		if err != nil {
			return inFlag("--health-check", err)
		}
		spec.Health = h
	}
	for flag, set := range map[string]func(*blixard.HealthCheck){
		"health-interval":     func(h *blixard.HealthCheck) { h.IntervalMS = s.interval.Milliseconds() },
		"health-timeout":      func(h *blixard.HealthCheck) { h.TimeoutMS = s.healthLimit.Milliseconds() },
		"health-start-period": func(h *blixard.HealthCheck) { h.StartPeriodMS = s.startPeriod.Milliseconds() },
		"health-retries":      func(h *blixard.HealthCheck) { h.FailureThreshold = s.retries },
	} {
		if !given(flag) {
			continue
		}
		if spec.Health == nil {
			return blixard.Invalid("--"+flag, "give --health-check tcp:PORT, http:PORT/PATH or exec:COMMAND too", "--%s says something about a health check, and there is none", flag)
		}
		set(spec.Health)
	}
	return nil
}
