package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// Metrics of the consensus. A nil *Metrics measures nothing.
type Metrics struct {
	leads, term, appliedIndex, waiting  prometheus.Gauge
	proposals, entries, results         prometheus.Counter
	saveSeconds, applySeconds, snapSecs prometheus.Histogram
	nodes, vms, instances               prometheus.Gauge
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "blixard", Name: name, Help: help})
		reg.MustRegister(g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "blixard", Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "blixard", Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.00005, 2, 16)})
		reg.MustRegister(h)
		return h
	}
	return &Metrics{
		leads: gauge("raft_leader", "1 if this node leads."), term: gauge("raft_term", "The current term."),
		appliedIndex: gauge("raft_applied_index", "Index up to which the log is applied."), waiting: gauge("proposals_waiting", "Proposals that wait for their result on this node."),
		proposals: counter("proposals_total", "Proposals handed to the consensus by this node."), entries: counter("raft_entries_saved_total", "Log entries made durable."),
		results:     counter("commands_applied_total", "Commands applied."),
		saveSeconds: histogram("raft_save_seconds", "Time to make log entries durable."), applySeconds: histogram("apply_seconds", "Time to apply what one round committed."),
		snapSecs: histogram("snapshot_write_seconds", "Time to write a snapshot."),
		nodes:    gauge("nodes", "Nodes of the cluster."), vms: gauge("vms", "VMs of the cluster."), instances: gauge("instances", "Instances kept in the state."),
	}
}

func (m *Metrics) saved(d time.Duration, entries int) {
	if m != nil {
		m.saveSeconds.Observe(d.Seconds())
		m.entries.Add(float64(entries))
	}
}

func (m *Metrics) applied(d time.Duration, results int) {
	if m != nil {
		m.applySeconds.Observe(d.Seconds())
		m.results.Add(float64(results))
	}
}

func (m *Metrics) snapshot(d time.Duration) {
	if m != nil {
		m.snapSecs.Observe(d.Seconds())
	}
}

func (m *Metrics) proposed(n int) {
	if m != nil {
		m.proposals.Add(float64(n))
	}
}

func (m *Metrics) leader(leads bool, term uint64) {
	if m == nil {
		return
	}
	m.term.Set(float64(term))
	m.leads.Set(0)
	if leads {
		m.leads.Set(1)
	}
}

func (m *Metrics) progress(v *state.View, waiting int) {
	if m == nil {
		return
	}
	m.appliedIndex.Set(float64(v.Index))
	m.waiting.Set(float64(waiting))
	m.nodes.Set(float64(v.NodeCount()))
	m.vms.Set(float64(v.VMCount()))
	m.instances.Set(float64(v.InstanceCount()))
}

// PlacementCounts tells how many instances each node holds, for a collector.
func PlacementCounts(v *state.View, yield func(node blixard.NodeName, instances int)) {
	v.Nodes(func(n *blixard.Node) bool {
		yield(n.Name, v.Usage(n.Name).Instances)
		return true
	})
}
