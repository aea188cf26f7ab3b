package dispatch

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

const (
	// keptReports of a function's invocations are kept on a node.
	keptReports = 128
	// exportedFunctions bounds the values of the label "function".
	exportedFunctions = 1000
	minutes           = 60
)

// startKinds are those of InvocationReport.Start, in the order in which they are
// counted.
func startKinds() [4]blixard.StartKind {
	return [4]blixard.StartKind{blixard.StartWarm, blixard.StartPooled, blixard.StartRestored, blixard.StartBooted}
}

func kindIndex(k blixard.StartKind) int {
	kinds := startKinds()
	return max(0, slices.Index(kinds[:], k))
}

// bounds of the histograms' buckets.
func bounds() []time.Duration {
	return []time.Duration{
		time.Millisecond / 2, time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
		50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond,
		5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute, 5 * time.Minute, 15 * time.Minute,
	}
}

type histogram struct {
	counts [19]uint64
	count  uint64
	sum    time.Duration
}

func (h *histogram) add(bounds []time.Duration, d time.Duration) {
	i, _ := slices.BinarySearch(bounds, d)
	h.counts[i]++
	h.count++
	h.sum += d
}

func (h *histogram) metric(desc *prometheus.Desc, bounds []time.Duration, labels ...string) prometheus.Metric {
	buckets, total := make(map[float64]uint64, len(bounds)), uint64(0)
	for i, b := range bounds {
		total += h.counts[i]
		buckets[b.Seconds()] = total
	}
	return prometheus.MustNewConstHistogram(desc, h.count, h.sum.Seconds(), buckets, labels...)
}

// functionStats counts what a function does on this node.
type functionStats struct {
	name                                      blixard.FunctionName
	bounds                                    []time.Duration
	throttles, restoreFailures, startFailures atomic.Int64

	mu       sync.Mutex
	starts   [4]int64
	errors   int64
	timeouts int64
	lost     int64 // ended with neither answer nor error of the function
	duration histogram
	cold     histogram
	warmSum  blixard.Breakdown
	coldSum  blixard.Breakdown
	minute   [minutes]minuteCount
	recent   []Recent
	next     int
}

type minuteCount struct {
	minute                    int64
	invocations, errors, cold int64
}

// Recent is one of the last invocations.
type Recent struct {
	TimeMS    int64             `json:"time_ms"`
	RequestID string            `json:"request_id"`
	Number    int               `json:"number"`
	Node      blixard.NodeName  `json:"node"`
	Instance  string            `json:"instance"`
	Start     blixard.StartKind `json:"start"`
	Error     string            `json:"error,omitempty"`
	UsedMiB   int64             `json:"used_mib"`
	Parts     blixard.Breakdown `json:"parts"` // nanoseconds
}

