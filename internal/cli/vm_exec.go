package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) vmExec() *cobra.Command {
	var interactive, tty bool
	var env []string
	var dir string
	var limit time.Duration
	cmd := &cobra.Command{
		Use: "exec NAME -- COMMAND…", Short: "Run a command in a guest", ValidArgsFunction: a.completeTargets,
		Long: `Run a command in a VM's first running instance, or in the instance that is named
(webapp-2). Ends with the exit code of the command.`,
		Example: "  blixard vm exec webapp -- uname -a\n  blixard vm exec -it webapp-2 -- /bin/sh",
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			if at < 0 && len(args) > 1 {
				at = 1 // `exec NAME CMD` without dashes, as people write it
			}
			if at != 1 || len(args) < 2 {
				return blixard.Invalid("arguments", "usage: blixard vm exec [-it] NAME -- COMMAND…", "exec needs a NAME and a COMMAND")
			}
			if err := checkTarget(args[0]); err != nil {
				return err
			}
			labels, err := parsePairs("--env", env, checkEnv)
			if err != nil {
				return err
			}
			start := &blixardv1.ExecStart{Target: args[0], Command: args[1:], Env: labelMap(labels), Directory: dir, Tty: tty, TimeoutMs: limit.Milliseconds()}
			return a.exec(cmd.Context(), start, interactive)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&tty, "tty", "t", false, "run it on a terminal")
	f.StringArrayVarP(&env, "env", "e", nil, "environment, KEY=VALUE")
	f.StringVar(&dir, "workdir", "", "directory in the guest to run it in")
	f.DurationVar(&limit, "limit", 0, "end the command after this time; 0: never")
	return cmd
}

func (a *app) exec(ctx context.Context, start *blixardv1.ExecStart, interactive bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	streams := client.ExecIO{Stdout: a.env.Stdout, Stderr: a.env.Stderr}
	if interactive {
		streams.Stdin = a.env.Stdin
	}
	if start.Tty {
		f, isFile := a.env.Stdin.(*os.File)
		if interactive && !(isFile && term.IsTerminal(int(f.Fd()))) {
			return blixard.Invalid("-t", "leave -t out when standard input is a file or a pipe", "standard input is not a terminal")
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		if isFile && term.IsTerminal(int(f.Fd())) {
			restore, sizes, err := rawTerminal(ctx, f, interactive)
			if err != nil {
				return err
			}
			defer restore()
			start.Size, streams.Resize = terminalSize(f), sizes
		}
		code, err := c.Exec(ctx, start, streams)
		return exitOf(code, err)
	}
	code, err := c.Exec(ctx, start, streams)
	return exitOf(code, err)
}

func exitOf(code int, err error) error {
	if err != nil {
		return err
	}
	if code != 0 {
		return guestExitError(code)
	}
	return nil
}

func terminalSize(f *os.File) *blixardv1.TerminalSize {
	columns, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return nil
	}
	return &blixardv1.TerminalSize{Columns: uint32(columns), Rows: uint32(rows)}
}

// rawTerminal hands keys on as they are, and tells of new sizes, until ctx ends
// and restore is called.
func rawTerminal(ctx context.Context, f *os.File, raw bool) (restore func(), sizes <-chan *blixardv1.TerminalSize, err error) {
	undo := func() error { return nil }
	if raw {
		before, err := term.MakeRaw(int(f.Fd()))
		if err != nil {
			return nil, nil, fmt.Errorf("switching the terminal: %w", err)
		}
		undo = func() error { return term.Restore(int(f.Fd()), before) }
	}
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 1)
	out := make(chan *blixardv1.TerminalSize, 1)
	signal.Notify(signals, unix.SIGWINCH)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-signals:
			}
			if size := terminalSize(f); size != nil {
				select {
				case out <- size:
				case <-ctx.Done():
					return
				}
			}
		}
	})
	return func() {
		signal.Stop(signals)
		cancel()
		wg.Wait()
		if err := undo(); err != nil {
			fmt.Fprintf(os.Stderr, "blixard: resetting the terminal: %v; `reset` does it\n", err)
		}
	}, out, nil
}

// escapeKey leaves a console: Ctrl-].
const escapeKey = 0x1d

func (a *app) vmConsole() *cobra.Command {
	return &cobra.Command{
		Use: "console NAME", Short: "Attach to a guest's serial console; Ctrl-] leaves it", Args: takes("NAME"), ValidArgsFunction: a.completeTargets,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkTarget(args[0]); err != nil {
				return err
			}
			return a.console(cmd.Context(), args[0])
		},
	}
}

func (a *app) console(ctx context.Context, target string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := a.env.Stdin
	if in == nil {
		in = eof{}
	}
	left := false
	if f, isFile := in.(*os.File); isFile && term.IsTerminal(int(f.Fd())) {
		a.note("the console of %s; Ctrl-] leaves it", target)
		restore, _, err := rawTerminal(ctx, f, true)
		if err != nil {
			return err
		}
		defer restore()
		in = &escaped{r: f, leave: func() { left = true; cancel() }}
	}
	err = c.Console(ctx, target, in, a.env.Stdout)
	if left {
		fmt.Fprint(a.env.Stderr, "\r\n")
		return nil
	}
	return err
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

// escaped passes keys on until the escape key.
type escaped struct {
	r     io.Reader
	leave func()
}

func (e *escaped) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	for i := range n {
		if p[i] == escapeKey {
			e.leave()
			return i, io.EOF
		}
	}
	return n, err
}
