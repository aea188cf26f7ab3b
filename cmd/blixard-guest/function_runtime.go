package main

import (
	"context"
	"io"
	"time"

	"github.com/blixard/blixard/internal/call"
)

// functionRuntime runs functions of one kind. The agent calls init, kill and
// stop one at a time, and invoke only between a successful init and the next kill
// or exit.
type functionRuntime interface {
	// init starts the function and returns when it can be invoked. It is called
	// again, after kill, when the function has ended or was killed. ctx ends when
	// the time is over; what has been started by then is killed by the agent.
	// An *call.InitError is the function's fault, all others the guest's.
	init(ctx context.Context) error
	// invoke answers one invocation through w and ends with w.Finish, which may
	// also happen behind its back (deadline, exit of a process, cancellation):
	// writes fail then. Up to Init.Concurrency run at once.
	invoke(request *call.Request, w call.ResponseWriter)
	// kill ends what the runtime holds in this process. The agent has killed all
	// processes of the function before.
	kill()
	// restored is called in a clone, after it has got its identity and before the
	// first invocation. ctx ends when the time for hooks is over.
	restored(ctx context.Context, identity *call.Identity) error
	// stop asks the function to end by itself; reason is "spindown", "timeout" or
	// "failure". The agent kills what is left when ctx has ended.
	stop(ctx context.Context, reason string)
}

// functionKind is a row of the table of runtimes.
type functionKind struct {
	make func(host *functionHost) functionRuntime
	// inline: invoke does not wait for anything, so that the thread that reads the
	// port may call it, and it clears invocation.queued when the function gets an
	// invocation. Others get a goroutine for each.
	inline bool
}

// functionKinds are the runtimes by Init.Runtime.
func functionKinds() map[string]functionKind {
	return map[string]functionKind{
		"bootstrap": {make: newBootstrap, inline: true},
		"nix":       {make: newNix, inline: true},
		"http":      {make: newHTTP},
		"wasm":      {make: newWasm},
	}
}

// functionHost is what the agent offers to a runtime.
type functionHost struct {
	init *call.Init
	// log takes output of the function that does not come from its processes.
	log io.Writer
	// processes starts the function's processes. Their standard output and error
	// are the function's log.
	processes *functionProcesses
	// exited tells the agent that the function has ended by itself: all open
	// invocations fail with this error, and the next one initialises anew.
	exited func(fault *call.InitError)
	// taskRoot is where the code is: /var/task.
	taskRoot string
	// runtimeRoot is where the runtime's disk is, when there is one: /opt/blixard.
	runtimeRoot string
	// api is the address of the Runtime API: 127.0.0.1:9001.
	api string
}

// functionCommand is a process of a function. It runs as the function's user, in
// a session of its own and within the function's bounds.
type functionCommand struct {
	args []string // args[0] is the program; without a slash it is looked for in PATH of env
	env  []string
	dir  string // "" is /
	// files are given as descriptors 3, 4, …
	files []uintptr
}

// functionExit is how a process ended.
type functionExit struct {
	code   int    // of exit, 128+n for signal n
	signal string // "killed", "segmentation fault", …; "" without one
	memory bool   // the kernel has killed processes of the function for want of memory
}

// functionGrace is what a runtime has by default to end by itself.
const functionGrace = 500 * time.Millisecond
