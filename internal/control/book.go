package control

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/schedule"
	"github.com/blixard/blixard/internal/state"
)

// book is what a leader remembers of a VM that has not converged. It can be
// lost at any time: it only keeps the leader from doing things too often.
type book struct {
	wakeMS    int64 // earliest timer that is set, 0 for none
	backoffs  []backoff
	reportMS  int64 // when the refusal was proposed last
	reported  bool
	stamp     stamp // of the rows when something was proposed last
	acted     bool
	stalled   int // passes in a row whose proposals changed nothing
	holdOffMS int64
	reserved  *reservation

	nominations []nomination
	preemptAtMS int64 // until then nothing is preempted
	awaited     bool  // the refusal that was proposed last tells of a nomination
}

// reservation keeps the room that was found for the successor of an
// incarnation until that has ended.
type reservation struct {
	ordinal    int
	generation uint64 // of the one that ends
	node       blixard.NodeName
}

// stamp tells whether any row of a VM changed.
type stamp struct {
	vm      *blixard.VM
	version uint64
	rows    int
}

// backoff is when an ended incarnation may be followed. It is fixed when first
// seen, so that a wall clock that jumps neither hurries nor stops it.
type backoff struct {
	ordinal    int
	generation uint64
	atMS       int64
}

func (c *Controller) book(name blixard.VMName) *book {
	b := c.books[name]
	if b == nil {
		b = &book{}
		c.books[name] = b
	}
	return b
}

func (b *book) idle() bool {
	return b.wakeMS == 0 && len(b.backoffs) == 0 && !b.acted && !b.reported && b.reserved == nil && len(b.nominations) == 0
}

// mayAct tells whether to look at the VM now. What is proposed again although
// the last proposal changed nothing is proposed ever more slowly.
func (b *book) mayAct(p *pass, name blixard.VMName, now stamp) bool {
	if !b.acted || b.stamp != now {
		b.acted, b.stalled, b.holdOffMS = false, 0, 0
		return true
	}
	if b.holdOffMS == 0 {
		b.stalled = min(b.stalled+1, 6)
		b.holdOffMS = p.now + 50<<b.stalled
	}
	if p.now < b.holdOffMS {
		p.wakeAt(name, b.holdOffMS)
		return false
	}
	b.holdOffMS = 0
	return true
}

// backoff returns when the slot's ended incarnation may be followed.
func (b *book) backoff(ordinal int, generation uint64, nowMS, waitMS int64) int64 {
	for k := range b.backoffs {
		if f := &b.backoffs[k]; f.ordinal == ordinal {
			if f.generation != generation {
				f.generation, f.atMS = generation, nowMS+waitMS
			}
			return f.atMS
		}
	}
	b.backoffs = append(b.backoffs, backoff{ordinal, generation, nowMS + waitMS})
	return nowMS + waitMS
}

// reserve books the room that was found for an incarnation's successor.
func (l *life) reserve(s *slot, node blixard.NodeName) {
	l.book.reserved = &reservation{s.ordinal, s.live.Generation, node}
	l.index.Assume(l.vm.Name, &l.vm.Spec, s.ordinal, s.live.Generation+1, node)
}

// sync brings what the index knows of a VM in line with the view, books room
// again that is kept for it, and room that is reserved for as long as the
// predecessor is ending.
func (p *pass) sync(name blixard.VMName) {
	p.index.SyncVM(p.v, name)
	b := p.books[name]
	if b == nil {
		return
	}
	if len(b.nominations) > 0 {
		p.nominations(name, b)
	}
	if b.reserved == nil {
		return
	}
	r, vm := b.reserved, p.v.VM(name)
	b.reserved = nil
	if vm == nil || vm.Deleting || vm.Desired != blixard.DesiredRunning || r.ordinal > vm.Spec.Replicas {
		return
	}
	old := p.v.Instance(name, r.ordinal, r.generation)
	if old != nil && !old.State.Terminal() && old.Wanted != blixard.WantRun && p.index.Node(r.node) != nil {
		b.reserved = r
		p.index.Assume(name, &vm.Spec, r.ordinal, r.generation+1, r.node)
	}
}

// settle forgets the times of slots that do not wait to be restarted any more.
func (b *book) settle(slots []slot) {
	b.backoffs = slices.DeleteFunc(b.backoffs, func(f backoff) bool {
		return !slices.ContainsFunc(slots, func(s slot) bool {
			return s.ordinal == f.ordinal && (s.phase == phaseBackoff || s.phase == phaseRefused || s.phase == phaseWaiting)
		})
	})
}

// wakeAt has a VM looked at again then, or earlier.
func (p *pass) wakeAt(name blixard.VMName, atMS int64) {
	b := p.book(name)
	if b.wakeMS != 0 && b.wakeMS <= atMS {
		return
	}
	if b.wakeMS != 0 {
		p.timers.Delete(timer{atMS: b.wakeMS, vm: name})
	}
	b.wakeMS = atMS
	p.timers.Set(timer{atMS: atMS, vm: name})
}

// miss counts an instance that has no place, with the reason.
func (l *life) miss(why string) {
	l.missing++
	if l.why != "" {
		return
	}
	if len(why) > maxWhy {
		why = strings.ToValidUTF8(why[:maxWhy], "") + "..."
	}
	l.why = why
}

// maxWhy is shorter than what the state clips, so that what is proposed is
// what is read back.
const maxWhy = 800

// How often a VM's refusal is proposed at most.
const (
	reportEveryMS = 1000 // when the number changed
	rewordEveryMS = 5000 // when only the words did
)

// refuse counts an instance that no node takes. The nodes are asked why only
// if the answer can be reported.
func (l *life) refuse(prefix string, r schedule.Request) {
	l.refused = true
	for _, other := range r.Spec.AffinityVMs {
		l.waitFor(other)
	}
	if b := l.book; l.why != "" || l.vm.Refusal != nil && b.reported && !b.awaited && l.now < b.reportMS+rewordEveryMS {
		l.missing++
		return
	}
	l.miss(prefix + l.index.Refuse(r).Summary)
}

// await counts an instance that waits for room that is being made.
func (l *life) await(why string, r schedule.Request) {
	l.refused = true
	for _, other := range r.Spec.AffinityVMs {
		l.waitFor(other)
	}
	l.awaits = l.awaits || l.why == ""
	l.miss(why)
}

// report proposes the refusal when it changed, not too often.
func (l *life) report() {
	old, b := l.vm.Refusal, l.book
	if l.missing == 0 {
		if old != nil {
			l.emit(&state.RefuseVM{Name: l.vm.Name, UID: l.vm.UID})
		}
		b.reported = old != nil
		return
	}
	every := int64(reportEveryMS)
	if old != nil {
		if l.why == "" {
			l.why = old.Summary // not asked again yet
		}
		if old.Missing == l.missing {
			if old.Summary == l.why {
				return
			}
			every = rewordEveryMS
		}
	}
	if b.reported && l.now < b.reportMS+every {
		l.wakeAt(l.vm.Name, b.reportMS+every)
		return
	}
	if l.emit(&state.RefuseVM{Name: l.vm.Name, UID: l.vm.UID, Missing: l.missing, Summary: l.why}) {
		b.reported, b.reportMS, b.awaited = true, l.now, l.awaits
	}
}
