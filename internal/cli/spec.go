package cli

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// checkSpec completes the spec of a VM, whose name may be empty, and refuses what the cluster would refuse, so that
// a mistake is told where it was made. The spec itself stays as the user wrote
// it: defaults are the cluster's to give.
func checkSpec(name string, spec blixard.VMSpec) error {
	spec.Publish = slices.Clone(spec.Publish)
	spec.Labels = slices.Clone(spec.Labels)
	spec.Preferences = slices.Clone(spec.Preferences)
	if spec.Health != nil {
		h := *spec.Health
		spec.Health = &h
	}
	if !strings.HasPrefix(spec.Image, "sha256:") {
		spec.Image = "builtin" // a path is packed and sent before
	}
	spec.Defaults()
	return spec.CheckNew(blixard.VMName(name))
}

// requestSpec is a spec as a request.
func requestSpec(s blixard.VMSpec) *blixardv1.VMSpec {
	replicas := int32(s.Replicas)
	out := &blixardv1.VMSpec{
		Type: s.Type, Image: s.Image, Hypervisor: s.Hypervisor, Replicas: &replicas, Vcpus: int32(s.VCPUs), MemoryMib: s.MemoryMiB, DiskMib: s.DiskMiB,
		Command: s.Command, Env: labelMap(s.Env), Labels: labelMap(s.Labels), Network: s.Network,
		AntiAffinityGroup: s.AntiAffinityGroup, SpreadAcross: s.SpreadAcross, Strategy: s.Strategy, Priority: int32(s.Priority),
		Singleton: s.Singleton, OnPartition: s.OnPartition, StopGraceMs: s.StopGraceMS,
		Affinity: vmNames(s.AffinityVMs), DependsOn: vmNames(s.DependsOn),
	}
	for _, p := range s.Publish {
		out.Publish = append(out.Publish, &blixardv1.Port{Protocol: p.Protocol, HostPort: int32(p.HostPort), GuestPort: int32(p.GuestPort)})
	}
	for _, c := range s.Constraints {
		out.Constraints = append(out.Constraints, c.String())
	}
	for _, p := range s.Preferences {
		out.Preferences = append(out.Preferences, &blixardv1.Preference{Constraint: p.Constraint.String(), Weight: int32(p.Weight)})
	}
	if r := s.Restart; r != (blixard.RestartPolicy{}) {
		out.Restart = &blixardv1.RestartPolicy{Mode: r.Mode, BackoffMs: r.BackoffMS, MaxBackoffMs: r.MaxBackoffMS, MaxRestarts: int32(r.MaxRestarts)}
	}
	if h := s.Health; h != nil {
		out.HealthCheck = &blixardv1.HealthCheck{
			Kind: h.Kind, Port: int32(h.Port), Path: h.Path, Command: h.Command,
			IntervalMs: h.IntervalMS, TimeoutMs: h.TimeoutMS, StartPeriodMs: h.StartPeriodMS, FailureThreshold: int32(h.FailureThreshold),
		}
	}
	return out
}

func labelMap(labels []blixard.Label) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	out := make(map[string]string, len(labels))
	for _, l := range labels {
		out[l.Key] = l.Value
	}
	return out
}

func vmNames(names []blixard.VMName) []string {
	var out []string
	for _, n := range names {
		out = append(out, string(n))
	}
	return out
}

