package replica_test

import (
	"container/heap"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
)

// world is a whole cluster in one goroutine: machines with a replica, a disk
// and an agent each, a network, clients and an operator, all driven from one
// heap of events ordered by true time and, at equal times, by when they were
// planned. Every choice comes from one seeded source, so that a seed is a story.
//
// A violation of an invariant panics; play turns that into an error.
type world struct {
	seed uint64
	opt  options
	rng  *rand.Rand
	now  int64 // true time in milliseconds; nobody in the world knows it
	seq  uint64
	heap events

	machines []*machine
	net      *network
	clients  []*client
	operator *operator
	faults   *faults
	check    *checker

	count map[string]int // how often things happened that must happen sometimes
	hash  hash64
	lines []string // the newest
	steps int
}

type hash64 interface {
	Write(p []byte) (int, error)
	Sum64() uint64
}

const (
	keptLines = 60
	tickMS    = 100
	electionT = 10
	leaseMS   = 5000
	marginMS  = 1000
	beatMS    = 1000
)

// options are what a seed switches on: whole classes of faults are there or
// not, so that a rare one is not always drowned by the others.
type options struct {
	Machines, MaxVoters, Clients      int
	FaultsMS                          int64 // how long things go wrong
	LossPct, DupPct                   int
	DelayMS                           int64
	SnapshotEntries, TrailingEntries  uint64
	SyncMS                            int64
	DriftPermille                     int64
	Kill, PowerCut, Blackout, DiskErr bool
	Partition, OneWay, Pause          bool
	SlowDisk, WallJump, GuestCrash    bool
	VoteCrash                         bool // voters lose power right after voting
	Members                           bool
	FaultEveryMS                      int64
}

func randomOptions(r *rand.Rand) options {
	pick := func(all ...int64) int64 { return all[r.IntN(len(all))] }
	coin := func(pct int) bool { return r.IntN(100) < pct }
	return options{
		Machines: int(pick(3, 3, 5)), MaxVoters: int(pick(3, 5, 5)), Clients: 3, FaultsMS: pick(15_000, 25_000, 40_000),
		LossPct: int(pick(0, 0, 2, 10, 25)), DupPct: int(pick(0, 0, 5, 25)), DelayMS: pick(2, 10, 60, 250),
		SnapshotEntries: uint64(pick(15, 60, 1000)), TrailingEntries: uint64(pick(0, 5, 40)), SyncMS: pick(0, 2, 10),
		DriftPermille: pick(0, 30, 80),
		Kill:          coin(60), PowerCut: coin(60), Blackout: coin(25), DiskErr: coin(25),
		Partition: coin(60), OneWay: coin(40), Pause: coin(50), SlowDisk: coin(30), WallJump: coin(25), GuestCrash: coin(40),
		VoteCrash: coin(25), Members: coin(50), FaultEveryMS: pick(300, 1000, 3000),
	}
}

func newWorld(seed uint64) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), hash: fnv.New64a(), count: map[string]int{}}
	w.opt = randomOptions(w.rng)
	w.net = &network{w: w, cut: map[link]bool{}}
	w.check = newChecker(w)
	for i := range w.opt.Machines {
		w.machines = append(w.machines, newMachine(w, i))
	}
	w.operator = &operator{w: w}
	for i := range w.opt.Clients {
		w.clients = append(w.clients, newClient(w, i))
	}
	w.faults = &faults{w: w}
	return w
}

func controlConfig() control.Config {
	return control.Config{HeartbeatMS: beatMS, LeaseMS: leaseMS, MarginMS: marginMS}
}

// run plays the whole story: a cluster comes up, things go wrong, they stop
// going wrong, and all must come to rest.
func (w *world) run() {
	w.say("options %+v", w.opt)
	w.operator.found()
	w.until(func() bool { return w.operator.ready }, 30_000, "the cluster does not come up", func() string { return "" })
	for _, c := range w.clients {
		c.next()
	}
	w.faults.begin()
	if w.opt.Members {
		w.operator.begin()
	}
	end := w.now + w.opt.FaultsMS
	w.until(func() bool { return w.now >= end }, w.opt.FaultsMS+1, "time stands still", func() string { return "" })
	w.faults.end()
	w.operator.stop()
	for _, c := range w.clients {
		c.stop()
	}
	var why string
	w.until(func() bool { why = w.check.leaderless(); return why == "" }, 10_000, "no leader after the faults", func() string { return why })
	w.until(func() bool { why = w.check.unsettled(); return why == "" }, 60_000, "the cluster does not come to rest", func() string { return why })
	w.check.equal()
}

