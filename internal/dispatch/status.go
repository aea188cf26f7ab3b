package dispatch

import (
	"time"

	"github.com/blixard/blixard"
)

// NodeStatus is what a node has for functions.
type NodeStatus struct {
	Node      blixard.NodeName `json:"node"`
	TimeMS    int64            `json:"time_ms"`
	UsedMiB   int64            `json:"used_mib"`
	BudgetMiB int64            `json:"budget_mib"`
	Functions []VersionStatus  `json:"functions"` // in order of names, numbers and age
}

// VersionStatus is what a node has of a version.
type VersionStatus struct {
	Function blixard.FunctionName `json:"function"`
	UID      uint64               `json:"uid"`
	Number   int                  `json:"number"`
	Seq      uint64               `json:"seq"`
	// Instances were started and are not gone yet; Idle of them are ready and run
	// no call.
	Instances int `json:"instances"`
	Idle      int `json:"idle"`
	// Warm calls would be taken at once: an instance and a slot are free.
	Warm     int  `json:"warm"`
	Busy     int  `json:"busy"` // calls
	Starting int  `json:"starting"`
	Waiting  int  `json:"waiting"` // calls
	Pooled   int  `json:"pooled"`  // clones spawned ahead
	Retired  bool `json:"retired"`
	// Of the function, of all its versions together.
	SlotsLeased int `json:"slots_leased"`
	SlotsFree   int `json:"slots_free"`

	Template     string `json:"template,omitempty"` // key; "" when none is wanted
	TemplateHere string `json:"template_here"`      // none, fetching, building, ready, failed
	Failure      string `json:"failure,omitempty"`  // why the last start failed, while none has succeeded since
}

// HasTemplate tells whether instances are clones.
func (s *VersionStatus) HasTemplate() bool { return s.TemplateHere == string(templateReady) }

// Status tells what there is now. It costs a look at all instances.
func (d *Dispatcher) Status() NodeStatus {
	s := NodeStatus{Node: d.o.Node, TimeMS: time.Now().UnixMilli()}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.UsedMiB, s.BudgetMiB = d.node.Memory()
	for _, f := range d.node.Report() {
		free := max(0, f.Leased-f.Used)
		for _, r := range f.Revisions {
			v := VersionStatus{
				Function: f.Function, UID: r.Revision.UID, Number: r.Revision.Number, Seq: r.Revision.Seq, Instances: r.Instances, Idle: r.Idle,
				Warm: min(r.Free, free), Busy: r.Busy, Starting: r.Starting, Waiting: r.Waiting, Pooled: r.Pooled, Retired: r.Retired,
				SlotsLeased: f.Leased, SlotsFree: free, TemplateHere: string(templateNone),
			}
			if known := d.versions[r.Revision]; known != nil {
				if known.template != nil {
					v.Template, v.TemplateHere = known.template.key, string(d.templates.state(known.template))
				}
				if r.Failures > 0 {
					v.Failure = known.failure
				}
			}
			s.Functions = append(s.Functions, v)
		}
	}
	return s
}

// Guarded tells whether there is anything here that must not outlast the node's
// lease: slots, instances, or calls.
func (d *Dispatcher) Guarded() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.instances) > 0 || len(d.calls) > 0 {
		return true
	}
	for _, f := range d.node.Report() {
		if f.Leased > 0 {
			return true
		}
	}
	return false
}
