package dispatch_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/dispatch"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/state"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// TestRealGuest deploys a shell function into real microVMs: built, cloned from
// the pool, warm, timed out, killed, scaled to zero.
func TestRealGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	// Unix socket paths are short, test directories are not.
	dir, err := os.MkdirTemp("", "blixard-fn") //nolint:usetesting // as said above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	guest := filepath.Join(dir, "blixard-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", guest, "github.com/blixard/blixard/cmd/blixard-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the guest agent: %v\n%s", err, out)
	}
	t.Setenv("BLIXARD_GUEST", guest)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	driver, err := qemu.New(qemu.Options{Root: filepath.Join(dir, "fn"), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t, func(o *dispatch.Options) {
		o.Driver, o.Images, o.Dir, o.Log = driver, image.Store{Root: filepath.Join(dir, "images")}, filepath.Join(dir, "dispatch"), log
		o.Limits.Route.GraceMS = 3000
	})
	script, err := os.ReadFile("../../examples/functions/bootstrap-shell/bootstrap")
	if err != nil {
		t.Fatal(err)
	}
	w.deployReal("shell", script, func(s *blixard.FunctionSpec) { s.ScaleDownDelayMS = 3000; s.TimeoutMS = 5000 })
	w.untilLong("a clone ahead", func() bool { return w.status("shell").Pooled > 0 })
	for i, want := range []blixard.StartKind{blixard.StartPooled, blixard.StartWarm, blixard.StartWarm} {
		began := time.Now()
		report, body, err := w.invoke("shell", `{"name":"world"}`)
		if err != nil || report.Error != nil || !json.Valid([]byte(body)) || report.Start != want {
			t.Fatalf("call %d: %q, %+v, %v\n%s", i, body, report, err, report.Log)
		}
		t.Logf("%s in %s: %+v", report.Start, time.Since(began), report.Parts)
	}
	// Several at once: the pool, and clones made for the call.
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			report, body, err := w.invoke("shell", `{"name":"crowd"}`)
			if err != nil || report.Error != nil {
				t.Errorf("%q, %+v, %v", body, report.Error, err)
			}
			t.Logf("%s: %+v", report.Start, report.Parts)
		})
	}
	calls.Wait()
	w.untilLong("nothing left", func() bool { return w.status("shell").Instances == 0 })
	m, _ := w.d.Metrics("shell")
	if m.RestoreFailures != 0 || m.StartFailures != 0 || m.Booted != 0 {
		t.Errorf("%+v", m)
	}
	w.stop()
	if found, err := driver.List(context.Background()); err != nil || len(found) != 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
	left, err := exec.Command("pgrep", "-f", "--", dir).Output()
	if err == nil && strings.TrimSpace(string(left)) != "" {
		t.Errorf("processes are left: %s", left)
	}
}

// deployReal is deploy with code that is run.
func (w *world) deployReal(name blixard.FunctionName, script []byte, change func(*blixard.FunctionSpec)) {
	w.t.Helper()
	p := w.put("bootstrap", script)
	spec := blixard.FunctionSpec{Runtime: "bootstrap", MemoryMiB: 128}
	spec.Defaults()
	change(&spec)
	w.cluster.must(w.t, &state.CreateFunction{Name: name, Spec: spec, CodeDigest: p.Digest, CodeBytes: p.Bytes, MaxConcurrent: 10, Reserved: true})
	view := w.cluster.View()
	w.cluster.must(w.t, &state.AssignBuild{Function: name, Seq: view.FunctionVersion(name, 0).Seq, Node: w.node, NodeEpoch: view.Node(w.node).Epoch})
	w.untilLong("the build", func() bool { return w.version(name).State != blixard.FunctionPending })
	if fv := w.version(name); fv.State != blixard.FunctionActive {
		w.t.Fatalf("%s: %s", fv.State, fv.StateReason)
	}
}
