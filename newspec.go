package blixard

import (
	"slices"
	"strings"
	"unicode"
)

// CheckNew is Check for those who make commands of what a user writes, with rules
// that are no part of Check, which replicas of different releases must agree
// about: they may become stricter without making an old entry another one. name
// is empty when it is not known.
func (s *VMSpec) CheckNew(name VMName) error {
	if err := s.Check(); err != nil {
		return err
	}
	if err := CheckHypervisor(s.Hypervisor); err != nil {
		return err
	}
	if name != "" && slices.Contains(s.AffinityVMs, name) {
		return Invalid("affinity", "name other VMs; antiAffinityGroup and spreadAcross say how its own instances lie", "the VM %s is to run beside itself", name)
	}
	for i, e := range s.Env {
		if err := CheckEnvName(e.Key); err != nil {
			return err
		}
		if slices.ContainsFunc(s.Env[:i], func(before Label) bool { return before.Key == e.Key }) {
			return Invalid("env", "", "the environment variable %s is given twice", e.Key)
		}
	}
	if len(s.Command) > 0 && s.Command[0] == "" {
		return Invalid("command", "leave it out to run what the image says", "the command begins with an empty text, which is no program")
	}
	if h := s.Health; h != nil && len(h.Command) > 0 && h.Command[0] == "" {
		return Invalid("healthCheck", "", "the health check's command begins with an empty text, which is no program")
	}
	for _, c := range s.Constraints {
		if err := c.checkNew("constraint"); err != nil {
			return err
		}
	}
	for _, p := range s.Preferences {
		if err := p.checkNew("preferences"); err != nil {
			return err
		}
	}
	return nil
}

// checkNew refuses values that look like a second operator.
func (c Constraint) checkNew(field string) error {
	if strings.ContainsAny(c.Value, "=<>") {
		return Invalid(field, `write one operator: key=value, key!=value or key>=quantity; several constraints are separated by commas`, "the constraint %q has more than one operator", c.String())
	}
	return nil
}

// CheckEnvName tells why name cannot name an environment variable.
func CheckEnvName(name string) error {
	bad := func(r rune) bool { return r == '=' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if name == "" || len(name) > 255 || strings.ContainsFunc(name, bad) {
		return Invalid("env", "write NAME=value, the name without spaces", "%.60q cannot name an environment variable", name)
	}
	return nil
}

// CheckZone tells why a name cannot be a node's zone; "" is none.
func CheckZone(zone string) error {
	if zone != "" && CheckLabelKey(zone) != nil {
		return Invalid("zone", "use at most 63 letters, digits and . _ - /", "the zone %.70q is not usable", zone)
	}
	return nil
}
