// Package cli is the command line of Blixard: a shell over package client. It
// decides nothing about VMs or nodes; it turns words into requests and answers
// into words.
//
// Ownership: a command tree belongs to one Run. Nothing is kept between runs but
// what `blixard dev` writes below its directory.
//
// Invariants: data goes to Stdout, words to Stderr. No flag is ignored: it works
// or the command is refused before anything changes. A verb that changes
// something ends when its effect is there, or says why it is not, with an exit
// code from one table (`blixard help exit-codes`).
//
// To add a command: one file <noun>_<verb>.go, one line in commands.go, one
// testdata/<noun>_<verb>.txtar.
package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
)

// Env is everything a run takes from outside.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	// Version is the release of this program.
	Version string
	// Extra are commands of the caller, such as server and init; ClusterExtra
	// are its commands below `blixard cluster`, such as init and join.
	Extra, ClusterExtra []*cobra.Command
	// Doctor are checks of this machine that need a driver; `blixard doctor`
	// runs them after its own.
	Doctor []Check
	// PackImage turns what --image names on this machine (a bundle directory, a
	// root filesystem, an archive) into a bundle's archive. Nil: only builtin and
	// imported images can be named.
	PackImage func(ctx context.Context, path string) (PackedImage, error)
	// PackCode zips what --config names on this machine and tells what runs it.
	// Nil: functions cannot be deployed from files.
	PackCode func(ctx context.Context, path string) (PackedCode, error)
	// LocalFunctions runs functions on this machine alone. Nil: they cannot be
	// tried without a cluster.
	LocalFunctions func(ctx context.Context) (LocalFunctions, error)
	// EndNode takes from this machine what a node leaves outside of its data
	// directory, once its processes have ended: `blixard dev` ends nodes with it.
	// Nil: there is nothing.
	EndNode func(ctx context.Context, dataDir string) error
	// Executable is the program whose `server` command `blixard dev` runs; empty:
	// this program.
	Executable string
}

// PackedImage is a bundle ready to be sent. Close it.
type PackedImage struct {
	Digest string // "sha256:<64 hex digits>"
	Size   int64  // bytes, -1 if not known
	io.ReadCloser
}

// defaultAddress is where a server listens if not told otherwise.
const defaultAddress = "127.0.0.1:7400"

// app is one run: the environment and the global flags.
type app struct {
	env            Env
	addr, token    string
	output         string
	timeout        time.Duration
	requestTimeout time.Duration
	stale          bool // see mayBeStale
	connected      *client.Client
}

// New returns the command tree. Commands write through env only.
func New(env Env) *cobra.Command {
	root, _ := newRoot(env)
	return root
}

func newRoot(env Env) (*cobra.Command, *app) {
	if env.Getenv == nil {
		env.Getenv = os.Getenv
	}
	a := &app{env: env}
	root := &cobra.Command{
		Use: "blixard", Short: "Run microVMs on a cluster of machines",
		Long: `Blixard runs long-lived microVMs and serverless functions on a cluster of
machines.

Data goes to standard output, words to standard error. Errors say what to do;
exit codes are listed by "blixard help exit-codes".`,
		SilenceErrors: true, SilenceUsage: true, Args: cobra.ArbitraryArgs, RunE: groupRun,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(flagError)
	f := root.PersistentFlags()
	f.StringVar(&a.addr, "addr", "", "nodes to ask, comma-separated host:port (BLIXARD_ADDR; default "+defaultAddress+")")
	f.StringVar(&a.token, "token", "", "API token (BLIXARD_TOKEN; default: admin.token in $BLIXARD_DATA_DIR or /var/lib/blixard)")
	f.DurationVar(&a.timeout, "timeout", 2*time.Minute, "how long a verb waits for its effect; 0: without limit")
	f.DurationVar(&a.requestTimeout, "request-timeout", 30*time.Second, "how long one request may take")
	f.StringVarP(&a.output, "output", "o", "table", "table, wide, json, yaml or name")
	f.StringVar(&a.output, "format", "table", "the same as --output")
	f.Lookup("format").Hidden = true
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return a.checkGlobals(cmd) }
	registerValues(root, "output", outputNames...)
	a.addCommands(root)
	explainArguments(root)
	root.SetHelpCommand(a.helpCommand())
	root.SetUsageFunc(a.usage)
	return root, a
}

