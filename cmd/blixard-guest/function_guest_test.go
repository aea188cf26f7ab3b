package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	packages "github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// guests makes real guests of one function.
type guests struct {
	driver *qemu.Driver
	root   string // of the driver
	spec   vmm.Spec
	init   call.Init
	clones int
}

func goBuild(t testing.TB, out, source string) {
	t.Helper()
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", source, err, text)
	}
}

// newGuests prepares guests for the function of a directory of testdata.
func newGuests(t testing.TB, source string) *guests {
	t.Helper()
	agent, function := filepath.Join(t.TempDir(), "blixard-guest"), filepath.Join(t.TempDir(), "bootstrap")
	goBuild(t, agent, ".")
	goBuild(t, function, "./testdata/"+source)
	t.Setenv("BLIXARD_GUEST", agent)
	bundle, err := image.Store{Root: t.TempDir()}.Function(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	zipped, err := packages.ZipDir(filepath.Dir(function))
	if err != nil {
		t.Fatal(err)
	}
	store := packages.Store{Root: t.TempDir()}
	p, err := store.Put(t.Context(), bytes.NewReader(zipped))
	if err != nil {
		t.Fatal(err)
	}
	disk, err := store.Disk(t.Context(), p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	driver, err := qemu.New(qemu.Options{Root: root, ForceTCG: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
	})
	return &guests{
		driver: driver, root: root,
		spec: vmm.Spec{
			Ref: vmm.Ref{Instance: "template", Generation: 1}, VCPUs: 1, MemoryMiB: 128, Kernel: bundle.Kernel, Initrd: bundle.Initrd, Cmdline: bundle.Cmdline,
			Disks: []vmm.Disk{{Path: disk, Format: "raw", ReadOnly: true}}, Network: vmm.Network{Mode: "user"}, CallPort: true, Template: t.TempDir() + "/template",
		},
		init: call.Init{
			Function: "f", ARN: "arn:f", Region: "local", Runtime: "bootstrap", MemoryMiB: 128, TimeoutMS: 1000, InitMS: 60_000, EphemeralMiB: 512,
			CodeDevice: "/dev/vda", UnixNano: time.Now().UnixNano(), Entropy: make([]byte, 64), Hostname: "template", Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: []string{"10.0.2.3"},
		},
	}
}

func (g *guests) dial(t testing.TB, ref vmm.Ref) *call.Conn {
	t.Helper()
	conn, err := g.driver.DialCall(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return call.New(conn, call.Options{})
}

// template boots a guest and saves it.
func (g *guests) template(t testing.TB) {
	t.Helper()
	if err := g.driver.Start(t.Context(), g.spec); err != nil {
		t.Fatal(err)
	}
	conn := g.dial(t, g.spec.Ref)
	ready, err := conn.Init(t.Context(), g.init)
	if err != nil {
		g.console(t, g.spec.Ref)
		t.Fatal(err)
	}
	t.Logf("boot %s, init %s, %d MiB", ready.Boot.Round(time.Millisecond), ready.Init.Round(time.Millisecond), ready.UsedMiB)
	if err := g.driver.Snapshot(t.Context(), g.spec.Ref); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := g.driver.Remove(t.Context(), g.spec.Ref); err != nil {
		t.Error(err)
	}
}

func (g *guests) console(t testing.TB, ref vmm.Ref) {
	t.Helper()
	list, err := g.driver.List(t.Context())
	if err != nil {
		t.Error(err)
	}
	for _, status := range list {
		if status.Ref == ref {
			text, err := os.ReadFile(status.ConsoleLog)
			t.Logf("console of %s (%v):\n%s", ref, err, text)
		}
	}
}

// clone makes a copy of the template; it is stopped.
func (g *guests) clone(t testing.TB) (*call.Conn, vmm.Ref, call.Identity) {
	t.Helper()
	g.clones++
	n := g.clones
	spec := g.spec
	spec.Ref = vmm.Ref{Instance: "clone-" + strconv.Itoa(n), Generation: 1}
	if err := g.driver.Clone(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	entropy := bytes.Repeat([]byte{byte(n)}, 64)
	return g.dial(t, spec.Ref), spec.Ref, call.Identity{
		Epoch: uint64(n), Entropy: entropy, MachineID: hex.EncodeToString(entropy[:16]), BootID: fmt.Sprintf("8476a536-e9f4-11e8-9739-%012x", n), Hostname: spec.Ref.Instance, Instance: spec.Ref.Instance, Node: "n",
		MAC: fmt.Sprintf("52:54:00:00:01:%02x", n), Address: fmt.Sprintf("10.0.2.%d/24", 20+n), Gateway: "10.0.2.2", DNS: []string{"10.0.2.3"},
	}
}

func (g *guests) resume(t testing.TB, conn *call.Conn, ref vmm.Ref, identity call.Identity) call.Ack {
	t.Helper()
	if err := g.driver.Resume(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	identity.UnixNano = time.Now().UnixNano()
	ack, err := conn.Restore(t.Context(), identity)
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func (g *guests) remove(t testing.TB, conn *call.Conn, ref vmm.Ref) {
	t.Helper()
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := g.driver.Remove(t.Context(), ref); err != nil {
		t.Error(err)
	}
}

// TestRealGuest has an unmodified aws-lambda-go function misbehave in a clone, and
// looks at who clones are.
func TestRealGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	g := newGuests(t, "lambda")
	g.template(t)
	t.Run("clones", func(t *testing.T) {
		seen := make(map[string]string)
		for range 3 {
			conn, ref, identity := g.clone(t)
			identity.CheckClone = true
			ack := g.resume(t, conn, ref, identity)
			for _, entry := range ack.Seen {
				name, value, _ := strings.Cut(entry, "=")
				if other := seen[entry]; other != "" {
					t.Errorf("%s and %s share %s", ref, other, entry)
				}
				seen[entry] = ref.String()
				if want := map[string]string{
					"machine-id": identity.MachineID, "boot_id": identity.BootID, "hostname": identity.Hostname, "mac": identity.MAC, "address": identity.Address,
					"epoch": strconv.FormatUint(identity.Epoch, 10),
				}[name]; want != "" && value != want {
					t.Errorf("%s: %s is %s, want %s", ref, name, value, want)
				}
				if name == "clock" {
					nano, err := strconv.ParseInt(value, 10, 64)
					if off := time.Since(time.Unix(0, nano)); err != nil || off < -100*time.Millisecond || off > 5*time.Second {
						t.Errorf("%s: the clock is off by %s", ref, off)
					}
				}
			}
			if len(ack.Seen) < 8 {
				t.Errorf("saw only %q", ack.Seen)
			}
			g.remove(t, conn, ref)
		}
	})
	conn, ref, identity := g.clone(t)
	f := &function{Conn: conn, dir: "/var/task"}
	defer func() {
		if t.Failed() {
			g.console(t, ref)
		}
		g.remove(t, conn, ref)
	}()
	g.resume(t, conn, ref, identity)
	long := time.Minute
	f.works(t)
	_, a, _ := f.invoke(t, `{}`, long, false)
	for _, want := range []string{`"uid":993`, `"LAMBDA_TASK_ROOT=/var/task"`, `"AWS_LAMBDA_RUNTIME_API=127.0.0.1:9001"`, `"wd":"/var/task"`} {
		if !strings.Contains(a.body.String(), want) {
			t.Errorf("no %s in %s", want, a.body.String())
		}
	}
	f.fails(t, `{"do":"hang"}`, time.Second, "Sandbox.Timedout", "RequestId: ID Error: Task timed out after 1.00 seconds")
	f.works(t)
	f.fails(t, `{"do":"memory"}`, long, "Runtime.OutOfMemory", "RequestId: ID Error: Runtime exited with error: signal: killed")
	f.works(t)
	f.fails(t, `{"do":"exit","n":3}`, long, "Runtime.ExitError", "RequestId: ID Error: Runtime exited with error: exit status 3")
	f.works(t)
	if _, a, _ := f.invoke(t, `{"do":"fill"}`, long, false); !strings.Contains(a.body.String(), "no space left on device") {
		t.Errorf("filling /tmp: %s", a.body.String())
	}
	f.works(t)
	if result, _, _ := f.invoke(t, `{"do":"print","n":10000}`, long, false); result.Error != nil || result.Dropped == 0 || !bytes.Contains(result.Log, []byte("last words\n")) {
		t.Errorf("10 MB of output: %+v, %d dropped", result.Error, result.Dropped)
	}
	result, _, _ := f.invoke(t, `{"do":"fork","text":"/tmp/pid"}`, time.Second, false)
	if result.Error == nil || result.Error.Type != "Sandbox.Timedout" {
		t.Errorf("a function that forks: %+v", result.Error)
	}
	result = f.works(t)
	stat, err := conn.Stat(t.Context())
	if err != nil || stat.Processes != 1 || stat.UsedMiB == 0 || stat.CPU == 0 || stat.Open != 0 || !stat.RuntimeUp {
		t.Errorf("Stat = %+v, %v", stat, err)
	}
	if result.UsedMiB == 0 || result.UsedMiB > 128 {
		t.Errorf("%d MiB used", result.UsedMiB)
	}
}

// cpu is what a hypervisor has used, in milliseconds: unlike the time it takes, it
// does not depend on what else this machine does.
func (g *guests) cpu(t testing.TB, ref vmm.Ref) float64 {
	t.Helper()
	list, err := g.driver.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, status := range list {
		if status.Ref != ref {
			continue
		}
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", status.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				continue // a thread that has ended
			}
			used, _, _ := strings.Cut(string(text), " ")
			nano, err := strconv.ParseFloat(used, 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += nano / 1e6
		}
	}
	return sum
}

// BenchmarkFirstCall tells what a clone's first call takes from the moment its
// vCPUs run, in milliseconds at the median.
//
//	go test ./cmd/blixard-guest -run xxx -bench FirstCall/lean -benchtime 20x
func BenchmarkFirstCall(b *testing.B) {
	for _, source := range []string{"lean", "lambda"} {
		b.Run(source, func(b *testing.B) {
			g := newGuests(b, source)
			g.template(b)
			parts := map[string][]float64{}
			took := func(name string, since time.Time) {
				parts[name] = append(parts[name], float64(time.Since(since).Microseconds())/1000)
			}
			b.ResetTimer()
			for range b.N {
				conn, ref, identity := g.clone(b)
				cpu := g.cpu(b, ref)
				identity.UnixNano = time.Now().UnixNano()
				began := time.Now()
				if err := g.driver.Resume(b.Context(), ref); err != nil {
					b.Fatal(err)
				}
				took("resume-ms", began)
				if ref.Instance == "clone-1" || g.clones%2 == 0 {
					identity.MAC, identity.Address, identity.Gateway, identity.DNS = "", "", "", nil
				}
				name := "restored-ms"
				if identity.MAC != "" {
					name = "restored-net-ms"
				}
				ack, err := conn.Restore(b.Context(), identity)
				if err != nil {
					b.Fatal(err)
				}
				took(name, began)
				restored := g.cpu(b, ref)
				parts[strings.Replace(name, "-ms", "-cpu-ms", 1)] = append(parts[strings.Replace(name, "-ms", "-cpu-ms", 1)], restored-cpu)
				parts["ack-ms"] = append(parts["ack-ms"], float64(ack.Took.Microseconds())/1000)
				for _, name := range []string{"first", "second", "third"} {
					began := began
					if name != "first" {
						began = time.Now()
					}
					inv := &blixard.Invocation{RequestID: testIDs(), Payload: []byte(`{"text":"x"}`), Deadline: time.Now().Add(time.Minute)}
					result, err := conn.Invoke(context.Background(), inv, call.Target{ARN: "arn:f"}, &answer{})
					if err != nil || result.Error != nil {
						b.Fatalf("%v, %+v", err, result.Error)
					}
					took(name+"-ms", began)
					if name == "first" {
						parts["first-cpu-ms"] = append(parts["first-cpu-ms"], g.cpu(b, ref)-restored)
					}
					parts[name+"-handler-ms"] = append(parts[name+"-handler-ms"], float64(result.Handler.Microseconds())/1000)
				}
				g.remove(b, conn, ref)
			}
			for name, values := range parts { //order:any each is reported by its name
				slices.Sort(values)
				b.ReportMetric(values[len(values)/2], name)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
