package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blixard/blixard/internal/converge"
)

// heartbeats asks for the lease again and again. Calls overlap: one that hangs
// must not use up the time in which another would have succeeded.
func (a *Agent) heartbeats(ctx context.Context) {
	const atOnce = 4
	var calls sync.WaitGroup
	defer calls.Wait()
	free := make(chan struct{}, atOnce)
	tick := time.NewTicker(a.o.HeartbeatEvery)
	defer tick.Stop()
	for {
		select {
		case free <- struct{}{}:
			calls.Go(func() {
				a.heartbeat(ctx)
				<-free
			})
		default:
		}
		select {
		case <-ctx.Done():
			return
		case <-a.beatWake:
		case <-tick.C:
			a.noticeSilence()
		}
	}
}

func (a *Agent) heartbeat(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, a.o.Lease)
	defer cancel()
	sent := a.clock.nowMS()
	ack, err := a.o.Cluster.Heartbeat(ctx)
	switch {
	case err != nil:
		a.o.Metrics.heartbeats.WithLabelValues("failed").Inc()
		a.log.Debug("heartbeat failed", "event", "heartbeat", "error", err)
	case !ack.OK:
		a.o.Metrics.heartbeats.WithLabelValues("refused").Inc()
		a.mu.Lock()
		report := a.lease.Refused(sent)
		a.mu.Unlock()
		if report {
			poke(a.nodeWake)
		}
	default:
		a.o.Metrics.heartbeats.WithLabelValues("ok").Inc()
		a.acknowledged(sent, ack)
	}
}

// acknowledged takes a lease that began when the heartbeat was sent.
func (a *Agent) acknowledged(sentMS int64, ack Ack) {
	a.mu.Lock()
	back, plan := a.lease.Granted(sentMS, a.clock.nowMS(), ack.Index, a.index)
	keep := a.guarded() || a.leaseKept
	a.o.Metrics.leaseUntil.Set(float64(a.lease.Lease().UntilMS) / 1000)
	a.mu.Unlock()
	if keep {
		a.keepLease()
	}
	if back {
		a.log.Info("in touch with the leader", "event", "contact", "index", ack.Index)
	}
	if plan {
		poke(a.wake)
	}
}

// noticeSilence says once that the lease has run out.
func (a *Agent) noticeSilence() {
	a.mu.Lock()
	lost := a.lease.Silent(a.clock.nowMS())
	a.mu.Unlock()
	if lost {
		a.log.Warn("lost touch with the leader: instances that stop on partition are stopped, others run on", "event", "silence")
	}
}

// guarded tells whether anything here may run under a lease only. Callers hold
// mu.
func (a *Agent) guarded() bool {
	if len(a.under) > 0 {
		return true
	}
	for _, s := range a.found {
		if s.Pid != 0 && hasLabel(s.Labels, labelStops) {
			return true
		}
	}
	for _, l := range a.locals { //order:any a question of existence
		if l.StopsOnPartition && l.Busy != converge.None {
			return true
		}
	}
	return false
}

// leaseRecord is the lease file. Times are on CLOCK_BOOTTIME, which all
// processes of one boot share.
type leaseRecord struct {
	// Membership is whose lease it is; see Options.Membership.
	Membership string       `json:"membership,omitempty"`
	BootID     string       `json:"boot_id"`
	UntilMS    int64        `json:"until_ms"`
	KillMS     int64        `json:"kill_ms"` // when the watchdog kills
	Targets    []targetInfo `json:"targets"`
	// Pending are the directories of incarnations whose start has begun.
	Pending []string `json:"pending,omitempty"`
	// Under are directories: whatever works below one must not outlast the lease.
	Under []string `json:"under,omitempty"`
}

// empty tells whether there is nothing to watch over.
func (r *leaseRecord) empty() bool { return len(r.Targets)+len(r.Pending)+len(r.Under) == 0 }

// targetInfo is a process that must not outlast the lease.
type targetInfo struct {
	Pid        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"` // of /proc/<pid>/stat, so that a reused pid is spared
}

func leasePath(dataDir string) string { return filepath.Join(dataDir, "lease.json") }