// ended counts an invocation that a guest had.
func (s *functionStats) ended(r *blixard.InvocationReport, err error) {
	now := time.Now()
	one := Recent{TimeMS: now.UnixMilli(), RequestID: r.RequestID, Number: r.Number, Node: r.Node, Instance: r.Instance, Start: r.Start, UsedMiB: r.UsedMiB, Parts: r.Parts}
	failed := r.Error != nil || err != nil
	switch {
	case r.Error != nil:
		one.Error = r.Error.Type
	case err != nil:
		one.Error = err.Error()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.starts[kindIndex(r.Start)]++
	s.duration.add(s.bounds, r.Parts.Handler)
	m := &s.minute[now.Unix()/60%minutes]
	if at := now.Unix() / 60; m.minute != at {
		*m = minuteCount{minute: at}
	}
	m.invocations++
	if failed {
		m.errors++
		switch {
		case err != nil:
			s.lost++
		case r.Error.Type == "Sandbox.Timedout":
			s.timeouts++
			s.errors++
		default:
			s.errors++
		}
	}
	if r.Start.Cold() {
		m.cold++
		s.cold.add(s.bounds, r.Parts.Queue+r.Parts.Commit+r.Parts.Spawn+r.Parts.Restore+r.Parts.Boot+r.Parts.Init)
		sum(&s.coldSum, &r.Parts)
	} else {
		sum(&s.warmSum, &r.Parts)
	}
	if len(s.recent) < keptReports {
		s.recent = append(s.recent, one)
	} else {
		s.recent[s.next%keptReports] = one
	}
	s.next++
}

func sum(to, from *blixard.Breakdown) {
	to.Queue += from.Queue
	to.Place += from.Place
	to.Commit += from.Commit
	to.Spawn += from.Spawn
	to.Restore += from.Restore
	to.Boot += from.Boot
	to.Init += from.Init
	to.Handler += from.Handler
	to.Transfer += from.Transfer
	to.Total += from.Total
}

// FunctionMetrics are a function's numbers, of one node or of several together.
// Sums are nanoseconds: with the counts beside them they give averages, also
// after an Add.
type FunctionMetrics struct {
	Function        blixard.FunctionName `json:"function"`
	Warm            int64                `json:"warm"` // invocations, by how their instance came to be
	Pooled          int64                `json:"pooled"`
	Restored        int64                `json:"restored"`
	Booted          int64                `json:"booted"`
	Errors          int64                `json:"errors"` // of the function, timeouts included
	Timeouts        int64                `json:"timeouts"`
	Lost            int64                `json:"lost"` // ended with neither answer nor error of the function
	Throttles       int64                `json:"throttles"`
	RestoreFailures int64                `json:"restore_failures"`
	StartFailures   int64                `json:"start_failures"`
	HourInvocations int64                `json:"hour_invocations"` // of the last hour
	HourErrors      int64                `json:"hour_errors"`
	HourCold        int64                `json:"hour_cold"`
	HandlerSum      time.Duration        `json:"handler_sum"` // of all invocations
	StartSum        time.Duration        `json:"start_sum"`   // of all cold starts: until the call was handed over
	WarmParts       blixard.Breakdown    `json:"warm_parts"`  // sums, of warm invocations
	ColdParts       blixard.Breakdown    `json:"cold_parts"`  // sums, of others
	Instances       int                  `json:"instances"`
	Idle            int                  `json:"idle"`
	Busy            int                  `json:"busy"` // calls
	Pool            int                  `json:"pool"` // spawned ahead
	SlotsLeased     int                  `json:"slots_leased"`
	Recent          []Recent             `json:"recent,omitempty"` // oldest first
}

// Invocations is how many there were.
func (m *FunctionMetrics) Invocations() int64 { return m.Warm + m.Cold() }

// Cold is how many invocations had to wait for a start.
func (m *FunctionMetrics) Cold() int64 { return m.Pooled + m.Restored + m.Booted }

// Add takes another node's numbers in.
func (m *FunctionMetrics) Add(o *FunctionMetrics) {
	m.Warm, m.Pooled, m.Restored, m.Booted = m.Warm+o.Warm, m.Pooled+o.Pooled, m.Restored+o.Restored, m.Booted+o.Booted
	m.Errors, m.Timeouts, m.Lost, m.Throttles = m.Errors+o.Errors, m.Timeouts+o.Timeouts, m.Lost+o.Lost, m.Throttles+o.Throttles
	m.RestoreFailures, m.StartFailures = m.RestoreFailures+o.RestoreFailures, m.StartFailures+o.StartFailures
	m.HourInvocations, m.HourErrors, m.HourCold = m.HourInvocations+o.HourInvocations, m.HourErrors+o.HourErrors, m.HourCold+o.HourCold
	m.HandlerSum, m.StartSum = m.HandlerSum+o.HandlerSum, m.StartSum+o.StartSum
	sum(&m.WarmParts, &o.WarmParts)
	sum(&m.ColdParts, &o.ColdParts)
	m.Instances, m.Idle, m.Busy, m.Pool, m.SlotsLeased = m.Instances+o.Instances, m.Idle+o.Idle, m.Busy+o.Busy, m.Pool+o.Pool, m.SlotsLeased+o.SlotsLeased
	m.Recent = append(m.Recent, o.Recent...)
	slices.SortStableFunc(m.Recent, func(a, b Recent) int { return int(a.TimeMS - b.TimeMS) })
}

func (s *functionStats) snapshot() FunctionMetrics {
	m := FunctionMetrics{Function: s.name, Throttles: s.throttles.Load(), RestoreFailures: s.restoreFailures.Load(), StartFailures: s.startFailures.Load()}
	s.mu.Lock()
	defer s.mu.Unlock()
	m.Warm, m.Pooled, m.Restored, m.Booted = s.starts[0], s.starts[1], s.starts[2], s.starts[3]
	m.Errors, m.Timeouts, m.Lost = s.errors, s.timeouts, s.lost
	m.HandlerSum, m.StartSum, m.WarmParts, m.ColdParts = s.duration.sum, s.cold.sum, s.warmSum, s.coldSum
	now := time.Now().Unix() / 60
	for _, c := range s.minute {
		if now-c.minute < minutes {
			m.HourInvocations, m.HourErrors, m.HourCold = m.HourInvocations+c.invocations, m.HourErrors+c.errors, m.HourCold+c.cold
		}
	}
	from := max(0, s.next-keptReports)
	for i := from; i < s.next; i++ {
		m.Recent = append(m.Recent, s.recent[i%keptReports])
	}
	return m
}

// Metrics are this node's numbers of a function.
func (d *Dispatcher) Metrics(name blixard.FunctionName) (FunctionMetrics, bool) {
	d.mu.Lock()
	f := d.functions[name]
	var report route.FunctionReport
	for _, r := range d.node.Report() {
		if r.Function == name {
			report = r
		}
	}
	d.mu.Unlock()
	if f == nil {
		return FunctionMetrics{Function: name}, false
	}
	m := f.stats.snapshot()
	m.SlotsLeased = report.Leased
	for _, r := range report.Revisions {
		m.Instances, m.Idle, m.Busy, m.Pool = m.Instances+r.Instances, m.Idle+r.Idle, m.Busy+r.Busy, m.Pool+r.Pooled
	}
	return m, true
}

func (d *Dispatcher) stats(in *instance) *functionStats { return in.v.f.stats }

// throttled counts a refusal.
func (d *Dispatcher) throttled(rev route.Revision, why route.Refusal) {
	if why != route.NoSlot && why != route.NoMemory && why != route.Busy {
		return
	}
	d.mu.Lock()
	f := d.functions[rev.Function]
	d.mu.Unlock()
	if f != nil && f.stats.throttles.Add(1)&63 == 1 { // a crowd of them is one piece of news
		d.tell(rev, "throttle", "", string(why))
	}
}

// metrics is the prometheus.Collector of a dispatcher.
type metrics struct {
	d      *Dispatcher
	bounds []time.Duration

	invocations, errors, throttles, failures, duration, cold, instances, slots, templates, memory *prometheus.Desc

	mu  sync.Mutex
	all map[blixard.FunctionName]*functionStats
}

func newMetrics(d *Dispatcher) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("blixard_function_"+name, help, labels, nil)
	}
	return &metrics{
		d: d, bounds: bounds(), all: map[blixard.FunctionName]*functionStats{},
		invocations: desc("invocations_total", "Invocations that a guest had, by how its instance came to be.", "function", "start"),
		errors:      desc("errors_total", "Invocations that failed: error of the function, timeout, lost with the instance.", "function", "kind"),
		throttles:   desc("throttles_total", "Calls that this node had no room for.", "function"),
		failures:    desc("start_failures_total", "Starts that failed; restore: an instance was booted instead.", "function", "kind"),
		duration:    desc("duration_seconds", "What handlers took.", "function"),
		cold:        desc("cold_start_seconds", "From when a call was offered to when a new instance had it.", "function"),
		instances:   desc("instances", "Instances on this node.", "function", "state"),
		slots:       desc("slots", "Executions leased to this node.", "function", "state"),
		templates:   desc("templates_bytes", "What templates take of the disk."),
		memory:      desc("memory_mib", "Memory that instances count against the budget.", "kind"),
	}
}

