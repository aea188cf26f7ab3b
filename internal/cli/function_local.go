package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// LocalFunctions runs functions on this machine, in the guest that a cluster
// runs them in.
type LocalFunctions interface {
	// Run makes the function what the call says, and calls it.
	Run(ctx context.Context, c LocalCall, sink blixard.ResponseSink) (*blixardv1.FunctionReport, error)
	// Close ends everything and leaves nothing behind.
	Close() error
}

// LocalCall is a call of code that is on this machine.
type LocalCall struct {
	Name    string
	Spec    *blixardv1.FunctionSpec
	Zip     []byte
	Payload []byte
}

// watchEvery is how often --watch looks for changes.
const watchEvery = 300 * time.Millisecond

func (a *app) functionTest() *cobra.Command {
	var flags functionFlags
	var data string
	var watch, parts bool
	cmd := &cobra.Command{
		Use: "test CODE [-- COMMAND…]", Short: "Run code on this machine, without a cluster, in the guest that a cluster runs it in",
		Long: `Run code on this machine alone, as a cluster would run it: in a microVM made from
a template, with the same runtimes and limits. Nothing is left of it afterwards.
With --watch it runs again whenever the code changes.`,
		Example: `  blixard function test hello.nix --data '{"type": "order"}'
  blixard function test ./bootstrap-go --data @event.json --watch`,
		RunE: func(cmd *cobra.Command, args []string) error {
			at := cmd.ArgsLenAtDash()
			var command []string
			if at >= 0 {
				args, command = args[:at], args[at:]
			}
			if len(args) == 0 && flags.config != "" {
				args = []string{flags.config}
			}
			if err := takes("CODE")(cmd, args); err != nil {
				return err
			}
			if a.env.LocalFunctions == nil {
				return &blixard.Error{Code: blixard.CodeRefused, Message: "this program cannot run functions without a cluster"}
			}
			spec, err := flags.merge(cmd.Flags(), &blixardv1.FunctionSpec{}, command)
			if err != nil {
				return err
			}
			payload, err := a.payload(data)
			if err != nil {
				return err
			}
			return a.testFunction(cmd.Context(), args[0], LocalCall{Name: localName(args[0]), Spec: spec, Payload: payload}, watch, parts)
		},
	}
	flags.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&data, "data", "d", "{}", "the payload: JSON, @FILE or - for standard input")
	f.BoolVarP(&watch, "watch", "w", false, "run it again whenever the code changes, until Ctrl-C")
	f.BoolVar(&parts, "breakdown", false, "print where the time went")
	return cmd
}

// localName is what code is called that has no name yet.
func localName(path string) string {
	base := filepath.Base(path)
	base = strings.Map(func(r rune) rune {
		if r < 128 && (r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z') {
			return r
		}
		return '-'
	}, strings.TrimSuffix(base, filepath.Ext(base)))
	if base = base[:min(len(base), 64)]; base == "" {
		return "function"
	}
	return base
}

func (a *app) testFunction(ctx context.Context, path string, c LocalCall, watch, parts bool) (err error) {
	local, err := a.env.LocalFunctions(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, local.Close()) }()
	for {
		seen, err := fingerprint(path)
		if err == nil {
			err = a.testOnce(ctx, local, path, c, parts)
		}
		if !watch || ctx.Err() != nil {
			return err
		}
		if err != nil {
			a.report(err) // it may be mended by the next change
		}
		a.note("waiting for a change of %s", path)
		for now := seen; now == seen; {
			select {
			case <-time.After(watchEvery):
			case <-ctx.Done():
				return nil
			}
			if now, err = fingerprint(path); err != nil {
				now = seen // editors replace files: it comes back
			}
		}
	}
}

func (a *app) testOnce(ctx context.Context, local LocalFunctions, path string, c LocalCall, parts bool) error {
	packed, err := a.env.PackCode(ctx, path)
	if err != nil {
		return fmt.Errorf("packing %s: %w", path, err)
	}
	c.Zip, c.Spec = packed.Zip, proto.CloneOf(c.Spec)
	if err := completeSpec(c.Spec, &packed, path); err != nil {
		return err
	}
	w := a.newAnswer()
	began := time.Now()
	if w.report, err = local.Run(ctx, c, w); err != nil {
		return err
	}
	return w.finish(c.Name, time.Since(began), parts)
}

// fingerprint changes when anything below path does.
func fingerprint(path string) (string, error) {
	var b strings.Builder
	err := filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, name, info.Mode(), info.Size(), info.ModTime().UnixNano())
		return nil
	})
	if err != nil {
		return "", fileError(path, err)
	}
	return b.String(), nil
}
