package vmm_test

import (
	"errors"
	"math"
	"testing"

	"github.com/blixard/blixard/internal/vmm"
)

func TestRefText(t *testing.T) {
	for _, ref := range []vmm.Ref{{Instance: "a"}, {Instance: "webapp-1", Generation: 3}, {Instance: "0", Generation: math.MaxUint64}} {
		if got, err := vmm.ParseRef(ref.String()); err != nil || got != ref {
			t.Errorf("%q was read as %+v, %v", ref.String(), got, err)
		}
	}
	for _, text := range []string{"", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.1 ", "../a.1", "A.1", "a.18446744073709551616"} {
		if ref, err := vmm.ParseRef(text); !errors.Is(err, vmm.ErrInvalid) {
			t.Errorf("%q was read as %+v, %v", text, ref, err)
		}
	}
}
