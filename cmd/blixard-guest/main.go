// Command blixard-guest is Blixard's end inside a microVM. As PID 1 of an
// initial RAM disk it makes the machine usable (mounts, drivers, network) and
// never exits; as an ordinary service of a guest with its own init it only
// serves the channel to the host.
//
// It runs one workload, once: the configured command, the image's own, or a
// small HTTP server that tells who answers. The host decides what follows when
// the workload has ended.
//
// Ownership: reaper starts and reaps every child; workload owns the workload's
// process and its log; agent answers the host and owns the configuration.
// Binary size and start time matter, since guests are also run under emulation:
// no net/http, no os/exec, no logging library.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/blixard/blixard/internal/guest"
)

// version is set by the linker.
var version = "dev"

func main() {
	init := os.Getpid() == 1
	// The kernel gives its init the words of its command line that it does not know.
	if len(os.Args) > 1 && !init {
		fmt.Printf("blixard-guest %s\nRuns as PID 1 or as a service of a Blixard guest; it takes no arguments.\n", version)
		if os.Args[1] == "version" || os.Args[1] == "--version" || os.Args[1] == "--help" || os.Args[1] == "-h" {
			return
		}
		os.Exit(2)
	}
	if init {
		boot()
		if functionRole() {
			serveFunction()
		}
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	children := newReaper()
	reaping := make(chan struct{})
	go func() {
		defer close(reaping)
		children.run(ctx)
	}()
	a := newAgent(init, children, newLog(os.Stdout))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	serving := make(chan struct{})
	go func() {
		defer close(serving)
		guest.Serve(ctx, openChannel(init), a)
	}()
	logf("guest agent %s is ready after %s", version, uptime().Round(time.Millisecond))
	if init {
		// The kernel sends SIGINT on Ctrl-Alt-Del, people and hypervisors SIGTERM.
		<-signals
		a.end(defaultGrace)
		select {} // the machine restarts under us; PID 1 must not exit
	}
	<-signals
	a.workload.stop(defaultGrace)
	stop()
	<-serving
	<-reaping
}

// logf writes a line to the console, where the host keeps it.
func logf(format string, args ...any) {
	// There is nobody to tell when the console does not take it.
	fmt.Fprintf(os.Stderr, "blixard-guest: "+format+"\n", args...)
}

// uptime is the time since the kernel started.
func uptime() time.Duration {
	var now syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptrOf(&now), 0); errno != 0 {
		return 0
	}
	return time.Duration(now.Nano())
}
