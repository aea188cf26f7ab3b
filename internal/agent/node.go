package agent

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard"
)

const (
	nodeReportRetry = time.Second
	nodeReportEvery = 30 * time.Second // the machine is looked at so often
)

// nodeReports tells the cluster what the machine is: at first, when that
// changes, and when the leader asks for it.
func (a *Agent) nodeReports(ctx context.Context) {
	var told *NodeReport
	for {
		wait := nodeReportEvery
		report, err := a.nodeReport(ctx)
		if err == nil && (told == nil || !reflect.DeepEqual(*told, report)) {
			if err = a.o.Cluster.ReportNode(ctx, report); err == nil {
				told = &report
				a.mu.Lock()
				a.lease.Reported(a.clock.nowMS())
				a.mu.Unlock()
				poke(a.beatWake) // the lease is given from now on
				a.log.Info("reported the node", "event", "node", "capacity", report.Capacity, "hypervisors", report.Hypervisors, "acceleration", report.Acceleration)
			}
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			told, wait = nil, nodeReportRetry
			a.log.Warn("reporting the node failed and is tried again", "event", "node", "error", err)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-a.nodeWake:
			timer.Stop()
			told = nil
			if !pause(ctx, nodeReportRetry) { // a leader that refuses on does not make us spin
				return
			}
		}
	}
}

func (a *Agent) nodeReport(ctx context.Context) (NodeReport, error) {
	r := NodeReport{Reserved: a.o.Reserved, MaxInstances: a.o.MaxInstances, Release: a.o.Release, FeatureLevel: blixard.FeatureLevel}
	capabilities, err := a.o.Driver.Capabilities(ctx)
	if err != nil {
		// A node whose hypervisor does not work is a member all the same.
		if ctx.Err() != nil {
			return r, ctx.Err()
		}
		a.log.Warn("the hypervisor does not work here", "event", "node", "error", err)
	} else {
		r.Hypervisors, r.Acceleration = []string{capabilities.Driver}, capabilities.Acceleration
		a.mu.Lock()
		news := a.capabilities != capabilities
		a.capabilities = capabilities
		a.mu.Unlock()
		if news {
			poke(a.wake)
		}
	}
	if r.Capacity, err = MachineCapacity(a.o.DataDir); err != nil {
		return r, err
	}
	if r.Reserved.MemoryMiB < 0 {
		r.Reserved.MemoryMiB = DefaultReservedMiB(r.Capacity.MemoryMiB)
		if c := a.o.Capacity; c != nil && c.MemoryMiB > 0 {
			r.Reserved.MemoryMiB = 0 // who says what is offered has kept what is to be kept
		}
	}
	if c := a.o.Capacity; c != nil {
		r.Capacity.MilliCPU = cmp.Or(c.MilliCPU, r.Capacity.MilliCPU)
		r.Capacity.MemoryMiB = cmp.Or(c.MemoryMiB, r.Capacity.MemoryMiB)
		r.Capacity.DiskMiB = cmp.Or(c.DiskMiB, r.Capacity.DiskMiB)
	}
	return r, nil
}

// DefaultReservedMiB is how much of a machine's memory is kept for itself when
// nobody says: for its system, this server, and what each QEMU needs beside its
// guest's memory.
func DefaultReservedMiB(machineMiB int64) int64 {
	return min(max(machineMiB/20, 512), 8<<10, machineMiB/4)
}

// MachineCapacity is what this machine has; its disk is the file system of dir.
func MachineCapacity(dir string) (blixard.Resources, error) {
	r := blixard.Resources{MilliCPU: int64(runtime.NumCPU()) * 1000}
	var err error
	if r.MemoryMiB, err = memoryMiB("/proc/meminfo"); err != nil {
		return r, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return r, fmt.Errorf("asking for the size of the disk of %s: %w", dir, err)
	}
	r.DiskMiB = int64(fs.Blocks) * fs.Bsize >> 20
	return r, nil
}

func memoryMiB(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("asking for the size of the memory: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemTotal:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("reading the size of the memory: %w", err)
			}
			return kib >> 10, nil
		}
	}
	return 0, fmt.Errorf("%s does not tell the size of the memory", path)
}
