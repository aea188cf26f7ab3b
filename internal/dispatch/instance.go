package dispatch

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/call"
	"github.com/blixard/blixard/internal/route"
	"github.com/blixard/blixard/internal/vmm"
)

// How long steps of a start may take. A step that hangs is a failed start.
const (
	cloneLimit   = 30 * time.Second
	restoreLimit = 30 * time.Second
	bootLimit    = 2 * time.Minute
	killLimit    = time.Minute
	statLimit    = 2 * time.Second
	spinDown     = 500 * time.Millisecond
)

// instance is one guest, from when it was ordered until nothing is left of it.
type instance struct {
	id     route.InstanceID
	v      *version
	ctx    context.Context //nolint:containedctx // it ends what is under way for the instance when that is killed
	cancel context.CancelFunc

	// Written by the effect that holds turn, before the node is told.
	turn    sync.Mutex
	ref     vmm.Ref // of its hypervisor; a boot after a failed restore is another one
	name    string
	place   place // in the guests' network
	exists  bool  // ref has to be removed
	conn    *call.Conn
	kind    blixard.StartKind
	spawn   time.Duration
	restore time.Duration
	boot    time.Duration
	init    time.Duration

	minded *call.Conn // whose end is the instance's; guarded by the dispatcher's mu
}

// order begins a Spawn or a Start. Callers hold mu.
func (d *Dispatcher) order(a *route.Action) {
	in := d.instances[a.Instance]
	if in == nil {
		in = d.newInstance(a.Instance, d.versions[a.Revision])
	}
	if a.Kind == route.Spawn {
		d.chores.do(func(context.Context) { d.spawnAhead(in) })
		return
	}
	d.chores.do(func(context.Context) { d.start(in) })
}

// newInstance enters an instance into the books. Callers hold mu.
func (d *Dispatcher) newInstance(id route.InstanceID, v *version) *instance {
	in := &instance{id: id, v: v}
	in.ctx, in.cancel = context.WithCancel(context.Background())
	d.instances[id] = in
	d.nameInstance(in)
	return in
}

// nameInstance gives an instance a name that none had before. Callers hold mu.
func (d *Dispatcher) nameInstance(in *instance) {
	d.nextRef++
	in.place = d.placeOf(in.place)
	in.ref = vmm.Ref{Instance: "fn-" + d.nonce, Generation: d.nextRef}
	in.name = fmt.Sprintf("fn-%s-%d", d.nonce, d.nextRef)
}

// spawnAhead makes a clone for the pool.
func (d *Dispatcher) spawnAhead(in *instance) {
	in.turn.Lock()
	defer in.turn.Unlock()
	if in.ctx.Err() != nil {
		return // who killed it goes on
	}
	serial, err := d.clone(in)
	if err == nil && !in.v.hooked.Load() {
		if err = d.prime(in); errors.Is(err, errHooked) {
			// This one has had its hook; those that are pooled have it when they are used.
			in.v.hooked.Store(true)
			if err = d.remove(in); err == nil {
				d.mu.Lock()
				d.nameInstance(in)
				d.mu.Unlock()
				serial, err = d.clone(in)
			}
		}
	}
	if err != nil {
		d.startFailed(in, err)
		if t := d.wanted(in.v); errors.Is(err, vmm.ErrTemplate) && t != nil {
			d.templates.discard(t, serial)
			poke(d.look)
			d.rebuild(in.v, t)
		}
		return
	}
	d.mind(in)
	d.in(func(now int64) []route.Action { return d.node.Spawned(now, in.id) })
}

// start makes an instance ready for calls.
func (d *Dispatcher) start(in *instance) {
	in.turn.Lock()
	defer in.turn.Unlock()
	if in.ctx.Err() != nil {
		return // who killed it goes on
	}
	if err := d.bringUp(in); err != nil {
		d.startFailed(in, err)
		return
	}
	d.tell(in.v.rev, "ready", in.name, startWords(in))
	d.mind(in)
	d.in(func(now int64) []route.Action { return d.node.Started(now, in.id, in.kind) })
}

