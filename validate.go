package blixard

import (
	"slices"
	"strings"
)

// Bounds of a VM's spec.
const (
	MaxReplicas  = 10000
	MaxVCPUs     = 256
	MaxMemoryMiB = 4 << 20 // 4 TiB
	MaxDiskMiB   = 64 << 20
	maxListed    = 256 // entries of any list in a spec
	maxEnvBytes  = 128 << 10
)

// BuiltinImage is the image that every node makes itself. With less memory than
// MinBuiltinMemoryMiB (measured, and rounded up) its kernel does not get as far as
// its console. It is asked for where a spec comes in; what is stored stays valid.
const (
	BuiltinImage        = "builtin"
	MinBuiltinMemoryMiB = 96
)

// Defaults fills what the user left out. It is called where a command is made,
// so that what is stored is complete and never changes with a release.
func (s *VMSpec) Defaults() {
	set := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	set(&s.Type, "long-lived")
	set(&s.Image, BuiltinImage)
	set(&s.Strategy, "spread")
	set(&s.Restart.Mode, "always")
	if s.VCPUs == 0 {
		s.VCPUs = 1
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 512
	}
	if s.Priority == 0 {
		s.Priority = 500
	}
	if s.Restart.BackoffMS == 0 {
		s.Restart.BackoffMS = 1000
	}
	if s.Restart.MaxBackoffMS == 0 {
		s.Restart.MaxBackoffMS = max(60_000, s.Restart.BackoffMS)
	}
	if s.StopGraceMS == 0 {
		s.StopGraceMS = 10_000
	}
	for i := range s.Publish {
		set(&s.Publish[i].Protocol, "tcp")
	}
	for i := range s.Preferences {
		if s.Preferences[i].Weight == 0 {
			s.Preferences[i].Weight = 50
		}
	}
	if h := s.Health; h != nil {
		if h.IntervalMS == 0 {
			h.IntervalMS = 5000
		}
		if h.TimeoutMS == 0 {
			h.TimeoutMS = 2000
		}
		if h.FailureThreshold == 0 {
			h.FailureThreshold = 3
		}
		if h.Kind == "http" && h.Path == "" {
			h.Path = "/"
		}
	}
	byKey := func(a, b Label) int { return strings.Compare(a.Key, b.Key) }
	slices.SortStableFunc(s.Labels, byKey)
}

// Check tells what is wrong with a complete spec, nil if nothing.
func (s *VMSpec) Check() error {
	between := func(field string, v, lo, hi int64, unit string) error {
		if v < lo || v > hi {
			return Invalid(field, "", "%s is %d%s; it must be between %d and %d", field, v, unit, lo, hi)
		}
		return nil
	}
	checks := []error{
		oneOf("type", s.Type, "long-lived"),
		oneOf("strategy", s.Strategy, "spread", "binpack"),
		oneOf("restart.mode", s.Restart.Mode, "always", "on-failure", "never"),
		oneOf("onPartition", s.OnPartition, "", OnPartitionStop, OnPartitionContinue),
		oneOf("network", s.Network, "", "user", "bridge"),
		between("replicas", int64(s.Replicas), 0, MaxReplicas, ""),
		between("vcpus", int64(s.VCPUs), 1, MaxVCPUs, ""),
		between("memory", s.MemoryMiB, 32, MaxMemoryMiB, " MiB"),
		between("disk", s.DiskMiB, 0, MaxDiskMiB, " MiB"),
		between("priority", int64(s.Priority), 1, 1000, ""),
		between("restart.backoff", s.Restart.BackoffMS, 1, 3_600_000, " ms"),
		between("restart.maxBackoff", s.Restart.MaxBackoffMS, s.Restart.BackoffMS, 86_400_000, " ms"),
		between("restart.maxRestarts", int64(s.Restart.MaxRestarts), 0, 1_000_000, ""),
		between("stopGrace", s.StopGraceMS, 0, 3_600_000, " ms"),
		s.checkLists(),
		s.checkImage(),
		s.checkHealth(),
	}
	for _, err := range checks {
		if err != nil {
			return err
		}
	}
	return nil
}

// oneOf refuses a value that is not known.
func oneOf(field, v string, known ...string) error {
	if slices.Contains(known, v) {
		return nil
	}
	hint := "known: " + strings.TrimPrefix(strings.Join(known, ", "), ", ") // "" is what was left out
	if near := Nearest(v, known); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	return Invalid(field, hint, "%s %q is not known", field, v)
}

// Hypervisors are the names of the drivers that a VM may ask for. Whether a node
// has one is the node's to say.
func Hypervisors() []string {
	return []string{"qemu", "microvm.nix", "firecracker", "cloud-hypervisor"}
}

// CheckHypervisor tells whether a VM may ask for a driver; "" lets the node
// choose. It is for those who make commands, and no part of VMSpec.Check, which
// replicas of different releases must agree about: a newer one knows more
// drivers.
func CheckHypervisor(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > 64 {
		return Invalid("hypervisor", "known: "+strings.Join(Hypervisors(), ", "), "the hypervisor's name has %d characters", len(name))
	}
	return oneOf("hypervisor", name, Hypervisors()...)
}

