package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// functionUser is whom the function runs as; it owns nothing but /tmp.
	functionUser = 993
	// functionPids bounds its processes and threads.
	functionPids = 1024
	// functionKillWait is how long killed processes may take to go.
	functionKillWait = 5 * time.Second
)

// functionProcesses starts the function's processes and ends them, whatever they
// have forked.
type functionProcesses struct {
	children *reaper
	log      *functionLog
	group    *functionGroup // nil: no cgroups here
	user     int            // 0: as the agent
	init     bool           // the agent is PID 1: all other processes are the function's

	mu      sync.Mutex
	running map[int]*functionProcess // by pid
}

type functionProcess struct {
	*process
	gone chan struct{} // closed when it was reaped
	exit functionExit  // then
}

// start runs a command. onExit, unless nil, is called once by a goroutine of its own.
func (p *functionProcesses) start(command functionCommand, onExit func(functionExit)) (*functionProcess, error) {
	path, err := lookPath(command.args[0], command.env)
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	dir := command.dir
	if dir == "" {
		dir = "/"
	}
	output := uintptr(p.log.pipe[1])
	attributes := &syscall.ProcAttr{
		Dir: dir, Env: command.env, Files: append([]uintptr{null.Fd(), output, output}, command.files...),
		Sys: &syscall.SysProcAttr{Setsid: true},
	}
	if p.user != 0 {
		attributes.Sys.Credential = &syscall.Credential{Uid: uint32(p.user), Gid: uint32(p.user)}
	}
	var kills int64
	if p.group != nil {
		attributes.Sys.UseCgroupFD, attributes.Sys.CgroupFD = true, p.group.fd
		kills = p.group.kills()
	}
	child, err := p.children.spawn(path, command.args, attributes)
	if err != nil {
		return nil, err
	}
	f := &functionProcess{process: child, gone: make(chan struct{})}
	p.mu.Lock()
	p.running[child.pid] = f
	p.mu.Unlock()
	// Whatever else happens: rather the function than the agent.
	if err := os.WriteFile("/proc/"+strconv.Itoa(child.pid)+"/oom_score_adj", []byte("500"), 0o600); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		logf("making the function the first to go when memory runs out: %v", err)
	}
	go func() {
		status := <-child.ended
		f.exit = functionExit{code: exitCode(status)}
		if status.Signaled() {
			f.exit.signal = status.Signal().String()
			f.exit.memory = p.group != nil && p.group.kills() > kills
		}
		p.mu.Lock()
		delete(p.running, child.pid)
		p.mu.Unlock()
		close(f.gone)
		if onExit != nil {
			onExit(f.exit)
		}
	}()
	return f, nil
}

// strike kills all of the function's processes and does not wait.
func (p *functionProcesses) strike() {
	if p.group != nil && p.group.kill() {
		return
	}
	p.mu.Lock()
	pids := make([]int, 0, len(p.running))
	for pid := range p.running { //order:any all are killed
		pids = append(pids, pid)
	}
	p.mu.Unlock()
	if p.init {
		// The agent is spared by the kernel.
		if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			logf("killing the function: %v", err)
		}
		return
	}
	for _, pid := range append(descendants(pids), pids...) {
		for _, target := range []int{-pid, pid} {
			if err := unix.Kill(target, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				logf("killing process %d: %v", target, err)
			}
		}
	}
}

// killAll kills all of the function's processes and returns when they are gone.
func (p *functionProcesses) killAll() {
	end := time.Now().Add(functionKillWait)
	for p.strike(); p.alive() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
		p.strike() // one may have forked meanwhile
	}
}

// alive tells whether a process of the function is left.
func (p *functionProcesses) alive() bool {
	p.mu.Lock()
	running := len(p.running)
	p.mu.Unlock()
	return running > 0 || p.group != nil && p.group.populated()
}

// signal goes to all processes that were started, and not to what they forked.
func (p *functionProcesses) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.running { //order:any all get it
		if err := f.process.signal(s); err != nil {
			logf("sending %s to process %d: %v", s, f.pid, err)
		}
	}
}

// prefaultBytes bounds what is mapped ahead of a process's files.
const prefaultBytes = 64 << 20

// prefault maps the programs of the function's processes, as far as they are not
// yet: a first call would meet one page fault after the other. Reading a page
// through /proc maps it, and its neighbours, for the process.
func (p *functionProcesses) prefault() {
	p.mu.Lock()
	pids := make([]int, 0, len(p.running))
	for pid := range p.running { //order:any each is treated the same
		pids = append(pids, pid)
	}
	p.mu.Unlock()
	for _, pid := range pids {
		if err := prefault("/proc/" + strconv.Itoa(pid)); err != nil {
			logf("mapping the program of process %d ahead: %v", pid, err)
		}
	}
}