// bringUp restores a clone, or boots when there is no template or that fails.
func (d *Dispatcher) bringUp(in *instance) error {
	if in.conn != nil {
		in.kind, in.spawn = blixard.StartPooled, 0 // nobody waited for its spawning
		_, err := d.resume(in)
		if err == nil {
			return nil
		}
		if err := d.another(in, err); err != nil {
			return err
		}
	}
	for range 2 { // a template that cannot be cloned is made again, once
		t, err := d.template(in)
		if err != nil {
			return err
		}
		if t == nil {
			break
		}
		up, again, err := d.restored(in, t)
		if up || err != nil {
			return err
		}
		if !again {
			break
		}
	}
	in.kind, in.spawn, in.restore = blixard.StartBooted, 0, 0
	return d.bootUp(in)
}

// restored makes a clone of a template that is here; up tells that it is ready,
// again that the template is of no use and may be made once more.
func (d *Dispatcher) restored(in *instance, t *template) (up, again bool, err error) {
	in.kind = blixard.StartRestored
	serial, failed := d.clone(in)
	if failed == nil {
		_, failed = d.resume(in)
	}
	if failed == nil {
		return true, false, nil
	}
	if again = errors.Is(failed, vmm.ErrTemplate); again {
		d.templates.discard(t, serial)
	}
	return false, again, d.another(in, failed)
}

// another makes room for another hypervisor in place of one that could not be
// restored.
func (d *Dispatcher) another(in *instance, failed error) error {
	if in.ctx.Err() != nil {
		return failed
	}
	d.stats(in).restoreFailures.Add(1)
	d.tell(in.v.rev, "restore-failed", in.name, failed.Error())
	d.log.Warn("restoring a function's instance, which is started in another way", "event", "restore", "function", in.v.rev.String(), "instance", in.name, "error", failed)
	if err := d.remove(in); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.nameInstance(in)
	return nil
}

// template is what an instance is to be a clone of. When it is not here it is
// got or made, once for all who wait for it. It is nil when the instance has to
// be booted; an error is the function's own, which a boot would only repeat.
func (d *Dispatcher) template(in *instance) (*template, error) {
	if d.cloner == nil || in.v.spec.Snapshot == "off" {
		return nil, nil //nolint:nilnil // as it says
	}
	t, err := d.nameTemplate(in.ctx, in.v)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // a boot tells why
	}
	err = d.makeOnce(in.ctx, in.v, t)
	if _, ok := errors.AsType[*call.InitError](err); ok || in.ctx.Err() != nil {
		return nil, err
	}
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // it was logged; a boot is what is left
	}
	return t, nil
}

// clone makes a clone that does not run yet, of the template with that serial.
func (d *Dispatcher) clone(in *instance) (serial uint64, err error) {
	ctx, cancel := context.WithTimeout(in.ctx, cloneLimit)
	defer cancel()
	t := d.wanted(in.v)
	if t == nil || d.cloner == nil {
		return 0, errors.New("there is no template")
	}
	began := time.Now()
	spec, err := d.spec(ctx, in)
	if err != nil {
		return 0, err
	}
	spec.Template, serial = d.templates.use(t)
	in.exists = true
	if err := d.cloner.Clone(ctx, spec); err != nil {
		return serial, fmt.Errorf("cloning: %w", err)
	}
	port, err := d.o.Driver.DialCall(ctx, in.ref)
	if err != nil {
		return serial, fmt.Errorf("connecting to the clone: %w", err)
	}
	in.conn = call.New(port, call.Options{Log: d.logger(in)})
	in.spawn = time.Since(began)
	return serial, nil
}

// prime lets a clone for the pool run until it has taken an identity, and stops
// it again: what that costs the first time, under emulation the translation of
// all code on its way, no call waits for. It is told who it is once more when it
// is used, as its clock has stood still.
//
// A function that has hooks for its restore is not primed: they would run now,
// and what they fetch may be stale by then. errHooked tells that they have.
func (d *Dispatcher) prime(in *instance) error {
	ack, err := d.resume(in)
	if err != nil {
		return err
	}
	if ack.Hook > 0 {
		return errHooked
	}
	ctx, cancel := context.WithTimeout(in.ctx, restoreLimit)
	defer cancel()
	if err := d.cloner.Pause(ctx, in.ref); err != nil {
		return fmt.Errorf("pausing the clone: %w", err)
	}
	return nil
}

// errHooked: hooks of the function's own have run.
var errHooked = errors.New("the function has hooks for its restore")

