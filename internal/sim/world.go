package sim

import (
	"crypto/rand"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"runtime/debug"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/control"
)

// world is a whole cluster. Every choice made while it plays comes from seeded
// sources: one for the world, one for each client, so that a fault taken away
// does not change what clients do.
type world struct {
	s     *Schedule
	k     *Knobs
	rng   *mathrand.Rand
	now   int64 // true time in milliseconds; nobody in the world knows it
	seq   uint64
	queue queue

	machines []*machine
	net      *network
	clients  []*client
	sharers  *sharers
	watchers *watchers
	operator *operator
	faults   *faults
	check    *checker

	functions *functions

	// pace is how much slower clients are while nothing goes wrong, 1 for not.
	pace int64

	count  map[string]int // how often things happened that must happen sometimes
	hash   uint64
	lines  []string // the newest, a ring
	line   int
	trace  io.Writer
	events uint64
}

const keptLines = 60

// Run plays the whole story: a cluster comes up, things go wrong and stop going
// wrong, again and again, and in the end all must come to rest.
func Run(o Options) Result {
	s, err := Plan(o)
	res := Result{Seed: s.Seed, Profile: s.Profile, Options: s.Knobs.String()}
	if err != nil {
		res.Violation = &Violation{Invariant: "options", Detail: err.Error()}
		return res
	}
	former := rand.Reader
	rand.Reader = mathrand.NewChaCha8([32]byte{byte(s.Seed), byte(s.Seed >> 8), byte(s.Seed >> 16), byte(s.Seed >> 24), byte(s.Seed >> 32), byte(s.Seed >> 40), byte(s.Seed >> 48), byte(s.Seed >> 56)})
	defer func() { rand.Reader = former }()
	defer debug.SetGCPercent(debug.SetGCPercent(800)) // a world is small, and makes much garbage
	w := newWorld(&s, o.Trace)
	res.Violation = w.play()
	res.OK, res.TraceHash, res.Events, res.VirtualMS, res.Coverage = res.Violation == nil, fmt.Sprintf("%016x", w.hash), w.events, w.now, w.count
	return res
}

func newWorld(s *Schedule, trace io.Writer) *world {
	w := &world{s: s, k: &s.Knobs, rng: mathrand.New(mathrand.NewPCG(s.Seed, 2)), hash: 14695981039346656037, count: map[string]int{}, trace: trace, pace: 1}
	w.net = newNetwork(w)
	w.check = newChecker(w)
	w.functions = newFunctions(w)
	for i := range w.k.Nodes {
		w.machines = append(w.machines, newMachine(w, i))
	}
	w.operator = &operator{w: w}
	for i := range w.k.Clients {
		w.clients = append(w.clients, newClient(w, i))
	}
	w.sharers = newSharers(w)
	w.watchers = newWatchers(w)
	w.faults = &faults{w: w}
	return w
}

// violated is what ends a run.
type violated struct{ v *Violation }

// play runs the story. A panic is a finding like any other.
func (w *world) play() (v *Violation) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case violated:
			v = p.v
		default:
			v = &Violation{Invariant: "no panic", Detail: fmt.Sprintf("%v\n%s", p, debug.Stack()), AtMS: w.now, Trace: w.newest()}
		}
	}()
	w.say("knobs %s", w.k)
	w.run()
	return nil
}

func (w *world) run() {
	w.operator.found()
	w.until(func() bool { return w.operator.ready }, 60_000, "L1 the cluster comes up", func() string { return "it does not" })
	for _, c := range w.clients {
		c.next()
	}
	w.sharers.begin()
	w.watchers.begin()
	w.functions.begin()
	began := w.now
	for i := range w.s.Faults {
		f := &w.s.Faults[i]
		if f.Kind != mendKind {
			w.after(began+f.AtMS-w.now, func() { w.faults.happen(f) })
			continue
		}
		w.pass(began + f.AtMS - w.now)
		w.quiet(true)
		w.rest()
		w.sharers.linearizable()
		w.quiet(false)
	}
	w.pass(began + w.s.DurationMS - w.now)
	w.quiet(true)
	w.rest()
	if w.anyDead() { // without them all came to rest; now some are back
		w.resurrect()
		w.pass(25_000)
		w.rest()
	}
	w.check.equal()
	w.sharers.linearizable()
}

// pass lets time pass.
func (w *world) pass(ms int64) {
	for end := w.now + ms; w.now < end; {
		w.step(end)
	}
}

// quietPace has little happen where little is to be found.
const quietPace = 20

// quiet ends what goes wrong and has clients begin nothing, or go on.
func (w *world) quiet(on bool) {
	w.faults.over, w.sharers.stopped = on, on
	if on {
		w.faults.mend()
	}
	for _, c := range w.clients {
		c.stopped = on
		if !on {
			c.next()
		}
	}
	if !on {
		w.resurrect()
		w.pace, w.net.delayMS = quietPace, w.k.DelayMS
		w.sharers.begin()
	}
	w.functions.setQuiet(on)
}