// document is a VM of the cluster as a document that `blixard apply` reads.
func document(vm *blixardv1.VM) map[string]any {
	s := vm.GetSpec()
	spec := map[string]any{}
	put := func(key string, value any, is bool) {
		if is {
			spec[key] = value
		}
	}
	put("type", s.GetType(), s.GetType() != "")
	put("image", s.GetImage(), s.GetImage() != "")
	put("hypervisor", s.GetHypervisor(), s.GetHypervisor() != "")
	put("replicas", s.GetReplicas(), true)
	put("vcpus", s.GetVcpus(), s.GetVcpus() != 0)
	put("memory", blixard.FormatMiB(s.GetMemoryMib()), s.GetMemoryMib() != 0)
	put("disk", blixard.FormatMiB(s.GetDiskMib()), s.GetDiskMib() != 0)
	put("command", s.GetCommand(), len(s.GetCommand()) > 0)
	put("env", s.GetEnv(), len(s.GetEnv()) > 0)
	var ports []string
	for _, p := range s.GetPublish() {
		ports = append(ports, portText(p))
	}
	put("publish", ports, len(ports) > 0)
	put("network", s.GetNetwork(), s.GetNetwork() != "")
	put("constraints", s.GetConstraints(), len(s.GetConstraints()) > 0)
	var preferences []any
	for _, p := range s.GetPreferences() {
		preferences = append(preferences, map[string]any{"constraint": p.GetConstraint(), "weight": p.GetWeight()})
	}
	put("preferences", preferences, len(preferences) > 0)
	put("affinity", s.GetAffinity(), len(s.GetAffinity()) > 0)
	put("antiAffinityGroup", s.GetAntiAffinityGroup(), s.GetAntiAffinityGroup() != "")
	put("spreadAcross", s.GetSpreadAcross(), s.GetSpreadAcross() != "")
	put("strategy", s.GetStrategy(), s.GetStrategy() != "")
	put("priority", s.GetPriority(), s.GetPriority() != 0)
	put("singleton", true, s.GetSingleton())
	put("onPartition", s.GetOnPartition(), s.GetOnPartition() != "")
	put("dependsOn", s.GetDependsOn(), len(s.GetDependsOn()) > 0)
	put("stopGrace", durationText(s.GetStopGraceMs()), s.GetStopGraceMs() != 0)
	if r := s.GetRestart(); r != nil {
		restart := map[string]any{}
		if r.Mode != "" {
			restart["mode"] = r.Mode
		}
		if r.BackoffMs != 0 {
			restart["backoff"] = durationText(r.BackoffMs)
		}
		if r.MaxBackoffMs != 0 {
			restart["maxBackoff"] = durationText(r.MaxBackoffMs)
		}
		if r.MaxRestarts != 0 {
			restart["maxRestarts"] = r.MaxRestarts
		}
		spec["restart"] = restart
	}
	if h := s.GetHealthCheck(); h != nil {
		check := map[string]any{
			"kind": h.Kind, "interval": durationText(h.IntervalMs), "timeout": durationText(h.TimeoutMs),
			"failureThreshold": h.FailureThreshold,
		}
		if h.Port != 0 {
			check["port"] = h.Port
		}
		if h.Path != "" {
			check["path"] = h.Path
		}
		if len(h.Command) > 0 {
			check["command"] = h.Command
		}
		if h.StartPeriodMs != 0 {
			check["startPeriod"] = durationText(h.StartPeriodMs)
		}
		spec["healthCheck"] = check
	}
	put("desired", vm.GetDesired(), vm.GetDesired() != "")
	metadata := map[string]any{"name": vm.GetName()}
	if v := vm.GetVersion(); v != 0 {
		metadata["version"] = v
	}
	if labels := s.GetLabels(); len(labels) > 0 {
		metadata["labels"] = labels
	}
	return map[string]any{"apiVersion": apiVersion, "kind": "VM", "metadata": metadata, "spec": spec}
}

func durationText(ms int64) string { return (time.Duration(ms) * time.Millisecond).String() }

func portText(p *blixardv1.Port) string {
	text := strconv.Itoa(int(p.GetGuestPort()))
	if p.GetHostPort() != 0 {
		text = strconv.Itoa(int(p.GetHostPort())) + ":" + text
	}
	if p.GetProtocol() == "udp" {
		text += "/udp"
	}
	return text
}

// pairs writes a map as "a=1,b=2".
func pairs(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ",")
}