// resume lets a clone run and makes it somebody of its own.
func (d *Dispatcher) resume(in *instance) (call.Ack, error) {
	ctx, cancel := context.WithTimeout(in.ctx, restoreLimit)
	defer cancel()
	began := time.Now()
	identity, err := d.identity(in, "snap-start")
	if err != nil {
		return call.Ack{}, err
	}
	if err := d.cloner.Resume(ctx, in.ref); err != nil {
		return call.Ack{}, fmt.Errorf("letting the clone run: %w", err)
	}
	ack, err := in.conn.Restore(ctx, identity)
	if err != nil {
		return call.Ack{}, fmt.Errorf("giving the clone its identity: %w", err)
	}
	in.restore = time.Since(began)
	return ack, nil
}

// bootUp starts an instance from the beginning.
func (d *Dispatcher) bootUp(in *instance) error {
	leave, err := d.bootRoom(in.ctx)
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := context.WithTimeout(in.ctx, bootLimit+d.initLimit(in.ctx, in.v))
	defer cancel()
	began := time.Now()
	spec, err := d.spec(ctx, in)
	if err != nil {
		return err
	}
	ready, err := d.boot(ctx, in, spec)
	if err != nil {
		return err
	}
	identity, err := d.identity(in, "on-demand")
	if err != nil {
		return err
	}
	if _, err := in.conn.Restore(ctx, identity); err != nil {
		return fmt.Errorf("giving the guest its identity: %w", err)
	}
	in.init = ready.Init
	in.boot = max(0, time.Since(began)-ready.Init)
	return nil
}

// bootRoom waits until one more guest may boot; leave makes room for the next.
func (d *Dispatcher) bootRoom(ctx context.Context) (leave func(), err error) {
	select {
	case d.boots <- struct{}{}:
		return func() { <-d.boots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for other guests to boot: %w", context.Cause(ctx))
	}
}

// boot starts a guest and has it initialise the function.
func (d *Dispatcher) boot(ctx context.Context, in *instance, spec vmm.Spec) (call.Ready, error) {
	in.exists = true
	if err := d.o.Driver.Start(ctx, spec); err != nil {
		return call.Ready{}, fmt.Errorf("booting: %w", err)
	}
	port, err := d.o.Driver.DialCall(ctx, in.ref)
	if err != nil {
		return call.Ready{}, fmt.Errorf("connecting to the guest: %w", err)
	}
	in.conn = call.New(port, call.Options{Log: d.logger(in)})
	init, err := d.init(ctx, in)
	if err != nil {
		return call.Ready{}, err
	}
	ready, err := in.conn.Init(ctx, init)
	if err != nil {
		return call.Ready{}, fmt.Errorf("initialising: %w", err)
	}
	return ready, nil
}

// startFailed cleans up and tells the node. Callers hold turn.
func (d *Dispatcher) startFailed(in *instance, err error) {
	killed := in.ctx.Err() != nil
	if !killed {
		d.stats(in).startFailures.Add(1)
		d.tell(in.v.rev, "start-failed", in.name, err.Error())
		d.log.Warn("starting a function's instance", "event", "start", "function", in.v.rev.String(), "instance", in.name, "error", err)
	}
	d.mu.Lock()
	in.v.failure = err.Error()
	d.mu.Unlock()
	if killed {
		return // who killed it ends it
	}
	if err := d.remove(in); err != nil {
		// It may still run: it counts until it is known not to.
		d.chores.do(func(ctx context.Context) { d.kill(ctx, in, "it could not be started") })
		return
	}
	d.gone(in)
}

// mind has the node told when an instance ends that was not killed. Callers hold
// turn.
func (d *Dispatcher) mind(in *instance) {
	conn := in.conn
	d.mu.Lock()
	known := in.minded == conn
	in.minded = conn
	d.mu.Unlock()
	if known {
		return
	}
	d.chores.do(func(context.Context) {
		select {
		case <-conn.Done():
		case <-in.ctx.Done():
			return
		}
		d.in(func(now int64) []route.Action {
			if in.minded != conn {
				return nil // another one has taken its place
			}
			return d.node.Lost(now, in.id)
		})
	})
}

// kill ends an instance, however long that takes, and leaves nothing of it.
func (d *Dispatcher) kill(ctx context.Context, in *instance, why string) {
	in.cancel()
	in.turn.Lock()
	defer in.turn.Unlock()
	if in.exists && in.conn != nil && in.conn.Err() == nil && (why == "idle" || why == "recycled" || why == "superseded") {
		d.spinDown(ctx, in)
	}
	if in.conn != nil { // who waits for an answer waits no longer than this
		if err := in.conn.Close(); err != nil {
			d.log.Debug("closing a guest's call port", "event", "kill", "instance", in.name, "error", err)
		}
	}
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		if !in.exists {
			break
		}
		err := d.stop(ctx, in)
		if err == nil {
			break
		}
		d.log.Error("ending a function's instance", "event", "kill", "instance", in.name, "error", err)
		if !pause(ctx, wait) {
			return // the next daemon will
		}
	}
	d.gone(in)
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 30*time.Second) {
		err := d.remove(in)
		if err == nil {
			return
		}
		d.log.Error("removing what a function's instance left", "event", "remove", "instance", in.name, "error", err)
		if !pause(ctx, wait) {
			return
		}
	}
}