func prefault(proc string) error {
	maps, err := os.ReadFile(proc + "/maps")
	if err != nil {
		return err
	}
	memory, err := unix.Open(proc+"/mem", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	left := int64(prefaultBytes)
	var word [1]byte
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line) // "start-end r-xp offset device inode path"
		if len(fields) < 6 || fields[1][0] != 'r' || !strings.HasPrefix(fields[5], "/") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, startErr := strconv.ParseInt(from, 16, 64)
		end, endErr := strconv.ParseInt(to, 16, 64)
		if startErr != nil || endErr != nil {
			continue
		}
		const around = 64 << 10 // the kernel maps so much at once
		for at := start; at < end && left > 0; at += around {
			left -= around
			// What cannot be read is not needed.
			if _, err := unix.Pread(memory, word[:], at); err != nil {
				break
			}
		}
	}
	return unix.Close(memory)
}

// descendants finds the children's children by their parents.
func descendants(roots []int) []int {
	parents := make(map[int][]int)
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it is gone
		}
		// The name, in parentheses, may hold anything.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if len(fields) < 2 {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil {
			parents[parent] = append(parents[parent], pid)
		}
	}
	var found []int
	for queue := roots; len(queue) > 0; queue = queue[1:] {
		children := parents[queue[0]]
		found = append(found, children...)
		queue = append(queue, children...)
	}
	return found
}

// functionGroup is the control group of the function's processes (version 2). Its
// files stay open, since they are asked on the path of a call.
type functionGroup struct {
	path                           string
	fd                             int
	current, peak, events, cpu, up int // descriptors; -1: not in this kernel
}

// newFunctionGroup makes the group; the error tells that this kernel has none.
func newFunctionGroup(root string) (*functionGroup, error) {
	if err := mount("cgroup2", root, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return nil, fmt.Errorf("mounting the control groups: %w", err)
	}
	if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+memory +pids +cpu"), 0o644); err != nil {
		return nil, fmt.Errorf("asking for controllers: %w", err)
	}
	g := &functionGroup{path: root + "/function"}
	if err := os.Mkdir(g.path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("making the function's group: %w", err)
	}
	fd, err := unix.Open(g.path, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the function's group: %w", err)
	}
	g.fd = fd
	for _, file := range []struct {
		name string
		to   *int
	}{{"memory.current", &g.current}, {"memory.peak", &g.peak}, {"memory.events", &g.events}, {"cpu.stat", &g.cpu}, {"cgroup.events", &g.up}} {
		// Not os.Open: its poller would be woken by each change of them.
		fd, err := unix.Open(g.path+"/"+file.name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil && file.name != "memory.peak" {
			return nil, fmt.Errorf("opening the function's group: %w", err)
		}
		*file.to = fd
	}
	return g, nil
}

// bound limits the group.
func (g *functionGroup) bound(memoryBytes int64) error {
	for _, setting := range [][2]string{
		{"memory.max", strconv.FormatInt(memoryBytes, 10)},
		{"memory.oom.group", "1"},
		{"pids.max", strconv.Itoa(functionPids)},
	} {
		if err := os.WriteFile(g.path+"/"+setting[0], []byte(setting[1]), 0o644); err != nil {
			return fmt.Errorf("bounding the function: %w", err)
		}
	}
	return nil
}

// kill sends SIGKILL to everything in the group; false: this kernel cannot.
func (g *functionGroup) kill() bool {
	return os.WriteFile(g.path+"/cgroup.kill", []byte("1"), 0o644) == nil
}

func (g *functionGroup) populated() bool { return readField(g.up, "populated ") > 0 }
func (g *functionGroup) kills() int64    { return readField(g.events, "oom_kill ") }
func (g *functionGroup) cpuTime() time.Duration {
	return time.Duration(readField(g.cpu, "usage_usec ")) * time.Microsecond
}

func (g *functionGroup) usedBytes() int64 { return readField(g.current, "") }

// peakBytes is what is used now, where the kernel does not know the peak.
func (g *functionGroup) peakBytes() int64 {
	if g.peak < 0 {
		return g.usedBytes()
	}
	return readField(g.peak, "")
}

// processes counts those of the group.
func (g *functionGroup) processes() int {
	text, err := os.ReadFile(g.path + "/cgroup.procs")
	if err != nil {
		return 0
	}
	return strings.Count(string(text), "\n")
}

// readField reads the number behind a name, from the beginning of a line.
func readField(fd int, name string) int64 {
	var buffer [1024]byte
	n, err := readAt(fd, buffer[:])
	if err != nil {
		return 0
	}
	text := buffer[:n]
	for at := 0; at < len(text); {
		end := at
		for end < len(text) && text[end] != '\n' {
			end++
		}
		if line := text[at:end]; len(line) >= len(name) && string(line[:len(name)]) == name {
			value := int64(0)
			for _, digit := range line[len(name):] {
				if digit < '0' || digit > '9' || value > 1<<56 {
					break
				}
				value = value*10 + int64(digit-'0')
			}
			return value
		}
		at = end + 1
	}
	return 0
}
