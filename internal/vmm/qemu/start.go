package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/blixard/blixard/internal/vmm"
)

// Start implements vmm.Driver.
func (d *Driver) Start(ctx context.Context, spec vmm.Spec) error {
	ref := spec.Ref
	release, err := d.beginStart(ctx, ref)
	if err != nil {
		return err
	}
	defer release()
	if err := check(spec); err != nil {
		return err
	}
	if spec.Template != "" {
		return d.startTemplate(ctx, spec)
	}
	probed, err := d.probe(ctx)
	if err != nil {
		return fmt.Errorf("starting %s: %w", ref, err)
	}
	inc, err := d.prepare(specRecord{Spec: spec})
	if err != nil {
		return fmt.Errorf("preparing %s: %w", ref, err)
	}
	p, err := d.spawn(inc, arguments(inc.spec, probed.Features))
	if err != nil {
		return fmt.Errorf("starting %s: %w", ref, err)
	}
	if err := d.settle(ctx, inc, p); err != nil {
		return d.giveUp(ctx, inc, p, err)
	}
	d.log.Info("started vm", "instance", ref.Instance, "generation", ref.Generation, "pid", p.pid, "acceleration", probed.Features.Acceleration)
	return nil
}

// beginStart has the caller be the only one who changes ref, which was never
// started.
func (d *Driver) beginStart(ctx context.Context, ref vmm.Ref) (release func(), err error) {
	if err := ref.Check(); err != nil {
		return nil, err
	}
	release, err = d.takeTurn(ctx, ref, changing)
	if err != nil {
		return nil, err
	}
	inc, err := d.load(ref)
	if err == nil && inc.started {
		err = fmt.Errorf("%s: %w", ref, vmm.ErrStarted)
	}
	if err != nil && !errors.Is(err, vmm.ErrNotFound) {
		release()
		return nil, err
	}
	return release, nil
}

// giveUp ends what was spawned and could not be brought to work: it must not run
// on unnoticed, also when the caller has gone.
func (d *Driver) giveUp(ctx context.Context, inc *incarnation, p *process, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTimeout)
	defer cancel()
	return fmt.Errorf("starting %s: %w", inc.ref, errors.Join(why, d.kill(ctx, p)))
}

// prepare makes the directory with the specification in it, durably unless it is
// a clone's.
func (d *Driver) prepare(record specRecord) (*incarnation, error) {
	uuid, err := newUUID()
	if err != nil {
		return nil, err
	}
	record.Ref, record.UUID, record.Format = record.Spec.Ref, uuid, 1
	inc := &incarnation{ref: record.Ref, dir: d.dir(record.Ref), spec: record}
	if err := os.MkdirAll(inc.dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating its directory: %w", err)
	}
	if !record.Clone {
		if err := syncDir(filepath.Dir(inc.dir)); err != nil {
			return nil, err
		}
	}
	return inc, writeJSON(filepath.Join(inc.dir, fileSpec), record, !record.Clone)
}

// spawn marks inc started and makes the process, which gets files as its
// descriptors from 3 on; from the mark on there is no second try.
func (d *Driver) spawn(inc *incarnation, arguments []string, files ...*os.File) (*process, error) {
	if err := markStarted(inc, startedRecord{BootID: d.boot, StartedAtUnixMS: time.Now().UnixMilli()}); err != nil {
		return nil, err
	}
	inc.started = true
	log, err := os.OpenFile(filepath.Join(inc.dir, fileLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening QEMU's log: %w", err)
	}
	defer log.Close() // QEMU has its own descriptor of it
	if err := lockLog(log); err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("opening the null device: %w", err)
	}
	defer null.Close()
	binary, err := d.binary()
	if err != nil {
		return nil, err
	}
	pidfd := -1
	attributes := &os.ProcAttr{
		Dir: inc.dir,
		// An overlay of a disk is a file that QEMU makes in TMPDIR and unlinks at
		// once; if it dies in between, the file goes with the directory.
		Env:   []string{"PATH=" + os.Getenv("PATH"), "LANG=C", "TMPDIR=" + inc.dir},
		Files: append([]*os.File{null, log, log}, files...),
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	}
	group := d.openGroup(inc)
	if group != nil {
		defer group.Close() // it was only read
		attributes.Sys.UseCgroupFD, attributes.Sys.CgroupFD = true, int(group.Fd())
	}
	argv := append([]string{d.options.Binary}, arguments...)
	proc, err := os.StartProcess(binary, argv, attributes)
	if err != nil && group != nil { // Linux before 5.7 cannot begin a process in a group
		attributes.Sys.UseCgroupFD = false
		proc, err = os.StartProcess(binary, argv, attributes)
	}
	if err != nil {
		return nil, fmt.Errorf("spawning %s: %w", binary, err)
	}
	pid := proc.Pid
	if pidfd < 0 {
		return nil, fmt.Errorf("spawning %s: the kernel is too old for pidfds, Linux 5.4 is needed", binary)
	}
	if err := proc.Release(); err != nil { // the watch waits for it
		return nil, fmt.Errorf("releasing process %d: %w", pid, err)
	}
	// An unreaped child keeps its pid, so this reads our process and no other.
	stat, err := readStat(pid)
	if err != nil {
		return nil, err
	}
	inc.process = &processRecord{Pid: pid, StartTicks: stat.startTicks, BootID: d.boot}
	p := &process{ref: inc.ref, dir: inc.dir, pid: pid, pidfd: pidfd, child: true, gone: make(chan struct{})}
	if p, err = d.watch.add(p); err != nil {
		return nil, err
	}
	if group != nil && !attributes.Sys.UseCgroupFD {
		d.limit(inc, p)
	}
	if err := writeJSON(filepath.Join(inc.dir, fileProcess), inc.process, false); err != nil {
		return p, errors.Join(err, d.kill(context.Background(), p))
	}
	return p, nil
}

