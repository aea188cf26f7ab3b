package agent

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/converge"
	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// real is a node whose hypervisor is QEMU.
type real struct {
	*node
	driver *qemu.Driver
	root   string
}

func builtin(store image.Store) Images {
	return imagesFunc(func(ctx context.Context, _ string) (Bundle, error) {
		b, err := store.Builtin(ctx)
		return Bundle{Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline, Command: b.DefaultCommand}, err
	})
}

func newReal(t *testing.T, edits ...func(*Options)) *real {
	t.Helper()
	dir := t.TempDir()
	guestBinary := filepath.Join(dir, "blixard-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", guestBinary, "github.com/blixard/blixard/cmd/blixard-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the guest agent: %v\n%s", err, out)
	}
	t.Setenv("BLIXARD_GUEST", guestBinary)
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	r := &real{root: filepath.Join(dir, "qemu")}
	r.node = &node{t: t, cluster: newCluster()}
	r.options = Options{
		Node: "n1", Cluster: r.cluster, DataDir: filepath.Join(dir, "agent"), Log: log, Images: builtin(image.Store{Root: filepath.Join(dir, "images")}),
		WorkDir: func(ref vmm.Ref) string { return filepath.Join(r.root, "vms", ref.String()) },
	}
	for _, edit := range edits {
		edit(&r.options)
	}
	r.begin()
	t.Cleanup(func() {
		r.end()
		r.open()
		found, err := r.driver.List(context.Background())
		if err != nil {
			t.Error(err)
		}
		for _, s := range found {
			if err := r.driver.Remove(context.Background(), s.Ref); err != nil {
				t.Error(err)
			}
		}
		if err := r.driver.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *real) open() {
	r.t.Helper()
	driver, err := qemu.New(qemu.Options{Root: r.root, Log: r.options.Log})
	if err != nil {
		r.t.Fatal(err)
	}
	r.driver = driver
}

// begin starts a daemon; its end also closes the driver.
func (r *real) begin() {
	r.t.Helper()
	r.open()
	r.options.Driver = r.driver
	agent, err := New(r.options)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx) }()
	r.agent = agent
	ended := false
	r.end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
		if err := r.driver.Close(); err != nil {
			r.t.Error(err)
		}
	}
}

// within polls for longer than until: a real guest boots.
func (r *real) within(limit time.Duration, what string, ok func() bool) {
	r.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			r.t.Fatalf("not in time: %s; rows %s", what, r.describe())
		}
	}
}

func (r *real) state(ref converge.Ref, state blixard.InstanceState) blixard.Instance {
	r.t.Helper()
	var row blixard.Instance
	r.within(3*time.Minute, ref.String()+" is "+string(state), func() bool {
		row, _ = r.cluster.row(ref)
		if row.State.Terminal() && row.State != state {
			r.t.Fatalf("%s is %s: %s", ref, row.State, row.Message)
		}
		return row.State == state
	})
	return row
}