// spinDown lets the function's extensions end in order.
func (d *Dispatcher) spinDown(ctx context.Context, in *instance) {
	ctx, cancel := context.WithTimeout(ctx, spinDown+500*time.Millisecond)
	defer cancel()
	if err := in.conn.Shutdown(ctx, "spindown", spinDown); err != nil {
		d.log.Debug("shutting a function's guest down", "event", "kill", "instance", in.name, "error", err)
	}
}

// stop ends the hypervisor.
func (d *Dispatcher) stop(ctx context.Context, in *instance) error {
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	err := d.o.Driver.Stop(ctx, in.ref, 0)
	if errors.Is(err, vmm.ErrNotFound) {
		err = nil
	}
	if in.conn != nil && err == nil {
		err = in.conn.Close()
	}
	return err
}

// remove leaves nothing of an incarnation. Callers hold turn.
func (d *Dispatcher) remove(in *instance) error {
	if !in.exists {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if err := d.stop(ctx, in); err != nil {
		return err
	}
	if err := d.o.Driver.Remove(ctx, in.ref); err != nil && !errors.Is(err, vmm.ErrNotFound) {
		return err
	}
	in.exists = false
	return nil
}

// gone tells the node that the instance's process has ended.
func (d *Dispatcher) gone(in *instance) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.instances[in.id] != in {
		return
	}
	in.cancel()
	d.perform(d.node.Died(d.nowMS(), in.id))
	delete(d.instances, in.id)
	delete(d.places, in.place.host)
}

// lookAt asks an idle guest whether it works on something.
func (d *Dispatcher) lookAt(in *instance) {
	working := false
	if in.turn.TryLock() {
		working = in.conn != nil && isWorking(in.ctx, in.conn)
		in.turn.Unlock()
	}
	d.in(func(now int64) []route.Action { return d.node.Looked(now, in.id, working) })
}

// isWorking tells whether a guest without a call uses its processor.
func isWorking(ctx context.Context, conn *call.Conn) bool {
	const (
		watch = 200 * time.Millisecond
		idle  = 20 * time.Millisecond // of that every guest may use
	)
	ctx, cancel := context.WithTimeout(ctx, statLimit)
	defer cancel()
	before, err := conn.Stat(ctx)
	if err != nil {
		return false // it is of no use
	}
	if before.Busy || before.Open > 0 {
		return true
	}
	if !pause(ctx, watch) {
		return false
	}
	after, err := conn.Stat(ctx)
	return err == nil && (after.Busy || after.CPU-before.CPU > idle)
}

// identity makes a guest somebody that no other is.
func (d *Dispatcher) identity(in *instance, kind string) (call.Identity, error) {
	var chance [64 + 16 + 16 + 8]byte
	if _, err := rand.Read(chance[:]); err != nil {
		return call.Identity{}, fmt.Errorf("drawing a guest's identity: %w", err)
	}
	entropy, machine, boot, epoch := chance[:64], chance[64:80], chance[80:96], chance[96:]
	net := d.network(in)
	id := call.Identity{
		Epoch: binary.BigEndian.Uint64(epoch)>>1 | 1, UnixNano: time.Now().UnixNano(), Entropy: entropy,
		MachineID: hex.EncodeToString(machine), BootID: uuid(boot), Hostname: in.name, Instance: in.name, Node: string(d.o.Node),
		LogStream: d.logStream(in), InitType: kind,
	}
	if net.Mode != "none" {
		id.MAC = net.MAC
		id.Address, id.Gateway, id.DNS = in.place.addresses()
	}
	return id, nil
}

func (d *Dispatcher) logStream(in *instance) string {
	return fmt.Sprintf("%s/[%s]%s", time.Now().UTC().Format("2006/01/02"), blixard.VersionName(in.v.rev.Number), in.name)
}

