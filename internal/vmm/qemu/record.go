package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

// Files of an incarnation's directory. Sockets are addressed relative to the
// directory, by QEMU through its working directory and by us through
// /proc/self/fd, since a UNIX socket's path is limited to 107 bytes.
const (
	fileSpec    = "spec.json"    // what was asked for; the incarnation is Prepared
	fileStarted = "started"      // durable before anything is spawned
	fileProcess = "process.json" // which process it became
	fileExit    = "exit.json"    // how that process ended
	fileLog     = "qemu.log"     // stdout and stderr of QEMU; locked while it lives
	fileConsole = "console.log"
	sockQMP     = "qmp.sock"
	sockGuest   = "guest.sock"
	sockConsole = "console.sock"
	sockCall    = "call.sock"
	fileMemory  = "memory"  // of a guest that is to become a template
	fileDevices = "devices" // its state, while it is being saved
)

type specRecord struct {
	Ref    vmm.Ref
	UUID   string // on QEMU's command line; proves that a process is ours
	Spec   vmm.Spec
	Clone  bool `json:",omitempty"` // of Spec.Template, which else is to be built
	Format int
}

type startedRecord struct {
	BootID          string
	StartedAtUnixMS int64
}

type processRecord struct {
	Pid        int
	StartTicks uint64 // field 22 of /proc/<pid>/stat
	BootID     string
	Ports      []vmm.Port `json:",omitempty"`
}

type exitRecord struct {
	Reason       string
	EndedAtUnixM int64 `json:"EndedAtUnixMS"`
}

// incarnation is what a directory tells about one incarnation.
type incarnation struct {
	ref       vmm.Ref
	dir       string
	spec      specRecord
	started   bool
	startedAt time.Time
	process   *processRecord
	exit      *exitRecord
}

// load reads the directory of ref. A file that is missing or torn by a crash
// means that its step did not happen, except the started marker: that it exists
// is enough.
func load(dir string, ref vmm.Ref) (*incarnation, error) {
	if _, err := os.Lstat(dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", ref, vmm.ErrNotFound)
		}
		return nil, fmt.Errorf("reading %s: %w", ref, err)
	}
	inc := &incarnation{ref: ref, dir: dir}
	if _, err := readJSON(filepath.Join(dir, fileSpec), &inc.spec); err != nil {
		return nil, err
	}
	info, err := os.Stat(filepath.Join(dir, fileStarted))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading %s: %w", ref, err)
	}
	if err == nil {
		inc.started, inc.startedAt = true, info.ModTime()
		var mark startedRecord
		if ok, err := readJSON(filepath.Join(dir, fileStarted), &mark); err != nil {
			return nil, err
		} else if ok {
			inc.startedAt = time.UnixMilli(mark.StartedAtUnixMS)
		}
	}
	var process processRecord
	if ok, err := readJSON(filepath.Join(dir, fileProcess), &process); err != nil {
		return nil, err
	} else if ok {
		inc.process = &process
	}
	var exit exitRecord
	if ok, err := readJSON(filepath.Join(dir, fileExit), &exit); err != nil {
		return nil, err
	} else if ok {
		inc.exit = &exit
	}
	return inc, nil
}

// readJSON tells whether path holds a value; a missing or unreadable JSON text
// is none, only a failing disk is an error.
func readJSON(path string, into any) (bool, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading %s: %w", filepath.Base(path), err)
	}
	return json.Unmarshal(text, into) == nil, nil
}

// writeJSON replaces path by value in one step; durably when asked.
func writeJSON(path string, value any, durable bool) error {
	text, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", filepath.Base(path), err)
	}
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	_, err = f.Write(text)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err == nil && durable {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	return nil
}

// markStarted writes the marker, durably unless inc is a clone; ErrStarted when
// it is there already, whoever wrote it.
func markStarted(inc *incarnation, mark startedRecord) error {
	text, err := json.Marshal(mark)
	if err != nil {
		return fmt.Errorf("encoding the start marker: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(inc.dir, fileStarted), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", inc.ref, vmm.ErrStarted)
	}
	if err != nil {
		return fmt.Errorf("marking %s as started: %w", inc.ref, err)
	}
	_, err = f.Write(text)
	if durable := !inc.spec.Clone; durable {
		if err == nil {
			err = f.Sync()
		}
		if err = errors.Join(err, f.Close()); err == nil {
			err = syncDir(inc.dir)
		}
	} else {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("marking %s as started: %w", inc.ref, err)
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening directory: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}

// lockFile takes a lock on f, LOCK_EX or LOCK_SH; false when it would have to
// wait for another open file's.
func lockFile(f *os.File, kind int) (bool, error) {
	err := unix.Flock(int(f.Fd()), kind|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return true, nil
}

// logHeld tells whether some process still has QEMU's log open. The lock was
// taken before the process was forked and dies with its last descriptor, so it
// tells life from death also when nobody managed to write down the pid.
func logHeld(dir string) (bool, error) {
	f, err := os.Open(filepath.Join(dir, fileLog))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening %s: %w", fileLog, err)
	}
	free, err := lockFile(f, unix.LOCK_SH) // shared, as others may be looking too
	return !free && err == nil, errors.Join(err, f.Close())
}