// keepLease writes the lease down. A failure is not fatal: what is on disk only
// ever ends sooner.
func (a *Agent) keepLease() {
	a.mu.Lock()
	now, boot := a.clock.nowMS(), bootTime().Milliseconds()
	r := leaseRecord{Membership: a.o.Membership, BootID: bootID(), UntilMS: boot + a.lease.Lease().SureMS - now, KillMS: boot + a.lease.KillMS() - now}
	for _, s := range a.found {
		if s.Pid != 0 && hasLabel(s.Labels, labelStops) {
			if ticks, err := startTicks(s.Pid); err == nil {
				r.Targets = append(r.Targets, targetInfo{s.Pid, ticks})
			}
		}
	}
	for ref, l := range a.locals { //order:any a set
		if l.StopsOnPartition && l.Busy == converge.Start && a.o.WorkDir != nil {
			r.Pending = append(r.Pending, a.o.WorkDir(vmmRef(ref)))
		}
	}
	r.Under = a.under
	a.leaseKept = !r.empty()
	a.mu.Unlock()
	data, err := json.Marshal(r)
	if err == nil {
		err = replaceFile(leasePath(a.o.DataDir), data)
	}
	if err != nil {
		a.log.Error("keeping the lease", "event", "lease", "error", err)
		return
	}
	if !r.empty() {
		a.tendWatchdog()
	}
}

// MayRun tells whether what runs under this node's lease may go on; it says no
// as long before the lease's end as killing takes.
func (a *Agent) MayRun() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.clock.nowMS() < a.lease.StartByMS()
}

// Guard has the watchdog end every process that works below dir when the lease
// is about to run out, from now on and for as long as this daemon lives. It
// returns when the watchdog knows.
func (a *Agent) Guard(dir string) {
	a.mu.Lock()
	known := slices.Contains(a.under, dir)
	if !known {
		a.under = append(slices.Clone(a.under), dir)
	}
	a.mu.Unlock()
	if !known || a.tendsNone() {
		a.keepLease()
	}
}

// tendsNone tells whether no watchdog was started by this daemon.
func (a *Agent) tendsNone() bool {
	a.watchdogTurn.Lock()
	defer a.watchdogTurn.Unlock()
	return a.watchdogPid == 0
}

var leaseFileTurn sync.Mutex // heartbeats overlap

// replaceFile replaces a file in one step. It is not synced: the file is of no
// use after the machine has gone down.
func replaceFile(path string, data []byte) error {
	leaseFileTurn.Lock()
	defer leaseFileTurn.Unlock()
	next := path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", next, err)
	}
	if err := os.Rename(next, path); err != nil {
		return fmt.Errorf("replacing %s: %w", path, err)
	}
	return nil
}

func readLease(dataDir string) (leaseRecord, error) {
	var r leaseRecord
	data, err := os.ReadFile(leasePath(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, fmt.Errorf("reading the lease: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("reading the lease: %w", err)
	}
	if r.BootID != bootID() {
		return leaseRecord{}, nil // of another life of the machine
	}
	return r, nil
}

// recallLease takes up the lease of a former daemon, unless that was of another
// member: then what it covered is ended.
func (a *Agent) recallLease(ctx context.Context) error {
	if err := os.MkdirAll(a.o.DataDir, 0o700); err != nil {
		return fmt.Errorf("creating the agent's directory: %w", err)
	}
	r, err := readLease(a.o.DataDir)
	if err != nil {
		// Without it what stops on partition is stopped, which is safe.
		a.log.Log(context.Background(), slog.LevelWarn, "the lease of the former daemon cannot be used", "event", "lease", "error", err)
		return nil
	}
	if converge.Void(r.Membership, a.o.Membership) {
		for _, v := range r.victims() { // also what works below a guarded directory
			if err := v.kill(); err != nil {
				return fmt.Errorf("ending process %d of a former member: %w", v.pid, err)
			}
		}
		return a.endFormer(ctx)
	}
	a.mu.Lock()
	a.under = r.Under // left-overs there are watched over until they are cleared
	a.mu.Unlock()
	if r.UntilMS > 0 {
		a.mu.Lock()
		a.lease.Recall(a.clock.nowMS(), r.UntilMS-bootTime().Milliseconds())
		a.mu.Unlock()
	}
	return nil
}

// endFormer kills what stops on partition and was started by a former member.
func (a *Agent) endFormer(ctx context.Context) error {
	found, err := a.o.Driver.List(ctx)
	if err != nil {
		return fmt.Errorf("looking for what a former member of this machine runs: %w", err)
	}
	for _, s := range found {
		if s.Pid == 0 || !hasLabel(s.Labels, labelStops) {
			continue
		}
		a.log.Log(ctx, slog.LevelWarn, "ending what a former member of this machine started", "event", "fence", "instance", s.Ref.Instance, "generation", s.Ref.Generation)
		if err := a.o.Driver.Stop(ctx, s.Ref, 0); err != nil {
			return fmt.Errorf("ending %s of a former member: %w", s.Ref, err)
		}
	}
	return nil
}

// bootID tells one life of the machine from another; "" if that is not known.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
