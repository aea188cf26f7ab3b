package fake_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/fake"
	"github.com/blixard/blixard/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// remember is a guest that keeps what it is told to.
func remember(_ vmm.Spec, memory *fake.Memory, port net.Conn) {
	go func() {
		for lines := bufio.NewScanner(port); lines.Scan(); {
			answer := string(memory.Load())
			if text, found := strings.CutPrefix(lines.Text(), "set "); found {
				memory.Store([]byte(text))
				answer = "ok"
			}
			if _, err := fmt.Fprintln(port, answer); err != nil {
				break
			}
		}
		_ = port.Close() // closing a pipe cannot fail
	}()
}

func spec(_ *testing.T, ref vmm.Ref) vmm.Spec {
	return vmm.Spec{Ref: ref, VCPUs: 1, MemoryMiB: 64, Kernel: "/kernel", Network: vmm.Network{Mode: "user"}}
}

func TestConformance(t *testing.T) {
	machines := map[vmm.Driver]*fake.Machine{}
	open := func(m *fake.Machine) vmm.Driver {
		d := m.Open()
		machines[d] = m
		return d
	}
	vmmtest.Suite(t, vmmtest.Options{
		New:      func(*testing.T) vmm.Driver { return open(fake.NewMachine(fake.Options{Call: remember})) },
		Template: spec,
		Reopen:   func(_ *testing.T, d vmm.Driver) vmm.Driver { return open(machines[d]) },
		Spec:     spec,
		Polite:   spec,
		Kill: func(t *testing.T, d vmm.Driver, s vmm.Status) {
			if !machines[d].Kill(s.Ref, "QEMU was killed by signal 9 (killed)") {
				t.Errorf("%s does not run", s.Ref)
			}
		},
	})
}

var ref = vmm.Ref{Instance: "webapp-1", Generation: 1}

func phase(t *testing.T, d *fake.Driver) vmm.Phase {
	t.Helper()
	l, err := d.List(t.Context())
	if err != nil || len(l) != 1 {
		t.Fatalf("List: %+v, %v", l, err)
	}
	return l[0].Phase
}

func TestFaults(t *testing.T) {
	var slept time.Duration
	sleep := func(ctx context.Context, d time.Duration) error {
		slept += d
		return ctx.Err()
	}
	for _, c := range []struct {
		fault     fake.Fault
		startErr  bool
		wantPhase vmm.Phase
		wantSleep time.Duration
	}{
		{fake.StartFails, true, vmm.Exited, 0},
		{fake.StartCrashes, true, vmm.Prepared, 0},
		{fake.Dies, false, vmm.Exited, 0},
		{fake.Slow, false, vmm.Running, 7 * time.Second},
	} {
		t.Run(string(c.fault), func(t *testing.T) {
			slept = 0
			m := fake.NewMachine(fake.Options{Sleep: sleep, SlowFor: 7 * time.Second})
			m.Inject(c.fault, ref.Instance, 1)
			d := m.Open()
			if err := d.Start(t.Context(), spec(t, ref)); (err != nil) != c.startErr {
				t.Errorf("Start: %v", err)
			}
			if got := phase(t, d); got != c.wantPhase || slept != c.wantSleep {
				t.Errorf("%s after %s, want %s after %s", got, slept, c.wantPhase, c.wantSleep)
			}
			again := spec(t, vmm.Ref{Instance: ref.Instance, Generation: 2})
			if err := d.Start(t.Context(), again); err != nil {
				t.Errorf("the fault was to happen once: %v", err)
			}
		})
	}
}

func TestStopFaults(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	m := fake.NewMachine(fake.Options{Sleep: func(ctx context.Context, d time.Duration) error {
		if d > time.Minute {
			cancel()
		}
		return ctx.Err()
	}})
	d := m.Open()
	if err := d.Start(ctx, spec(t, ref)); err != nil {
		t.Fatal(err)
	}
	m.Inject(fake.StopHangs, "", 1)
	if err := d.Stop(ctx, ref, time.Second); !errors.Is(err, context.Canceled) {
		t.Errorf("Stop: %v", err)
	}
	if got := phase(t, d); got != vmm.Running {
		t.Errorf("%s after a hanging stop", got)
	}
	m.Inject(fake.RemoveFails, "", 1)
	if err := d.Remove(t.Context(), ref); !errors.Is(err, fake.ErrInjected) {
		t.Errorf("Remove: %v", err)
	}
	m.Inject(fake.Deaf, "", 1)
	if err := d.Stop(t.Context(), ref, time.Second); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if got := phase(t, d); got != vmm.Exited {
		t.Errorf("%s after the grace", got)
	}
}

func TestRestart(t *testing.T) {
	m := fake.NewMachine(fake.Options{})
	d := m.Open()
	if err := d.Start(t.Context(), spec(t, ref)); err != nil {
		t.Fatal(err)
	}
	m.Restart()
	if got := phase(t, d); got != vmm.Exited {
		t.Errorf("%s after a restart", got)
	}
}

func TestGuest(t *testing.T) {
	done := make(chan error, 1)
	m := fake.NewMachine(fake.Options{Guest: func(s vmm.Spec, c net.Conn) {
		go func() {
			_, err := io.WriteString(c, "I am "+s.Ref.String())
			done <- err
		}()
	}})
	d := m.Open()
	if err := d.Start(t.Context(), spec(t, ref)); err != nil {
		t.Fatal(err)
	}
	c, err := d.DialGuest(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	words := make([]byte, len("I am webapp-1.1"))
	if _, err := io.ReadFull(c, words); err != nil || string(words) != "I am webapp-1.1" {
		t.Errorf("read %q, %v", words, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := d.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(words); !errors.Is(err, io.EOF) {
		t.Errorf("the channel of a removed VM: %v", err)
	}
}
