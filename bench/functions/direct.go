package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/code"
	"github.com/blixard/blixard/internal/image"
	"github.com/blixard/blixard/internal/vmm"
	"github.com/blixard/blixard/internal/vmm/qemu"
)

// guest is a clone of a function's guest that nothing of Blixard stands before:
// its call port is spoken to from here.
type guest struct {
	driver *qemu.Driver
	ref    vmm.Ref
	conn   *call.Conn
	inv    blixard.Invocation
}

// startGuest boots a guest, saves it and makes a clone, as a dispatcher does.
func startGuest(ctx context.Context, b *bench, zip []byte) (g *guest, err error) {
	store := code.Store{Root: filepath.Join(b.dir, "direct-code")}
	p, err := store.Put(ctx, bytes.NewReader(zip))
	if err != nil {
		return nil, fmt.Errorf("storing the code: %w", err)
	}
	disk, err := store.Disk(ctx, p.Digest)
	if err != nil {
		return nil, fmt.Errorf("making the disk of the code: %w", err)
	}
	bundle, err := image.Store{Root: filepath.Join(b.dir, "images")}.Function(ctx)
	if err != nil {
		return nil, err
	}
	driver, err := qemu.New(qemu.Options{Root: filepath.Join(b.dir, "direct"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, fmt.Errorf("opening the hypervisor: %w", err)
	}
	g = &guest{driver: driver, ref: vmm.Ref{Instance: "template", Generation: 1}}
	defer func() {
		if err != nil {
			g.stop()
		}
	}()
	spec := vmm.Spec{
		Ref: g.ref, VCPUs: 1, MemoryMiB: 128, Kernel: bundle.Kernel, Initrd: bundle.Initrd, Cmdline: bundle.Cmdline, CallPort: true,
		Disks: []vmm.Disk{{Path: disk, Format: "raw", ReadOnly: true}}, Network: vmm.Network{Mode: "user"},
		Template: filepath.Join(b.dir, "direct-template"),
	}
	if err := driver.Start(ctx, spec); err != nil {
		return nil, fmt.Errorf("booting a guest: %w", err)
	}
	if err := g.dial(ctx); err != nil {
		return nil, err
	}
	entropy := make([]byte, 64)
	if _, err := rand.Read(entropy); err != nil {
		return nil, fmt.Errorf("drawing entropy: %w", err)
	}
	if _, err := g.conn.Init(ctx, call.Init{
		Function: "lean", Version: "$LATEST", ARN: "arn:aws:lambda:us-east-1:000000000000:function:lean", Region: "us-east-1", Runtime: "bootstrap",
		MemoryMiB: 128, EphemeralMiB: 512, TimeoutMS: 30_000, InitMS: 100_000, Concurrency: 1, LogGroup: "g", LogStream: "s", InitializationType: "on-demand",
		CodeDevice: "/dev/vda", UnixNano: time.Now().UnixNano(), Entropy: entropy, Hostname: "direct",
	}); err != nil {
		return nil, err
	}
	if err := driver.Snapshot(ctx, g.ref); err != nil {
		return nil, fmt.Errorf("saving a guest: %w", err)
	}
	if err := driver.Remove(ctx, g.ref); err != nil {
		return nil, fmt.Errorf("removing a guest: %w", err)
	}
	g.ref = vmm.Ref{Instance: "clone", Generation: 1}
	spec.Ref = g.ref
	if err := driver.Clone(ctx, spec); err != nil {
		return nil, fmt.Errorf("cloning a guest: %w", err)
	}
	if err := g.dial(ctx); err != nil {
		return nil, err
	}
	if err := driver.Resume(ctx, g.ref); err != nil {
		return nil, fmt.Errorf("letting a clone run: %w", err)
	}
	if _, err := g.conn.Restore(ctx, call.Identity{
		Epoch: 1, UnixNano: time.Now().UnixNano(), Entropy: entropy, MachineID: "0123456789abcdef0123456789abcdef", BootID: "01234567-89ab-4def-8123-456789abcdef",
		Hostname: "direct", Instance: "direct", Node: "n1", LogStream: "s", InitType: "snap-start",
	}); err != nil {
		return nil, err
	}
	return g, nil
}

func (g *guest) dial(ctx context.Context) error {
	port, err := g.driver.DialCall(ctx, g.ref)
	if err != nil {
		return fmt.Errorf("connecting to a guest: %w", err)
	}
	g.conn = call.New(port, call.Options{})
	return nil
}

func (g *guest) stop() {
	var err error
	if g.conn != nil {
		err = g.conn.Close()
	}
	ctx := context.Background()
	if e := g.driver.Stop(ctx, g.ref, 0); !errors.Is(e, vmm.ErrNotFound) {
		err = errors.Join(err, e, g.driver.Remove(ctx, g.ref))
	}
	if err = errors.Join(err, g.driver.Close()); err != nil {
		say("ending the guest: %v", err)
	}
}

// unread takes an answer and throws it away.
type unread struct{}

func (unread) Begin(blixard.ResponseHead) error { return nil }
func (unread) Write(p []byte) (int, error)      { return len(p), nil }

// call invokes the function with a payload of the size that the gateway's has.
func (g *guest) call(ctx context.Context, payload []byte) (time.Duration, error) {
	began := time.Now()
	inv := blixard.Invocation{RequestID: "00000000-0000-4000-8000-000000000000", Function: "lean", Payload: payload, Deadline: began.Add(30 * time.Second), Received: began}
	_, err := g.conn.Invoke(ctx, &inv, call.Target{ARN: "arn:aws:lambda:us-east-1:000000000000:function:lean"}, unread{})
	if err != nil {
		return 0, fmt.Errorf("calling the guest: %w", err)
	}
	return time.Since(began), nil
}

// event is about what a trigger makes of the callers' request.
var event = []byte(`{"version":"2.0","routeKey":"ANY /bench/lean","rawPath":"/bench/lean","rawQueryString":"","headers":{"accept":"*/*","content-type":"application/json","content-length":"16",` +
	`"host":"127.0.0.1:40000","user-agent":"bench","x-forwarded-for":"127.0.0.1","x-forwarded-port":"40000","x-forwarded-proto":"http"},"requestContext":{"accountId":"000000000000",` +
	`"apiId":"blixard","domainName":"127.0.0.1","domainPrefix":"","http":{"method":"POST","path":"/bench/lean","protocol":"HTTP/1.1","sourceIp":"127.0.0.1","userAgent":"bench"},` +
	`"requestId":"00000000-0000-4000-8000-000000000000","routeKey":"ANY /bench/lean","stage":"$default","time":"24/Nov/2026:03:30:00 +0000","timeEpoch":1795491000000},` +
	`"body":"{\"name\":\"bench\"}","isBase64Encoded":false}`)

// benchWarm compares calls of a warm guest through the gateway with calls of a
// guest over its call port; they take turns.
func benchWarm(ctx context.Context, b *bench) error {
	n, err := startNode(ctx, b.settings, "warm")
	if err != nil {
		return err
	}
	defer n.stop()
	spec := bootstrap()
	spec.Scaling = &blixardv1.FunctionScaling{RecycleCalls: 1_000_000_000}
	if err := n.deploy(ctx, function{name: "lean", zip: b.code.lean, spec: spec}); err != nil {
		return err
	}
	g, err := startGuest(ctx, b, b.code.lean)
	if err != nil {
		return err
	}
	defer g.stop()
	client, err := dial(n.gateway, path("lean"))
	if err != nil {
		return err
	}
	defer client.close()
	var through, direct, inside times
	const turn, turns = 100, 20
	for i := range turns + 2 {
		for range turn {
			a, err := client.call(true)
			if err != nil {
				return err
			}
			if i >= 2 {
				through.add(a.took)
				inside = append(inside, ms(a.took)-a.parts["handler"]-a.parts["init"]-a.parts["transfer"])
			}
		}
		for range turn {
			took, err := g.call(ctx, event)
			if err != nil {
				return err
			}
			if i >= 2 {
				direct.add(took)
			}
		}
	}
	say("warm: p50 %.3f ms, p99 %.3f; direct to the guest: p50 %.3f, p99 %.3f; outside the call port: p50 %.3f, p99 %.3f (load %s)",
		through.at(0.5), through.at(0.99), direct.at(0.5), direct.at(0.99), inside.at(0.5), inside.at(0.99), loadNow())
	b.out.put("warm_p50_ms", through.at(0.5))
	b.out.put("warm_p99_ms", through.at(0.99))
	b.out.put("warm_direct_p50_ms", direct.at(0.5))
	b.out.put("warm_direct_p99_ms", direct.at(0.99))
	b.out.put("warm_over_direct_p50_ms", through.at(0.5)-direct.at(0.5))
	b.out.put("warm_over_direct_p99_ms", through.at(0.99)-direct.at(0.99))
	b.out.put("warm_outside_guest_p50_ms", inside.at(0.5))
	b.out.put("warm_outside_guest_p99_ms", inside.at(0.99))
	return nil
}