// uuid makes a random UUID of 16 random bytes.
func uuid(b []byte) string {
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// spec is what the driver needs to run an instance.
func (d *Dispatcher) spec(ctx context.Context, in *instance) (vmm.Spec, error) {
	v := in.v
	bundle, err := d.o.Images.Function(ctx)
	if err != nil {
		return vmm.Spec{}, err
	}
	disks, err := d.disks(ctx, v)
	if err != nil {
		return vmm.Spec{}, err
	}
	return vmm.Spec{
		Ref: in.ref, VCPUs: max(v.spec.VCPUs, 1), MemoryMiB: int(v.spec.MemoryMiB), Kernel: bundle.Kernel, Initrd: bundle.Initrd, Cmdline: bundle.Cmdline,
		Disks: disks, Network: d.network(in), CallPort: true,
		Labels: []string{"function=" + string(v.rev.Function), "version=" + blixard.VersionName(v.rev.Number)},
	}, nil
}

// disks of a guest: its code, and its runtime when that is not in the image.
func (d *Dispatcher) disks(ctx context.Context, v *version) ([]vmm.Disk, error) {
	if err := d.haveCode(ctx, v); err != nil {
		return nil, err
	}
	path, err := d.o.Code.Disk(ctx, v.code)
	if err != nil {
		return nil, fmt.Errorf("making the disk of the code: %w", err)
	}
	disks := []vmm.Disk{{Path: path, Format: "raw", ReadOnly: true}}
	runtime, err := d.o.Images.Runtime(ctx, blixard.RuntimeKind(v.spec.Runtime))
	if err != nil {
		return nil, fmt.Errorf("finding the runtime: %w", err)
	}
	if runtime.Path != "" {
		disks = append(disks, vmm.Disk{Path: runtime.Path, Format: runtime.Format, ReadOnly: true})
	}
	return disks, nil
}

// initLimit is what initialisation may take on this machine.
func (d *Dispatcher) initLimit(ctx context.Context, v *version) time.Duration {
	limit := time.Duration(v.spec.InitMS) * time.Millisecond
	if caps, err := d.o.Driver.Capabilities(ctx); err == nil && caps.Acceleration != "kvm" {
		limit *= time.Duration(d.o.Limits.EmulatedTime)
	}
	return limit
}

// init is what starts the function in a guest that has booted.
func (d *Dispatcher) init(ctx context.Context, in *instance) (call.Init, error) {
	v := in.v
	entropy := make([]byte, 64)
	if _, err := rand.Read(entropy); err != nil {
		return call.Init{}, fmt.Errorf("drawing entropy: %w", err)
	}
	s := &v.spec
	init := call.Init{
		Function: string(v.rev.Function), Version: blixard.VersionName(v.rev.Number), ARN: v.arn, Region: d.o.Region,
		Runtime: blixard.RuntimeKind(s.Runtime), Handler: s.Handler, Command: s.Command, Port: s.Port, Env: s.Env,
		MemoryMiB: s.MemoryMiB, EphemeralMiB: s.EphemeralMiB, TimeoutMS: s.TimeoutMS, InitMS: d.initLimit(ctx, v).Milliseconds(),
		Concurrency: max(s.TargetConcurrency, 1), LogGroup: "/aws/lambda/" + string(v.rev.Function), LogStream: d.logStream(in),
		InitializationType: "on-demand", CodeDevice: "/dev/vda", UnixNano: time.Now().UnixNano(), Entropy: entropy, Hostname: in.name,
	}
	if spec := d.network(in); spec.Mode != "none" {
		init.Address, init.Gateway, init.DNS = in.place.addresses()
	}
	runtime, err := d.o.Images.Runtime(ctx, init.Runtime)
	if err != nil {
		return call.Init{}, fmt.Errorf("finding the runtime: %w", err)
	}
	if runtime.Path != "" {
		init.RuntimeDevice = "/dev/vdb"
	}
	return init, nil
}

func startWords(in *instance) string {
	switch in.kind {
	case blixard.StartBooted:
		return fmt.Sprintf("booted in %d ms", (in.boot + in.init).Milliseconds())
	case blixard.StartPooled:
		return fmt.Sprintf("from the pool in %d ms", in.restore.Milliseconds())
	default:
		return fmt.Sprintf("restored in %d ms", (in.spawn + in.restore).Milliseconds())
	}
}
