package sim

// Sometimes is what must have happened in some of many runs of profile swarm, or
// they prove little: every fault, every state of an instance, every branch that
// is taken only when something goes wrong. It names what Result.Coverage counts.
func Sometimes() []string {
	out := []string{
		"leader", "snapshot written", "snapshot sent", "snapshot installed", "log repaired", "write interrupted", "process ended by its disk", "damaged log refused", "write astray",
		"leader's process gone", "told that it was removed", "message lost", "message repeated", "queue full",
		"fence", "watchdog kill", "former member's ended", "guest start", "start fails", "start slow", "start too late", "hypervisor dies at once", "guest never answers", "stop hangs",
		"kill failed", "list failed", "change told late",
		"machine dead", "machine back from the dead", "voter lost in a removal", "release too old", "new command taken", "new command refused", "watch resumed", "watch gone", "watched entry",
		"acknowledged", "acknowledged after a retry", "client sends twice", "gave up", "linearizable read", "linearizable history",
		"join", "removal", "replacement", "vote crash", "paused in a start", "second scheduler taken", "second scheduler refused",
		"function built", "function started", "function call answered", "function call refused: concurrency", "function call in doubt", "execution", "execution cut short",
		"function left over", "function timed out", "function hangs", "function guest dies in a call", "function start fails", "function start slow", "function kill fails",
		"function limit set", "CreateFunction", "UpdateFunction", "DeleteFunction", "slots leased", "slots short", "slots returned", "forward", "forward's answer lost",
		"event accepted", "event attempt", "event settled: success", "event settled: retry", "event dead",
		"instance Pending", "instance Preparing", "instance Starting", "instance Running", "instance Stopping", "instance Stopped", "instance Failed", "instance Lost",
	}
	for i := range kinds {
		if kinds[i].do != nil {
			out = append(out, kinds[i].name)
		}
	}
	return out
}
