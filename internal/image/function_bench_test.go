package image_test

import (
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// BenchmarkExamples tells what a first call to a clone takes of each example, in
// milliseconds at the median: "pooled" is everything but the spawn of the
// hypervisor.
//
//	go test ./internal/image -run xxx -bench Examples/nix -benchtime 20x
func BenchmarkExamples(b *testing.B) {
	for _, e := range examples() {
		b.Run(e.name, func(b *testing.B) { benchExample(b, e) })
	}
}

func benchExample(b *testing.B, e example) {
	ctx := b.Context()
	buildGuest(b)
	buildWasmRuntime(b)
	images := image.Store{Root: b.TempDir()}
	bundle, err := images.Function(ctx)
	if err != nil {
		b.Fatal(err)
	}
	disks, init := e.prepare(ctx, b, images, code.Store{Root: b.TempDir()})
	spec := vmm.Spec{
		Ref: vmm.Ref{Instance: "template", Generation: 1}, VCPUs: 1, MemoryMiB: 192, Kernel: bundle.Kernel, Initrd: bundle.Initrd, Cmdline: bundle.Cmdline,
		Network: vmm.Network{Mode: "none"}, CallPort: true, Template: b.TempDir() + "/template",
	}
	for _, disk := range disks {
		spec.Disks = append(spec.Disks, vmm.Disk{Path: disk, Format: "raw", ReadOnly: true})
	}
	driver, err := qemu.New(qemu.Options{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := driver.Close(); err != nil {
			b.Error(err)
		}
	}()
	if err := driver.Start(ctx, spec); err != nil {
		b.Fatal(err)
	}
	dial := func(ref vmm.Ref) *call.Conn {
		conn, err := driver.DialCall(ctx, ref)
		if err != nil {
			b.Fatal(err)
		}
		return call.New(conn, call.Options{})
	}
	remove := func(ref vmm.Ref) {
		if err := driver.Remove(ctx, ref); err != nil {
			b.Error(err)
		}
	}
	conn := dial(spec.Ref)
	ready, err := conn.Init(ctx, init)
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("boot %s, init %s, %d MiB", ready.Boot.Round(time.Millisecond), ready.Init.Round(time.Millisecond), ready.UsedMiB)
	if err := driver.Snapshot(ctx, spec.Ref); err != nil {
		b.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		b.Error(err)
	}
	remove(spec.Ref)
	parts := map[string][]float64{}
	took := func(name string, since time.Time) {
		parts[name] = append(parts[name], float64(time.Since(since).Microseconds())/1000)
	}
	b.ResetTimer()
	for i := range b.N {
		spec.Ref = vmm.Ref{Instance: "clone-" + strconv.Itoa(i), Generation: 1}
		began := time.Now()
		if err := driver.Clone(ctx, spec); err != nil {
			b.Fatal(err)
		}
		conn := dial(spec.Ref)
		took("clone-ms", began)
		spawned := time.Now()
		if err := driver.Resume(ctx, spec.Ref); err != nil {
			b.Fatal(err)
		}
		took("resume-ms", spawned)
		_, err := conn.Restore(ctx, call.Identity{Epoch: uint64(i + 1), UnixNano: time.Now().UnixNano(), Entropy: make([]byte, 64), MachineID: "0123456789abcdef0123456789abcdef", BootID: "8476a536-e9f4-11e8-9739-2dfe598c3fcd", Hostname: "f", Instance: spec.Ref.Instance, Node: "n"})
		if err != nil {
			b.Fatal(err)
		}
		took("restored-ms", spawned)
		invoke := func() call.Result {
			a, result := e.invoke(ctx, b, conn, e.event)
			if a.String() != e.answer {
				b.Fatalf("%q, %+v", a, result.Error)
			}
			return result
		}
		result := invoke()
		parts["handler-ms"] = append(parts["handler-ms"], float64(result.Handler.Microseconds())/1000)
		took("pooled-ms", spawned)
		took("cold-ms", began)
		second := time.Now()
		invoke()
		took("second-ms", second)
		private, _, err := driver.MemoryUse(ctx, spec.Ref)
		if err != nil {
			b.Fatal(err)
		}
		parts["private-MiB"] = append(parts["private-MiB"], float64(private)/(1<<20))
		if err := conn.Close(); err != nil {
			b.Error(err)
		}
		remove(spec.Ref)
	}
	for name, values := range parts { //order:any each is reported by its name
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], name)
	}
	b.ReportMetric(0, "ns/op")
}