func (r *real) pid(ref converge.Ref) int {
	r.t.Helper()
	found, err := r.driver.List(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, s := range found {
		if refOf(s.Ref) == ref {
			return s.Pid
		}
	}
	return 0
}

func get(url string) (string, error) {
	// A dial outlives its request, but not the check for leaks.
	dial := (&net.Dialer{Timeout: 400 * time.Millisecond}).DialContext
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return string(body), err
}

// TestRealGuest takes a real microVM through its life: it answers over HTTP,
// runs commands, is found again by the next daemon, is reported when QEMU is
// killed, and leaves nothing behind.
func TestRealGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots real virtual machines")
	}
	r := newReal(t)
	spec := blixard.VMSpec{
		MemoryMiB: 256, Publish: []blixard.Port{{GuestPort: 80}}, Env: []blixard.Label{{Key: "COLOUR", Value: "blue"}},
		Health: &blixard.HealthCheck{Kind: "http", Port: 80, IntervalMS: 500, TimeoutMS: 5000},
	}
	began := time.Now()
	first := r.cluster.place("web", 1, spec)
	row := r.state(first, blixard.Running)
	t.Logf("running after %s at %s (%s)", time.Since(began), row.Address, row.Acceleration)

	r.within(time.Minute, "HTTP answers", func() bool { body, err := get("http://" + row.Address + "/"); return err == nil && body != "" })
	r.within(time.Minute, "it is healthy", func() bool { row, _ := r.cluster.row(first); return row.Health == blixard.HealthHealthy })
	var out bytes.Buffer
	code, err := r.agent.Exec(t.Context(), "web-1", guest.ExecRequest{Args: []string{"/bin/sh", "-c", "hostname; echo $COLOUR; exit 3"}}, nil, &out, nil, nil)
	if err != nil || code != 3 || out.String() != "web-1\nblue\n" {
		t.Errorf("exec: code %d, %v, output %q", code, err, out.String())
	}
	var logs bytes.Buffer
	if err := r.agent.Logs(t.Context(), "web-1", guest.LogOptions{TailLines: -1}, &logs); err != nil || logs.Len() == 0 {
		t.Errorf("logs: %d bytes, %v", logs.Len(), err)
	}

	pid := r.pid(first)
	r.end()
	r.begin()
	r.within(time.Minute, "the guest is talked to again", func() bool { return r.agent.clientOf(first) != nil })
	if now := r.pid(first); now != pid {
		t.Errorf("pid %d became %d when the daemon was restarted", pid, now)
	}
	if body, err := get("http://" + row.Address + "/"); err != nil || body == "" {
		t.Errorf("HTTP after the restart: %q, %v", body, err)
	}

	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	if row := r.state(first, blixard.Failed); !strings.Contains(row.Message, "QEMU") {
		t.Errorf("message %q", row.Message)
	}
	t.Logf("reported failed %s after the kill", time.Since(killed))
	logs.Reset()
	if err := r.agent.Logs(t.Context(), "web-1", guest.LogOptions{TailLines: 1}, &logs); err != nil || strings.Count(strings.TrimSuffix(logs.String(), "\n"), "\n") != 0 {
		t.Errorf("log of what has ended: %q, %v", logs.String(), err)
	}

	own := r.cluster.place("own", 1, blixard.VMSpec{MemoryMiB: 256})
	second := r.cluster.place("web", 2, spec)
	r.cluster.want(first, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
	r.state(second, blixard.Running)
	r.state(own, blixard.Running)
	// The guest may be gone before it can answer.
	code, err = r.agent.Exec(t.Context(), "own-1", guest.ExecRequest{Args: []string{"/bin/sh", "-c", "poweroff -f"}}, nil, &out, &out, nil)
	t.Logf("poweroff: code %d, %v", code, err)
	if row := r.state(own, blixard.Stopped); row.Message != "the guest shut down" {
		t.Errorf("message %q", row.Message)
	}
	r.cluster.want(own, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
	r.cluster.want(second, func(i *blixard.Instance) { i.Wanted, i.WantReason = blixard.WantStop, "deleted" })
	asked := time.Now()
	r.state(second, blixard.Stopped)
	if took := time.Since(asked); took > 9*time.Second {
		t.Errorf("an orderly stop took %s: the guest did not obey", took)
	}
	r.cluster.want(second, func(i *blixard.Instance) { i.Wanted = blixard.WantRemove })
	r.within(time.Minute, "all rows are gone", func() bool { rows, _ := r.cluster.Assigned(); return len(rows) == 0 })
	for _, dir := range []string{"vms", "trash"} {
		left, err := os.ReadDir(filepath.Join(r.root, dir))
		if err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
}

// TestRealFence: what stops on partition ends with its workload's lease, killed
// by a watchdog when the daemon hangs or is gone.
func TestRealFence(t *testing.T) {
	if testing.Short() {
		t.Skip("boots real virtual machines")
	}
	r := newReal(t)
	ref := r.cluster.place("db", 1, blixard.VMSpec{MemoryMiB: 256, Singleton: true})
	r.state(ref, blixard.Running)
	pid := r.pid(ref)
	r.within(time.Minute, "its process is in the lease file", func() bool {
		record, err := readLease(r.options.DataDir)
		return err == nil && len(record.Targets) == 1 && record.Targets[0].Pid == pid
	})
	r.end() // as if it were gone: nothing renews the lease
	record, err := readLease(r.options.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- Watchdog(ctx, r.options.DataDir) }()
	r.within(time.Minute, "its process is gone", func() bool { _, err := startTicks(pid); return err != nil })
	if now := bootTime().Milliseconds(); now > record.UntilMS || now < record.KillMS {
		t.Errorf("killed at %d; the lease ends at %d, the kill is due at %d", now, record.UntilMS, record.KillMS)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	r.begin()
	r.state(ref, blixard.Failed)
}
