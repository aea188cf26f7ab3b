package sim

// Sometimes is what must have happened in some of many runs of profile swarm, or
// they prove little: every fault, every state of an instance, every branch that
// is taken only when something goes wrong. It names what Result.Coverage counts.
func Sometimes() []string {
	out := []string{
		"leader", "snapshot written", "snapshot sent", "snapshot installed", "log repaired", "write interrupted", "process ended by its disk", "damaged log refused",
		"leader's process gone", "told that it was removed", "message lost", "message repeated",
		"fence", "watchdog kill", "former member's ended", "guest start", "start fails", "start slow", "start too late", "hypervisor dies at once", "guest never answers", "stop hangs",
		"kill failed", "list failed", "change told late",
		"acknowledged", "acknowledged after a retry", "client sends twice", "gave up", "linearizable read", "linearizable history",
		"join", "removal", "replacement", "vote crash", "paused in a start", "second scheduler taken", "second scheduler refused",
		"instance Pending", "instance Preparing", "instance Starting", "instance Running", "instance Stopping", "instance Stopped", "instance Failed", "instance Lost",
	}
	for i := range kinds {
		if kinds[i].do != nil {
			out = append(out, kinds[i].name)
		}
	}
	return out
}
