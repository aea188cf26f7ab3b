package image_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blixard/blixard/internal/guest"
	"github.com/blixard/blixard/internal/image"
)

// buildGuest compiles the guest agent once per test binary and points the
// store to it.
func buildGuest(t testing.TB) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "blixard-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/blixard/blixard/cmd/blixard-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the guest agent: %v\n%s", err, out)
	}
	t.Setenv("BLIXARD_GUEST", path)
}

// vm is one QEMU, without the driver that has its own tests.
type vm struct {
	t       *testing.T
	command *exec.Cmd
	dir     string
	http    int
	started time.Time
	exited  chan error
}

func startVM(t *testing.T, machine string, b image.Bundle, memoryMiB int) *vm {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("qemu-system-x86_64 is missing; run scripts/setup: %v", err)
	}
	// Unix socket paths are short, test directories are not.
	dir, err := os.MkdirTemp("", "blixard-boot") //nolint:usetesting // as said above
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{t: t, dir: dir, http: freePort(t), exited: make(chan error, 1)}
	suffix := "pci"
	if machine == "microvm" {
		suffix = "device"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", machine,
		"-accel", "tcg,tb-size=128", "-cpu", "max,la57=off", "-m", strconv.Itoa(memoryMiB), "-smp", "1",
		"-kernel", b.Kernel, "-initrd", b.Initrd,
		"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 reboot=t " + tscEarly(t) + b.Cmdline),
		"-chardev", "file,id=console,path=" + filepath.Join(dir, "console"), "-serial", "chardev:console",
		"-device", "virtio-serial-" + suffix + ",id=serial0",
		"-chardev", "socket,id=guest,path=" + filepath.Join(dir, "guest") + ",server=on,wait=off",
		"-device", "virtserialport,bus=serial0.0,nr=1,chardev=guest,name=" + guest.PortName,
		"-netdev", fmt.Sprintf("user,id=net0,hostfwd=tcp:127.0.0.1:%d-:80", v.http),
		"-device", "virtio-net-" + suffix + ",netdev=net0",
		"-device", "virtio-rng-" + suffix,
	}
	for i, disk := range b.Disks {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=disk%d,file=%s,format=%s,snapshot=on", i, disk.Path, disk.Format),
			"-device", fmt.Sprintf("virtio-blk-%s,drive=disk%d", suffix, i))
	}
	v.command = exec.Command(qemu, args...)
	var stderr bytes.Buffer
	v.command.Stderr = &stderr
	v.started = time.Now()
	if err := v.command.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		v.exited <- v.command.Wait()
	}()
	t.Cleanup(func() {
		if err := v.command.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		<-done
		if t.Failed() {
			t.Logf("console:\n%s\nqemu: %s", v.console(), stderr.String())
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return v
}

// tscEarly spares a loaded machine the clock calibration that may hang.
func tscEarly(t *testing.T) string {
	t.Helper()
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.HasPrefix(name, "cpu MHz") {
			if mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
				return fmt.Sprintf("tsc_early_khz=%d ", int(mhz*1000))
			}
		}
	}
	return ""
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return port
}

func (v *vm) console() []byte {
	text, err := os.ReadFile(filepath.Join(v.dir, "console"))
	if err != nil {
		return []byte(err.Error())
	}
	return text
}

