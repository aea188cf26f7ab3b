// Package sim plays a whole cluster in one goroutine: machines with a replica,
// the real raft log on a disk in memory, an agent and hypervisors, a network,
// clients and an operator, on virtual time, with faults from a seed. It drives
// the production core (state, schedule, control, converge, replica, the log of
// raftlog/wal) as internal/server and internal/agent do; it holds no copy of a
// decision.
//
// Ownership: a run owns everything it makes and ends with nothing left over,
// but for one thing: raft's election jitter reads the variable
// crypto/rand.Reader, which Run replaces while it plays and puts back. So there
// is one run at a time in a process; run several by several processes.
//
// Ordering: events come in order of true time and, at equal times, in the order
// they were planned. Nothing depends on the wall clock, on the order of a map or
// on an address, so a seed is a story: the same binary tells it alike in every
// process, and TraceHash proves it.
//
// What goes wrong and when is drawn before the run begins, as data: a Schedule
// can be printed, kept, replayed and shrunk. What is too fine for that (the
// delay of each message, which sectors a crash leaves) is drawn while it plays.
//
// A violation of an invariant ends the run with a Violation: which one, when,
// and the newest lines of the story. A panic of the core is one too.
package sim