// lockLog takes the lock that tells of life; a List that looks at it right now
// holds it for a moment.
func lockLog(log *os.File) error {
	for range 100 {
		if ours, err := lockFile(log, syscall.LOCK_EX); err != nil || ours {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("another process has the log of this incarnation locked")
}

// settle waits until QEMU answers and writes down the host ports it has bound.
func (d *Driver) settle(ctx context.Context, inc *incarnation, p *process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d.options.StartTimeout,
		fmt.Errorf("QEMU did not answer within %s", d.options.StartTimeout))
	defer cancel()
	err := d.awaitControl(ctx, p)
	if err == nil {
		err = d.control(ctx, inc.ref, func(q *qmpConn) error { return learnPorts(ctx, q, inc) })
	}
	if err == nil && len(inc.process.Ports) > 0 {
		err = writeJSON(filepath.Join(inc.dir, fileProcess), inc.process, false)
	}
	return whyNot(ctx, p, err)
}

// whyNot has the end of a process that was just spawned explain the error that
// it came with.
func whyNot(ctx context.Context, p *process, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() == nil {
		await(ctx, p, dyingTimeout) // its socket closes a little before it ends
	}
	select {
	case <-p.gone:
		return fmt.Errorf("QEMU ended at once: %s", explainStart(readReason(p.dir)))
	default:
		return err
	}
}

// awaitControl polls for QEMU's control socket, which appears within some 50 ms.
func (d *Driver) awaitControl(ctx context.Context, p *process) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Lstat(filepath.Join(p.dir, sockQMP)); err == nil {
			conn, err := dial(ctx, p.dir, sockQMP)
			if err == nil {
				return conn.Close()
			}
		}
		select {
		case <-p.gone:
			return vmm.ErrNotRunning
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// explainStart adds what to do to the refusals people meet.
func explainStart(reason string) string {
	switch {
	case strings.Contains(reason, "host forwarding rule"):
		return reason + "; the host port is taken or not allowed: publish another one, or 0 for any"
	case strings.Contains(reason, "Cannot allocate memory"), strings.Contains(reason, "cannot set up guest memory"):
		return reason + "; the host has not that much memory"
	default:
		return reason
	}
}

// forward matches a line of "info usernet", such as
// TCP[HOST_FORWARD]  14       127.0.0.1 40879       10.0.2.15    80     0     0.
var forward = regexp.MustCompile(`(?m)^\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)\s`)

// learnPorts asks which host ports were bound: a zero host port is passed on to
// the kernel, so there is no race for a port between choosing and binding it.
func learnPorts(ctx context.Context, q *qmpConn, inc *incarnation) error {
	network := inc.spec.Spec.Network
	if network.Mode != "user" || len(network.Ports) == 0 {
		return nil
	}
	var text string
	err := q.execute(ctx, "human-monitor-command", map[string]string{"command-line": "info usernet"}, &text)
	if err != nil {
		return fmt.Errorf("asking for the published ports: %w", err)
	}
	ports, err := matchPorts(network.Ports, text)
	if err != nil {
		return err
	}
	inc.process.Ports = ports
	return nil
}

// matchPorts fills in the host ports of wanted from the text of "info usernet".
// Two wishes that differ only in their zero host port take what is there in turn.
func matchPorts(wanted []vmm.Port, text string) ([]vmm.Port, error) {
	type bound struct {
		vmm.Port
		taken bool
	}
	var found []bound
	for _, m := range forward.FindAllStringSubmatch(text, -1) {
		host, err1 := strconv.Atoi(m[3])
		guest, err2 := strconv.Atoi(m[4])
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("reading the published ports: %w", err)
		}
		found = append(found, bound{Port: vmm.Port{Protocol: strings.ToLower(m[1]), HostIP: m[2], HostPort: host, GuestPort: guest}})
	}
	ports := make([]vmm.Port, len(wanted))
	// Those with a given host port first, lest another takes their line.
	for _, given := range []bool{true, false} {
		for i, want := range wanted {
			if (want.HostPort != 0) != given {
				continue
			}
			for j := range found {
				f := &found[j]
				if !f.taken && f.Protocol == protocol(want) && f.GuestPort == want.GuestPort && sameIP(f.HostIP, want.HostIP) &&
					(!given || f.HostPort == want.HostPort) {
					f.taken = true
					ports[i] = want
					ports[i].Protocol, ports[i].HostPort = f.Protocol, f.HostPort
					break
				}
			}
			if ports[i].HostPort == 0 {
				return nil, fmt.Errorf("QEMU does not tell of published port %d", want.GuestPort)
			}
		}
	}
	return ports, nil
}

func sameIP(told, wanted string) bool {
	anyTold := told == "*" || told == "0.0.0.0"
	anyWanted := wanted == "" || wanted == "0.0.0.0"
	return anyTold == anyWanted && (anyTold || told == wanted)
}

func dial(ctx context.Context, dir, socket string) (net.Conn, error) {
	var conn net.Conn
	err := inDir(dir, func(short string) (err error) {
		var dialer net.Dialer
		conn, err = dialer.DialContext(ctx, "unix", short+"/"+socket)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", socket, err)
	}
	return conn, nil
}