// dial connects to the guest channel, as soon as QEMU has made its socket.
func (v *vm) dial(ctx context.Context) *guest.Client {
	v.t.Helper()
	for {
		conn, err := net.Dial("unix", filepath.Join(v.dir, "guest"))
		if err == nil {
			c, err := guest.Dial(ctx, conn)
			if err != nil {
				v.t.Fatal(err)
			}
			return c
		}
		select {
		case <-ctx.Done():
			v.t.Fatalf("QEMU made no socket: %v", err)
		case err := <-v.exited:
			v.t.Fatalf("QEMU has ended: %v", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (v *vm) get(ctx context.Context, path string) string {
	v.t.Helper()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", v.http, path), nil)
	if err != nil {
		v.t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		v.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return fmt.Sprintf("%d %s", response.StatusCode, body)
}

func (v *vm) waitExit(ctx context.Context) {
	v.t.Helper()
	select {
	case err := <-v.exited:
		v.exited <- err
		if err != nil {
			v.t.Errorf("QEMU ended with %v", err)
		}
	case <-ctx.Done():
		v.t.Errorf("QEMU did not end after the shutdown")
	}
}

func webConfig() guest.Config {
	return guest.Config{
		InstanceID: "webapp-1", VM: "webapp", Node: "node2", Generation: 3,
		Env: []string{"COLOUR=blue"}, Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: []string{"10.0.2.3"},
		ClockUnixNano: time.Now().UnixNano(),
	}
}

func TestBootBuiltinQ35(t *testing.T)     { bootBuiltin(t, "q35,sata=off,smbus=off,vmport=off") }
func TestBootBuiltinMicroVM(t *testing.T) { bootBuiltin(t, "microvm") }

func bootBuiltin(t *testing.T, machine string) {
	if testing.Short() {
		t.Skip("boots a microVM")
	}
	buildGuest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	b, err := image.Store{Root: t.TempDir()}.Builtin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	v := startVM(t, machine, b, 128)
	c := v.dial(ctx)
	state, err := c.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("spawn to guest channel: %s (guest uptime %d ms)", time.Since(v.started).Round(time.Millisecond), state.UptimeMS)
	if state.Configured || state.Workload != guest.WorkloadNone {
		t.Errorf("state of a new guest: %+v", state)
	}
	config := webConfig()
	for range 2 {
		if err := c.Configure(ctx, config); err != nil {
			t.Fatal(err)
		}
		config.ClockUnixNano++
	}
	if err := c.Check(ctx, guest.Check{Kind: "http", Port: 80, Path: "/healthz"}); err != nil {
		t.Error(err)
	}
	if got, want := v.get(ctx, "/"), "200 Hello from webapp-1 (generation 3) on node2\n"; got != want {
		t.Errorf("GET / is %q, want %q", got, want)
	}
	t.Logf("spawn to HTTP: %s", time.Since(v.started).Round(time.Millisecond))
	execInGuest(ctx, t, c)

	// A host that goes and comes again finds the same guest.
	for range 3 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		c = v.dial(ctx)
		again, err := c.State(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if again.BootID != state.BootID || !again.Configured || again.Workload != guest.WorkloadRunning {
			t.Errorf("state after dialling again: %+v", again)
		}
		t.Logf("dialled again in %s", time.Since(began).Round(time.Millisecond))
	}
	checkGuest(ctx, t, c)
	began := time.Now()
	if err := c.Shutdown(ctx, 1000); err != nil {
		t.Fatal(err)
	}
	v.waitExit(ctx)
	t.Logf("shut down in %s", time.Since(began).Round(time.Millisecond))
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(v.console(), []byte("demo server of webapp-1")) {
		t.Error("the workload's log is not on the console")
	}
}

func execInGuest(ctx context.Context, t *testing.T, c *guest.Client) {
	t.Helper()
	for _, tc := range []struct {
		request        guest.ExecRequest
		stdin          string
		code           int
		stdout, stderr string
	}{
		{guest.ExecRequest{Args: []string{"sh", "-c", "hostname; echo $COLOUR $BLIXARD_GENERATION; echo oops >&2; exit 7"}}, "", 7, "webapp-1\nblue 3\n", "oops\n"},
		{guest.ExecRequest{Args: []string{"tr", "a-z", "A-Z"}}, strings.Repeat("abc\n", 20_000), 0, strings.Repeat("ABC\n", 20_000), ""},
		{guest.ExecRequest{Args: []string{"sh", "-c", "stty size; tty"}, TTY: true, Rows: 33, Cols: 99}, "", 0, "33 99\r\n/dev/pts/0\r\n", ""},
		{guest.ExecRequest{Args: []string{"sh", "-c", "kill -9 $$"}}, "", 137, "", ""},
		{guest.ExecRequest{Args: []string{"pwd"}, Dir: "/root"}, "", 0, "/root\n", ""},
		// An orphan that PID 1 inherits and reaps, and that keeps no one waiting.
		{guest.ExecRequest{Args: []string{"sh", "-c", "sleep 0.05 & echo left"}}, "", 0, "left\n", ""},
	} {
		var stdout, stderr bytes.Buffer
		code, err := c.Exec(ctx, tc.request, strings.NewReader(tc.stdin), &stdout, &stderr, nil)
		if err != nil || code != tc.code || stdout.String() != tc.stdout || stderr.String() != tc.stderr {
			t.Errorf("exec %q: code %d, error %v, stdout %.200q, stderr %q", tc.request.Args, code, err, stdout.String(), stderr.String())
		}
	}
	if _, err := c.Exec(ctx, guest.ExecRequest{Args: []string{"no-such-program"}}, nil, nil, nil, nil); !errors.Is(err, guest.ErrCommand) {
		t.Errorf("exec of nothing: %v, want ErrCommand", err)
	}
	killed, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err := c.Exec(killed, guest.ExecRequest{Args: []string{"sleep", "1000"}}, nil, nil, nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec with a deadline: %v", err)
	}
}

func checkGuest(ctx context.Context, t *testing.T, c *guest.Client) {
	t.Helper()
	var log bytes.Buffer
	if err := c.Logs(ctx, guest.LogRequest{TailLines: 1}, &log); err != nil || !strings.Contains(log.String(), "webapp-1") {
		t.Errorf("logs: %q, %v", log.String(), err)
	}
	if err := c.Check(ctx, guest.Check{Kind: "tcp", Port: 81}); !errors.Is(err, guest.ErrUnhealthy) {
		t.Errorf("check of a closed port: %v", err)
	}
	if err := c.Check(ctx, guest.Check{Kind: "exec", Args: []string{"sh", "-c", "! ps | grep -q '[s]leep 1000'"}}); err != nil {
		t.Errorf("the abandoned exec still runs: %v", err)
	}
	if err := c.Check(ctx, guest.Check{Kind: "exec", Args: []string{"sh", "-c", "! grep -l '^State:.Z' /proc/[0-9]*/status"}}); err != nil {
		t.Errorf("zombies: %v", err)
	}
	if err := c.Check(ctx, guest.Check{Kind: "exec", Args: []string{"sleep", "9"}, TimeoutMS: 100}); !errors.Is(err, guest.ErrUnhealthy) {
		t.Errorf("check that takes too long: %v", err)
	}
	want := time.Now().Add(time.Hour)
	if err := c.SetClock(ctx, want.UnixNano()); err != nil {
		t.Error(err)
	}
	if state, err := c.State(ctx); err != nil || time.Unix(0, state.ClockUnixNano).Sub(want).Abs() > 10*time.Second {
		t.Errorf("clock is %s, want %s, %v", time.Unix(0, state.ClockUnixNano), want, err)
	}
	other := webConfig()
	other.Generation++
	if err := c.Configure(ctx, other); !errors.Is(err, guest.ErrConfigured) {
		t.Errorf("another configuration: %v", err)
	}
}

// A disk without a kernel gets ours, and blixard-guest moves to it.
func TestBootRootDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a microVM")
	}
	mkfs := "/sbin/mkfs.ext4" // not in everybody's PATH
	if _, err := os.Stat(mkfs); err != nil {
		t.Fatalf("mkfs.ext4 is missing; run scripts/setup: %v", err)
	}
	buildGuest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	busybox, err := image.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	root, dir := t.TempDir(), t.TempDir()
	write(t, root, "etc/blixard/command", `["/bin/busybox", "sh", "-c", "/bin/busybox grep ' / ' /proc/mounts; exec /bin/busybox sleep 1000"]`)
	write(t, root, "bin/nothing", "")
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-d", root, filepath.Join(dir, "rootfs.ext4"), "16M").CombinedOutput(); err != nil {
		t.Fatalf("making a disk: %v\n%s", err, out)
	}
	b, err := image.Store{Root: t.TempDir()}.Import(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	v := startVM(t, "q35,sata=off,smbus=off,vmport=off", b, 128)
	c := v.dial(ctx)
	if err := c.Configure(ctx, webConfig()); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	code, err := c.Exec(ctx, guest.ExecRequest{Args: []string{"/bin/busybox", "grep", " / ", "/proc/mounts"}}, nil, &out, nil, nil)
	if err != nil || code != 0 || !strings.Contains(out.String(), "/dev/vda / ext4 rw") {
		t.Errorf("root of the guest: %q, code %d, %v", out.String(), code, err)
	}
	if state, err := c.State(ctx); err != nil || state.Workload != guest.WorkloadRunning || state.Pid <= 1 {
		t.Errorf("state %+v, %v", state, err)
	}
	if err := c.Shutdown(ctx, 500); err != nil {
		t.Error(err)
	}
	v.waitExit(ctx)
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