// parsePort reads "[HOST:]GUEST[/udp]".
func parsePort(text string) (blixard.Port, error) {
	const hint = "write [HOSTPORT:]GUESTPORT[/udp], such as 8080:80"
	bad := func() (blixard.Port, error) {
		return blixard.Port{}, blixard.Invalid("publish", hint, "%q publishes no port", text)
	}
	ports, protocol, found := strings.Cut(text, "/")
	if !found {
		protocol = "tcp"
	}
	if protocol != "tcp" && protocol != "udp" {
		return bad()
	}
	p := blixard.Port{Protocol: protocol}
	host, guest, both := strings.Cut(ports, ":")
	if !both {
		guest = host
	}
	var err error
	if p.GuestPort, err = strconv.Atoi(guest); err != nil || p.GuestPort < 1 || p.GuestPort > 65535 {
		return bad()
	}
	if both {
		if p.HostPort, err = strconv.Atoi(host); err != nil || p.HostPort < 1 || p.HostPort > 65535 {
			return bad()
		}
	}
	return p, nil
}

// parseHealth reads "tcp:PORT", "http:PORT[/PATH]" or "exec:COMMAND".
func parseHealth(text string) (*blixard.HealthCheck, error) {
	const hint = "write tcp:PORT, http:PORT/PATH or exec:COMMAND, such as http:80/healthz"
	kind, rest, found := strings.Cut(text, ":")
	h := &blixard.HealthCheck{Kind: kind}
	bad := blixard.Invalid("healthCheck", hint, "%q is no health check", text)
	if !found {
		return nil, bad
	}
	port := rest
	switch kind {
	case "tcp":
	case "http":
		if at := strings.IndexByte(rest, '/'); at >= 0 {
			port, h.Path = rest[:at], rest[at:]
		}
	case "exec":
		if strings.TrimSpace(rest) == "" {
			return nil, bad
		}
		// One text is a line for the guest's shell, as users write it.
		h.Command = []string{"/bin/sh", "-c", rest}
		return h, nil
	default:
		return nil, bad
	}
	var err error
	if h.Port, err = strconv.Atoi(port); err != nil || h.Port < 1 || h.Port > 65535 {
		return nil, bad
	}
	return h, nil
}

// parseConstraints is for texts that were given: an empty one is a mistake.
func parseConstraints(text string) ([]blixard.Constraint, error) {
	out, err := blixard.ParseConstraints(text)
	if err == nil && len(out) == 0 {
		err = blixard.Invalid("constraint", `write key=value, key!=value or key>=quantity, such as "storage=nvme,memory>=32GB"`, "the constraint is empty")
	}
	return out, err
}

// parsePreference reads "CONSTRAINT[:WEIGHT]".
func parsePreference(text string) ([]blixard.Preference, error) {
	weight := 0
	if at := strings.LastIndexByte(text, ':'); at >= 0 {
		if w, err := strconv.Atoi(text[at+1:]); err == nil {
			if w < 1 || w > 100 {
				return nil, blixard.Invalid("preferences", "weights are 1 to 100", "the weight of the preference %q is out of range", text)
			}
			text, weight = text[:at], w
		}
	}
	constraints, err := parseConstraints(text)
	var out []blixard.Preference
	for _, c := range constraints {
		out = append(out, blixard.Preference{Constraint: c, Weight: weight})
	}
	return out, err
}

// parsePairs reads "KEY=VALUE" texts, each key once.
func parsePairs(field string, texts []string, check func(key, value string) error) ([]blixard.Label, error) {
	var out []blixard.Label
	for _, t := range texts {
		key, value, found := strings.Cut(t, "=")
		if !found || key == "" {
			return nil, blixard.Invalid(field, "write KEY=VALUE", "%q is not KEY=VALUE", t)
		}
		if check != nil {
			if err := check(key, value); err != nil {
				return nil, err
			}
		}
		if slices.ContainsFunc(out, func(l blixard.Label) bool { return l.Key == key }) {
			return nil, blixard.Invalid(field, "give it once", "%s is given twice", key)
		}
		out = append(out, blixard.Label{Key: key, Value: value})
	}
	return out, nil
}

func checkEnv(key, _ string) error { return blixard.CheckEnvName(key) }

func checkLabel(key, value string) error {
	if err := blixard.CheckLabelKey(key); err != nil {
		return err
	}
	return blixard.CheckLabelValue(value)
}