func (m *metrics) stats(name blixard.FunctionName) *functionStats {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.all[name]
	if s == nil {
		s = &functionStats{name: name, bounds: m.bounds}
		m.all[name] = s
	}
	return s
}

func (m *metrics) drop(name blixard.FunctionName) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.all, name)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.invocations, m.errors, m.throttles, m.failures, m.duration, m.cold, m.instances, m.slots, m.templates, m.memory} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	m.mu.Lock()
	all := make([]*functionStats, 0, len(m.all))
	for _, s := range m.all { //order:any bounded below by name
		all = append(all, s)
	}
	m.mu.Unlock()
	slices.SortFunc(all, func(a, b *functionStats) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	for _, s := range all[:min(len(all), exportedFunctions)] {
		m.collect(out, s)
	}
	m.d.mu.Lock()
	reports := m.d.node.Report()
	used, budget := m.d.node.Memory()
	m.d.mu.Unlock()
	gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, labels...)
	}
	for _, f := range reports[:min(len(reports), exportedFunctions)] {
		ready, starting, pooled := 0, 0, 0
		for _, r := range f.Revisions {
			ready, starting, pooled = ready+r.Ready, starting+r.Starting, pooled+r.Pooled
		}
		name := string(f.Function)
		gauge(m.instances, float64(ready), name, "ready")
		gauge(m.instances, float64(starting), name, "starting")
		gauge(m.instances, float64(pooled), name, "pooled")
		gauge(m.slots, float64(f.Leased), name, "leased")
		gauge(m.slots, float64(f.Used), name, "used")
	}
	gauge(m.templates, float64(m.d.templates.total()))
	gauge(m.memory, float64(used), "used")
	gauge(m.memory, float64(budget), "budget")
}

func (m *metrics) collect(out chan<- prometheus.Metric, s *functionStats) {
	name := string(s.name)
	count := func(desc *prometheus.Desc, v int64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), append([]string{name}, labels...)...)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, kind := range startKinds() {
		count(m.invocations, s.starts[i], string(kind))
	}
	count(m.errors, s.errors-s.timeouts, "function")
	count(m.errors, s.timeouts, "timeout")
	count(m.errors, s.lost, "lost")
	count(m.throttles, s.throttles.Load())
	count(m.failures, s.restoreFailures.Load(), "restore")
	count(m.failures, s.startFailures.Load(), "start")
	out <- s.duration.metric(m.duration, s.bounds, name)
	out <- s.cold.metric(m.cold, s.bounds, name)
}

func (t *templates) total() (bytes int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, one := range t.all { //order:any a sum
		bytes += one.bytes
	}
	return bytes
}