func (s *VMSpec) checkImage() error {
	if s.Image == BuiltinImage {
		return nil
	}
	digest, ok := strings.CutPrefix(s.Image, "sha256:")
	if !ok || len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
		return Invalid("image", "use builtin, or a path with `blixard vm create --image PATH`, which imports it first", "the image %.80q is neither builtin nor sha256:<64 hex digits>", s.Image)
	}
	return nil
}

func (s *VMSpec) checkLists() error {
	for _, l := range []struct {
		field string
		n     int
	}{
		{"command", len(s.Command)},
		{"env", len(s.Env)},
		{"labels", len(s.Labels)},
		{"publish", len(s.Publish)},
		{"constraints", len(s.Constraints)},
		{"preferences", len(s.Preferences)},
		{"affinity", len(s.AffinityVMs)},
		{"dependsOn", len(s.DependsOn)},
	} {
		if l.n > maxListed {
			return Invalid(l.field, "", "%s has %d entries; at most %d are allowed", l.field, l.n, maxListed)
		}
	}
	size := 0
	for _, e := range s.Env {
		size += len(e.Key) + len(e.Value)
		if e.Key == "" || strings.ContainsAny(e.Key, "=\x00") || strings.Contains(e.Value, "\x00") {
			return Invalid("env", "write NAME=value", "the environment variable %.40q is not usable", e.Key)
		}
	}
	for _, a := range s.Command {
		size += len(a)
		if strings.Contains(a, "\x00") {
			return Invalid("command", "", "an argument of the command holds a zero byte")
		}
	}
	if size > maxEnvBytes {
		return Invalid("env", "", "environment and command are %d bytes; at most %d are allowed", size, maxEnvBytes)
	}
	for i, l := range s.Labels {
		if err := CheckLabelKey(l.Key); err != nil {
			return err
		}
		if err := CheckLabelValue(l.Value); err != nil {
			return err
		}
		if i > 0 && s.Labels[i-1].Key == l.Key {
			return Invalid("labels", "", "the label %q is given twice", l.Key)
		}
	}
	for _, c := range s.Constraints {
		if err := c.Check(); err != nil {
			return err
		}
	}
	for _, p := range s.Preferences {
		if err := p.Check(); err != nil {
			return err
		}
		if p.Weight < 1 || p.Weight > 100 {
			return Invalid("preferences", "", "the weight of preference %s is %d; it must be between 1 and 100", p.Constraint, p.Weight)
		}
	}
	for _, names := range [][]VMName{s.AffinityVMs, s.DependsOn} {
		for _, n := range names {
			if err := CheckName(string(n)); err != nil {
				return err
			}
		}
	}
	if s.AntiAffinityGroup != "" {
		if err := CheckLabelKey(s.AntiAffinityGroup); err != nil {
			return Invalid("antiAffinityGroup", "", "the anti-affinity group %q is not usable: letters, digits and . _ - / only", s.AntiAffinityGroup)
		}
	}
	if s.SpreadAcross != "" {
		if err := CheckLabelKey(s.SpreadAcross); err != nil {
			return err
		}
	}
	return s.checkPorts()
}

func (s *VMSpec) checkPorts() error {
	for i, p := range s.Publish {
		const hint = "write --publish [HOSTPORT:]GUESTPORT[/udp], such as 8080:80"
		if p.Protocol != "tcp" && p.Protocol != "udp" {
			return Invalid("publish", hint, "the protocol %q is not known", p.Protocol)
		}
		if p.GuestPort < 1 || p.GuestPort > 65535 || p.HostPort < 0 || p.HostPort > 65535 {
			return Invalid("publish", hint, "port %d:%d is out of range", p.HostPort, p.GuestPort)
		}
		for _, q := range s.Publish[:i] {
			if q.Protocol == p.Protocol && (q.GuestPort == p.GuestPort || p.HostPort != 0 && q.HostPort == p.HostPort) {
				return Invalid("publish", "", "port %d:%d/%s is published twice", p.HostPort, p.GuestPort, p.Protocol)
			}
		}
	}
	return nil
}

func (s *VMSpec) checkHealth() error {
	h := s.Health
	if h == nil {
		return nil
	}
	const hint = "write --health-check tcp:PORT, http:PORT/PATH or exec:COMMAND"
	switch h.Kind {
	case "tcp", "http":
		if h.Port < 1 || h.Port > 65535 {
			return Invalid("healthCheck", hint, "the health check's port %d is out of range", h.Port)
		}
		if h.Kind == "http" && !strings.HasPrefix(h.Path, "/") {
			return Invalid("healthCheck", hint, "the health check's path %q does not begin with /", h.Path)
		}
	case "exec":
		if len(h.Command) == 0 {
			return Invalid("healthCheck", hint, "the health check has no command")
		}
	default:
		return Invalid("healthCheck", hint, "the health check kind %q is not known", h.Kind)
	}
	if h.IntervalMS < 100 || h.IntervalMS > 3_600_000 || h.TimeoutMS < 1 || h.TimeoutMS > 600_000 || h.StartPeriodMS < 0 || h.StartPeriodMS > 86_400_000 || h.FailureThreshold < 1 || h.FailureThreshold > 1000 {
		return Invalid("healthCheck", "interval 100ms–1h, timeout 1ms–10m, start period up to 24h, threshold 1–1000", "a bound of the health check is out of range")
	}
	return nil
}