// until runs events until done, which is asked every tenth of a second.
func (w *world) until(done func() bool, boundMS int64, what string, why func() string) {
	bound, ask := w.now+boundMS, w.now
	for {
		if w.now >= ask {
			if done() {
				return
			}
			ask = w.now + 100
		}
		if w.now >= bound {
			w.violated("%s within %d ms: %s", what, boundMS, why())
		}
		w.step(ask)
	}
}

// step runs the next event, or lets time pass until limit if there is none.
func (w *world) step(limit int64) {
	if len(w.heap) == 0 || w.heap[0].at > limit {
		w.now = limit
		return
	}
	e := heap.Pop(&w.heap).(event)
	w.now = e.at
	w.steps++
	e.do()
	w.check.after()
}

// after plans an event.
func (w *world) after(delayMS int64, do func()) {
	w.seq++
	heap.Push(&w.heap, event{w.now + max(delayMS, 0), w.seq, do})
}

type event struct {
	at  int64
	seq uint64
	do  func()
}

type events []event

func (h events) Len() int { return len(h) }
func (h events) Less(a, b int) bool {
	return h[a].at < h[b].at || h[a].at == h[b].at && h[a].seq < h[b].seq
}
func (h events) Swap(a, b int) { h[a], h[b] = h[b], h[a] }
func (h *events) Push(x any)   { *h = append(*h, x.(event)) }
func (h *events) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

// say notes a line of the trace.
func (w *world) say(format string, args ...any) {
	line := fmt.Sprintf("%8d ", w.now) + fmt.Sprintf(format, args...)
	w.mix(line)
	if len(w.lines) == keptLines {
		w.lines = append(w.lines[:0], w.lines[1:]...)
	}
	w.lines = append(w.lines, line)
}

// mix adds to the trace's hash what is too frequent for a line.
func (w *world) mix(s string) {
	if _, err := w.hash.Write([]byte(s)); err != nil {
		panic(err)
	}
}

func (w *world) mixNumbers(numbers ...uint64) {
	var b [8]byte
	for _, n := range numbers {
		for k := range b {
			b[k] = byte(n >> (8 * k))
		}
		w.mix(string(b[:]))
	}
}

// violation is an invariant that does not hold.
type violation struct{ what string }

func (v violation) Error() string { return v.what }

func (w *world) violated(format string, args ...any) {
	panic(violation{fmt.Sprintf(format, args...)})
}

func (w *world) chance(pct int) bool { return w.rng.IntN(100) < pct }

// between is a number from lo to hi, both included.
func (w *world) between(lo, hi int64) int64 { return lo + w.rng.Int64N(hi-lo+1) }

// byRaftID is the machine that is that member now, nil if none is.
func (w *world) byRaftID(id uint64) *machine {
	for _, m := range w.machines {
		if m.raftID == id {
			return m
		}
	}
	return nil
}

// anyServer is one of the servers that are up, nil if none is.
func (w *world) anyServer() *server {
	var up []*server
	for _, m := range w.machines {
		if m.srv != nil {
			up = append(up, m.srv)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return up[w.rng.IntN(len(up))]
}

func (w *world) machine(name blixard.NodeName) *machine {
	for _, m := range w.machines {
		if m.name == name {
			return m
		}
	}
	return nil
}

// ruler is the machine whose replica rules in the highest term, nil if none.
func (w *world) ruler() *machine {
	var best *machine
	for _, m := range w.machines {
		if m.srv != nil && m.srv.r.Leads() && (best == nil || m.srv.r.Term() > best.srv.r.Term()) {
			best = m
		}
	}
	return best
}

func (w *world) trace() string { return strings.Join(w.lines, "\n") }