// Bounds of liveness, once nothing goes wrong any more.
const (
	leaderMS = 5000
	// restMS lets instances that kept failing wait out their back-off, which has
	// grown up to a minute. Where only the network was cut, nothing has failed.
	restMS   = 90_000
	healedMS = 30_000
	// deadMS is added where a machine is lost for good: a voter is given a minute
	// to come back before another one takes its place, and so is the next.
	deadMS = 90_000
)

// rest has everything come to rest.
func (w *world) rest() {
	var why string
	w.until(func() bool { why = w.check.leaderless(); return why == "" }, leaderMS, "L1 a leader that all follow", func() string { return why })
	bound := int64(restMS)
	if w.s.Profile == ProfilePartition {
		bound = healedMS
	}
	if w.anyDead() {
		bound += deadMS
	}
	w.until(func() bool { why = w.check.unsettled(); return why == "" }, bound, "L2 everything as wanted", func() string { return why })
	w.say("all is as wanted")
}

// until runs events until done, which is asked every tenth of a second.
func (w *world) until(done func() bool, boundMS int64, invariant string, why func() string) {
	bound, ask := w.now+boundMS, w.now
	for {
		if w.now >= ask {
			if done() {
				return
			}
			ask = w.now + 100
		}
		if w.now >= bound {
			w.violated(invariant, "after %d ms: %s", boundMS, why())
		}
		w.step(ask)
	}
}

// step runs the next event, or lets time pass until limit if there is none.
func (w *world) step(limit int64) {
	if len(w.queue) == 0 || w.queue[0].at > limit {
		w.now = limit
		return
	}
	e := w.queue.pop()
	w.now = e.at
	w.events++
	e.do()
}

// after plans an event.
func (w *world) after(delayMS int64, do func()) {
	w.seq++
	w.queue.push(event{w.now + max(delayMS, 0), w.seq, do})
}

type event struct {
	at  int64
	seq uint64
	do  func()
}

func (e event) before(o event) bool { return e.at < o.at || e.at == o.at && e.seq < o.seq }

// queue is a heap of events, the next one first.
type queue []event

func (q *queue) push(e event) {
	h := append(*q, e)
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !e.before(h[up]) {
			break
		}
		h[i] = h[up]
		i = up
	}
	h[i] = e
	*q = h
}

func (q *queue) pop() event {
	h := *q
	top, last := h[0], h[len(h)-1]
	h[len(h)-1] = event{}
	h = h[:len(h)-1]
	*q = h
	if len(h) == 0 {
		return top
	}
	i := 0
	for {
		down := 2*i + 1
		if down >= len(h) {
			break
		}
		if down+1 < len(h) && h[down+1].before(h[down]) {
			down++
		}
		if !h[down].before(last) {
			break
		}
		h[i] = h[down]
		i = down
	}
	h[i] = last
	return top
}

// say notes a line of the trace.
func (w *world) say(format string, args ...any) {
	line := fmt.Sprintf("%9d ", w.now) + fmt.Sprintf(format, args...)
	for i := range len(line) {
		w.hash = (w.hash ^ uint64(line[i])) * 1099511628211
	}
	if len(w.lines) < keptLines {
		w.lines = append(w.lines, line)
	} else {
		w.lines[w.line%keptLines] = line
	}
	w.line++
	if w.trace != nil {
		if _, err := io.WriteString(w.trace, line+"\n"); err != nil {
			w.trace = nil // nobody reads it any more
		}
	}
}

// newest are the kept lines, oldest first.
func (w *world) newest() []string {
	out := make([]string, 0, len(w.lines))
	for i := range w.lines {
		out = append(out, w.lines[(w.line+i)%len(w.lines)])
	}
	return out
}

// mix adds to the trace's hash what is too frequent for a line.
func (w *world) mix(numbers ...uint64) {
	h := w.hash
	for _, n := range numbers {
		h = (h ^ n) * 1099511628211
		h ^= h >> 29
	}
	w.hash = h
}

func (w *world) violated(invariant, format string, args ...any) {
	panic(violated{&Violation{Invariant: invariant, Detail: fmt.Sprintf(format, args...), AtMS: w.now, Trace: w.newest()}})
}

func (w *world) chance(pct int) bool { return pct > 0 && w.rng.IntN(100) < pct }

// between is a number from lo to hi, both included.
func (w *world) between(lo, hi int64) int64 {
	if hi <= lo {
		return lo
	}
	return lo + w.rng.Int64N(hi-lo+1)
}

func (w *world) controlConfig() control.Config {
	return control.Config{HeartbeatMS: w.k.HeartbeatMS, LeaseMS: w.k.LeaseMS, MarginMS: w.k.MarginMS}
}

// byRaftID is the machine that is that member now, nil if none is.
func (w *world) byRaftID(id uint64) *machine {
	for _, m := range w.machines {
		if m.raftID == id {
			return m
		}
	}
	return nil
}

// anyProcess is one of the processes that are up, nil if none is.
func (w *world) anyProcess(r *mathrand.Rand) *process {
	var buf [16]*process
	up := buf[:0]
	for _, m := range w.machines {
		if m.proc != nil {
			up = append(up, m.proc)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return up[r.IntN(len(up))]
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
		if m.proc != nil && m.proc.r.Leads() && (best == nil || m.proc.r.Term() > best.proc.r.Term()) {
			best = m
		}
	}
	return best
}
