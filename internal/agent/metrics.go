package agent

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the agent's; the wiring registers them.
type Metrics struct {
	actions    *prometheus.CounterVec   // kind, result
	seconds    *prometheus.HistogramVec // kind
	heartbeats *prometheus.CounterVec   // result
	reports    *prometheus.CounterVec   // result
	observed   prometheus.Counter
	instances  *prometheus.GaugeVec // phase
	plans      prometheus.Counter
	leaseUntil prometheus.Gauge
	checks     *prometheus.CounterVec // result
}

// NewMetrics makes metrics that count nothing yet.
func NewMetrics() *Metrics {
	counters := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "blixard_agent_" + name, Help: help}, []string{label})
	}
	return &Metrics{
		actions: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "blixard_agent_actions_total", Help: "Effects carried out on instances."}, []string{"kind", "result"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "blixard_agent_action_seconds", Help: "Time effects took.", Buckets: prometheus.ExponentialBuckets(0.005, 2.5, 10),
		}, []string{"kind"}),
		heartbeats: counters("heartbeats_total", "Heartbeats sent to the leader.", "result"),
		reports:    counters("reports_total", "Reports of observations sent.", "result"),
		observed:   prometheus.NewCounter(prometheus.CounterOpts{Name: "blixard_agent_observations_total", Help: "Observations acknowledged by the cluster."}),
		instances:  prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "blixard_agent_incarnations", Help: "Incarnations on this node by what the hypervisor driver sees."}, []string{"phase"}),
		plans:      prometheus.NewCounter(prometheus.CounterOpts{Name: "blixard_agent_plans_total", Help: "Passes of the reconcile loop."}),
		leaseUntil: prometheus.NewGauge(prometheus.GaugeOpts{Name: "blixard_agent_lease_until_seconds", Help: "End of the lease, in seconds since the agent began."}),
		checks:     counters("health_checks_total", "Health checks of instances.", "result"),
	}
}

func (m *Metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.actions, m.seconds, m.heartbeats, m.reports, m.observed, m.instances, m.plans, m.leaseUntil, m.checks}
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
