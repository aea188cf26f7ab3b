package vmm

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// ErrInvalid: the specification or the name cannot be used; nothing was done.
var ErrInvalid = errors.New("invalid specification")

var instanceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// String writes the incarnation as "webapp-1.3": instance, dot, generation. As
// an instance is a DNS label, the dot is unambiguous and the text is safe as a
// file name and on a command line.
func (r Ref) String() string {
	return r.Instance + "." + strconv.FormatUint(r.Generation, 10)
}

// Check refuses a Ref whose instance is not a DNS label; the error wraps
// ErrInvalid. Drivers call it before they build a path from a Ref.
func (r Ref) Check() error {
	if !instanceName.MatchString(r.Instance) {
		return fmt.Errorf("instance %q is not a DNS label (a-z, 0-9, '-', at most 63): %w", r.Instance, ErrInvalid)
	}
	return nil
}

// Compare orders by instance, then by generation.
func (r Ref) Compare(o Ref) int {
	return cmp.Or(strings.Compare(r.Instance, o.Instance), cmp.Compare(r.Generation, o.Generation))
}

// ParseRef reads what Ref.String wrote, and nothing else.
func ParseRef(s string) (Ref, error) {
	name, number, found := strings.Cut(s, ".")
	generation, err := strconv.ParseUint(number, 10, 64)
	ref := Ref{Instance: name, Generation: generation}
	if !found || err != nil || ref.Check() != nil || ref.String() != s {
		return Ref{}, fmt.Errorf("%q is not instance.generation: %w", s, ErrInvalid)
	}
	return ref, nil
}

// Watcher is a Driver that notices by itself when a hypervisor process ends.
type Watcher interface {
	// Changes receives a value when some incarnation may have changed; never
	// more than one waits. It only says "List again": it may be early, late for
	// changes other than exits, or spurious. For one reader.
	Changes() <-chan struct{}
}
