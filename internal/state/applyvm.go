package state

import (
	"reflect"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// ApplyVM makes a VM as a document says: it is created if there is none, else
// its spec is replaced. It is a command of its own, so that a repeat under the
// same key is the same command although the VM exists by then. Outcome.Text is
// "created", "updated" or "unchanged".
type ApplyVM struct {
	Name blixard.VMName
	Spec blixard.VMSpec
	// Desired: what the VM is to be; empty: running if it is new, else as it is.
	Desired blixard.Desired
	// ExpectVersion refuses to change a VM that is at another version, and to make
	// one anew that is gone; 0: any. What changes nothing is never refused.
	ExpectVersion uint64
}

func (m *ApplyVM) kind() uint8 { return 13 }

func (m *ApplyVM) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	codeSpec(c, &m.Spec)
	wire.String(c, &m.Desired)
	wire.Uint(c, &m.ExpectVersion)
}

func (m *ApplyVM) apply(tx *txn) (Outcome, *blixard.Error) {
	switch m.Desired {
	case "", blixard.DesiredRunning, blixard.DesiredStopped:
	default:
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeInvalid, Field: "desired", Message: "desired is " + clip(string(m.Desired)), Hint: "known: running, stopped",
		}
	}
	old := tx.t.vm(m.Name)
	if old == nil && m.ExpectVersion != 0 {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeConflict, Message: "the VM " + string(m.Name) + " was deleted since it was read", Hint: "leave the version out to make it anew",
		}
	}
	if old == nil {
		create := CreateVM{Name: m.Name, Spec: m.Spec, Start: m.Desired != blixard.DesiredStopped}
		out, err := create.apply(tx)
		out.Text = "created"
		return out, err
	}
	update := UpdateVM{Name: m.Name, Spec: m.Spec, ExpectVersion: m.ExpectVersion}
	if reflect.DeepEqual(old.Spec, m.Spec) && (m.Desired == "" || m.Desired == old.Desired) {
		update.ExpectVersion = 0
	}
	out, err := update.apply(tx)
	if err != nil {
		return Outcome{}, err
	}
	if m.Desired != "" && m.Desired != old.Desired {
		verb := VerbStop
		if m.Desired == blixard.DesiredRunning {
			verb = VerbStart
		}
		set := SetVM{Name: m.Name, Verb: verb}
		if out, err = set.apply(tx); err != nil {
			return Outcome{}, err
		}
	}
	out.Text = "updated"
	if out.Noop {
		out.Text = "unchanged"
	}
	return out, nil
}