// Run runs the command that args name and returns the exit code. SIGINT and
// SIGTERM end the command's context; a second one ends the process as usual.
func Run(ctx context.Context, env Env, args []string) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	root, a := newRoot(env)
	root.SetArgs(args)
	defer func() {
		if a.connected != nil {
			a.connected.Close()
		}
	}()
	_, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		a.say("interrupted")
		return exitInterrupted
	}
	return a.report(err)
}

// checkGlobals refuses values of global flags that cannot be used.
func (a *app) checkGlobals(cmd *cobra.Command) error {
	if cmd.Annotations["own-output"] != "" {
		return nil
	}
	if err := oneOf("--output", a.output, outputNames); err != nil {
		return err
	}
	if strings.ContainsFunc(a.givenToken(), func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return blixard.Invalid("--token", "give the token alone, such as $(cat admin.token)", "the token has spaces, line breaks or other characters that no token has")
	}
	if a.timeout < 0 || a.requestTimeout < 0 {
		return blixard.Invalid("timeout", "write a positive duration such as 30s or 2m", "a time limit is negative")
	}
	return nil
}

// oneOf refuses a value that is not among the known ones.
func oneOf(what, value string, known []string) error {
	if slices.Contains(known, value) {
		return nil
	}
	hint := "known: " + strings.Join(known, ", ")
	if near := blixard.Nearest(value, known); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	return blixard.Invalid(what, hint, "%s %q is not known", what, value)
}

// addresses are the nodes to ask.
func (a *app) addresses() []string {
	text := firstOf(a.addr, a.env.Getenv("BLIXARD_ADDR"), defaultAddress)
	var out []string
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// givenToken is the token of the flag or the environment, where a line break at
// its end is easily caught.
func (a *app) givenToken() string {
	return strings.TrimSpace(firstOf(a.token, a.env.Getenv("BLIXARD_TOKEN")))
}

// credentials are the API token: the flag, the environment, or the file that
// the server of this machine wrote.
func (a *app) credentials() string {
	if t := a.givenToken(); t != "" {
		return t
	}
	dirs := []string{"/var/lib/blixard"}
	if d := a.env.Getenv("BLIXARD_DATA_DIR"); d != "" {
		dirs = []string{d}
	}
	for _, dir := range dirs {
		if token := readToken(filepath.Join(dir, "admin.token")); token != "" {
			return token
		}
	}
	return ""
}

// maxTokenBytes bounds a file with a token.
const maxTokenBytes = 4096

// readToken reads the token of a file, "" when it cannot.
func readToken(path string) string {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxTokenBytes {
		return ""
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// client connects on first use.
func (a *app) client() (*client.Client, error) {
	if a.connected != nil {
		return a.connected, nil
	}
	c, err := client.New(client.Options{
		Addresses: a.addresses(), Token: a.credentials(), UserAgent: "blixard-cli/" + firstOf(a.env.Version, "dev"),
		Actor: a.env.Getenv("USER"),
	})
	if err != nil {
		return nil, err
	}
	a.connected = c
	return c, nil
}

// request bounds one request.
func (a *app) request(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.requestTimeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, a.requestTimeout)
}

// wait bounds the wait for an effect.
func (a *app) wait(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, a.timeout)
}

// ask makes one request, bounded in time.
func ask[Req, Res any](ctx context.Context, a *app, method func(*client.Client, context.Context, Req) (Res, error), req Req) (Res, error) {
	var none Res
	c, err := a.client()
	if err != nil {
		return none, err
	}
	ctx, cancel := a.request(ctx)
	defer cancel()
	a.withFreshness(req)
	return method(c, ctx, req)
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// terminal tells whether w is a terminal, and its width (0: not known).
func terminal(w any) (width int, is bool) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0, true
	}
	return width, true
}

// colours tells whether w takes colours.
func (a *app) colours(w any) bool {
	_, is := terminal(w)
	return is && a.env.Getenv("NO_COLOR") == "" && a.env.Getenv("TERM") != "dumb"
}
