package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
)

// Metrics are the gateway's; the wiring registers them.
type Metrics struct {
	calls    *prometheus.CounterVec   // start, result
	refusals *prometheus.CounterVec   // reason
	seconds  *prometheus.HistogramVec // start
	forwards prometheus.Counter
	left     prometheus.Counter
	async    *prometheus.CounterVec // result
	waiting  prometheus.Gauge

	// What every call needs, looked up once.
	answers map[blixard.StartKind]*startMetrics
}

type startMetrics struct {
	answered, failed prometheus.Counter
	seconds          prometheus.Observer
}

// NewMetrics makes metrics that count nothing yet.
func NewMetrics() *Metrics {
	m := &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "blixard_gateway_invocations_total", Help: "Invocations that reached a function, by how its instance started and whether the function failed.",
		}, []string{"start", "result"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "blixard_gateway_refusals_total", Help: "Invocations that no function answered."}, []string{"reason"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "blixard_gateway_invocation_seconds", Help: "Time from request to answer, by how the instance started.", Buckets: prometheus.ExponentialBuckets(0.0002, 2.5, 14),
		}, []string{"start"}),
		forwards: prometheus.NewCounter(prometheus.CounterOpts{Name: "blixard_gateway_forwards_total", Help: "Invocations that were offered to another node."}),
		left:     prometheus.NewCounter(prometheus.CounterOpts{Name: "blixard_gateway_clients_left_total", Help: "Answers whose client had left."}),
		async: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "blixard_gateway_async_total", Help: "Asynchronous invocations: accepted, and what became of attempts (success, retry, dead).",
		}, []string{"result"}),
		waiting: prometheus.NewGauge(prometheus.GaugeOpts{Name: "blixard_gateway_async_events", Help: "Asynchronous invocations that this node owns."}),
		answers: map[blixard.StartKind]*startMetrics{},
	}
	for _, k := range []blixard.StartKind{blixard.StartWarm, blixard.StartPooled, blixard.StartRestored, blixard.StartBooted} {
		m.answers[k] = &startMetrics{m.calls.WithLabelValues(string(k), "ok"), m.calls.WithLabelValues(string(k), "error"), m.seconds.WithLabelValues(string(k))}
	}
	return m
}

func (m *Metrics) answered(r *blixard.InvocationReport) {
	s := m.answers[r.Start]
	if s == nil {
		s = m.answers[blixard.StartWarm]
	}
	if r.Error != nil {
		s.failed.Inc()
	} else {
		s.answered.Inc()
	}
	s.seconds.Observe(float64(r.Parts.Total) / float64(time.Second))
}

func (m *Metrics) refused(e *Error) { m.refusals.WithLabelValues(e.Reason).Inc() }

func (m *Metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.calls, m.refusals, m.seconds, m.forwards, m.left, m.async, m.waiting}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(out chan<- *prometheus.Desc) {
	for _, c := range m.all() {
		c.Describe(out)
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(out chan<- prometheus.Metric) {
	for _, c := range m.all() {
		c.Collect(out)
	}
}
