package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/guest"
)

// outputGrace is how long output is read on after a command has ended, since a
// child it left behind may hold the pipe open for ever.
const outputGrace = 300 * time.Millisecond

// exec runs one command beside the workload.
func (a *agent) exec(ctx context.Context, request guest.ExecRequest, streams guest.Streams) (int, error) {
	env := mergeEnv(a.environment(), request.Env)
	if request.TTY {
		return a.execTerminal(ctx, request, env, streams)
	}
	var inside, outside [3]*os.File // the command's ends of its pipes, and ours
	defer func() {
		closeAll(inside[:])
		closeAll(outside[:])
	}()
	for i := range inside {
		read, write, err := os.Pipe()
		if err != nil {
			return 0, fmt.Errorf("making a pipe: %w", err)
		}
		inside[i], outside[i] = write, read
		if i == 0 {
			inside[i], outside[i] = read, write
		}
	}
	p, err := a.children.start(request.Args, env, request.Dir, []uintptr{inside[0].Fd(), inside[1].Fd(), inside[2].Fd()}, false)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", guest.ErrCommand, err)
	}
	closeAll(inside[:])
	inside = [3]*os.File{}

	var output sync.WaitGroup
	output.Go(func() { copyOutput(streams.Stdout, outside[1]) })
	output.Go(func() { copyOutput(streams.Stderr, outside[2]) })
	go func() {
		// It ends with streams.Stdin, which ends with this call.
		//nolint:errcheck // a command need not read its input
		io.Copy(outside[0], streams.Stdin)
		//nolint:errcheck // closed twice is no harm
		outside[0].Close()
	}()
	return finishExec(ctx, p, &output, outside[:])
}

// execTerminal gives the command a terminal of its own.
func (a *agent) execTerminal(ctx context.Context, request guest.ExecRequest, env []string, streams guest.Streams) (int, error) {
	master, slave, err := openTerminal()
	if err != nil {
		return 0, err
	}
	defer master.Close()
	resizeTerminal(master, guest.Size{Rows: request.Rows, Cols: request.Cols})
	p, err := a.children.start(request.Args, mergeEnv([]string{"TERM=linux"}, env), request.Dir, []uintptr{slave.Fd(), slave.Fd(), slave.Fd()}, true)
	closeErr := slave.Close()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", guest.ErrCommand, err)
	}
	if closeErr != nil {
		return 0, closeErr
	}
	var output sync.WaitGroup
	output.Go(func() { copyOutput(streams.Stdout, master) })
	go func() {
		for size := range streams.Resize {
			resizeTerminal(master, size)
		}
	}()
	go func() {
		if _, err := io.Copy(master, streams.Stdin); err == nil {
			//nolint:errcheck // the terminal may be gone
			master.Write([]byte{4}) // end of input, as typed
		}
	}()
	return finishExec(ctx, p, &output, []*os.File{master})
}

// finishExec waits for the command and then for its output.
func finishExec(ctx context.Context, p *process, output *sync.WaitGroup, ours []*os.File) (int, error) {
	var status syscall.WaitStatus
	select {
	case status = <-p.ended:
	case <-ctx.Done():
		if err := p.signal(syscall.SIGKILL); err != nil {
			logf("killing an abandoned command: %v", err)
		}
		status = <-p.ended
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		output.Wait()
	}()
	select {
	case <-drained:
	case <-ctx.Done():
	case <-idle(drained):
	}
	closeAll(ours)
	<-drained
	return exitCode(status), ctx.Err()
}

// idle fires after the grace for output that nobody ends.
func idle(drained <-chan struct{}) <-chan struct{} {
	fired := make(chan struct{})
	go func() {
		defer close(fired)
		select {
		case <-drained:
		case <-time.After(outputGrace):
		}
	}()
	return fired
}

// copyOutput copies until the command's end of the pipe is closed, or the host
// does not want more; then it drains, so that the command is not stopped by a
// full pipe.
func copyOutput(w io.Writer, r *os.File) {
	if _, err := io.Copy(w, r); err != nil && !errors.Is(err, os.ErrClosed) {
		//nolint:errcheck // a terminal whose command has ended reads as EIO
		io.Copy(io.Discard, r)
	}
}

func closeAll(files []*os.File) {
	for _, file := range files {
		if file != nil {
			//nolint:errcheck // pipes and terminals hold nothing back
			file.Close()
		}
	}
}

func openTerminal() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		master, err = os.OpenFile("/dev/pts/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("opening a terminal: %w", err)
	}
	var number int
	err = control(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		number, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
		return err
	})
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("opening a terminal: %w", err), master.Close())
	}
	return master, slave, nil
}

func resizeTerminal(master *os.File, size guest.Size) {
	if size.Rows == 0 || size.Cols == 0 {
		return
	}
	err := control(master, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	})
	if err != nil && !errors.Is(err, os.ErrClosed) {
		logf("resizing a terminal: %v", err)
	}
}

// control runs f on the descriptor without taking it from the poller, as Fd would.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}
