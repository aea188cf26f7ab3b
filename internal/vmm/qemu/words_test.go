package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/vmm"
)

func TestEndReason(t *testing.T) {
	killed, aborted, failed := ended{known: true, status: 9}, ended{known: true, status: 6 | 0x80}, ended{known: true, status: 1 << 8}
	for _, c := range []struct {
		name, log, console string
		end                ended
		want               string
	}{
		{"nothing known", "", "", ended{}, "process ended"},
		{"killed", "", "", killed, "QEMU was killed by signal 9 (killed)"},
		{"crashed", "qemu-system-x86_64: Assertion failed\n", "", aborted, "QEMU crashed by signal 6 (aborted): Assertion failed"},
		{"failed", "qemu-system-x86_64: warning: w\nqemu-system-x86_64: no such\x1b[31m option\n", "", failed, "QEMU failed with status 1: no such[31m option"},
		{"guest", "qemu_system_shutdown_request reason=6\n", "", ended{known: true}, "guest shut down"},
		{"guest, not our child", "12@3.4:qemu_system_shutdown_request reason=6\n", "", ended{}, "guest shut down"},
		{"quit", "qemu_system_shutdown_request reason=2\n", "", ended{}, "stopped by request"},
		{"reboot", "qemu_system_shutdown_request reason=7\n", "bye\n", ended{}, "guest rebooted"},
		{
			"panic", "qemu_system_shutdown_request reason=7\n", "[ 1.2] Kernel panic - not syncing: Attempted to kill init!\r\nmore\n",
			ended{},
			"guest kernel panicked: Attempted to kill init!",
		},
		{"too little memory", "", "", ended{known: true}, "the guest reset before its console came up; often it has too little memory"},
		{"reset without a word of QEMU", "", "bye\n", ended{known: true}, "guest rebooted"},
		{
			"memory used up", "", "[ 1.2] Kernel panic - not syncing: System is deadlocked on memory\r\n",
			ended{known: true},
			"guest kernel panicked: System is deadlocked on memory; it has too little memory",
		},
		{"new cause", "qemu_system_shutdown_request reason=42\n", "", ended{}, "QEMU shut down, cause 42"},
		{"terminated", "qemu-system-x86_64: terminating on signal 15 from pid 7 (x)\n", "", ended{known: true}, "QEMU was stopped by signal 15"},
		{"many lines", "1\n2\n3\n4\n", "", ended{}, "process ended: 2; 3; 4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			err := errors.Join(os.WriteFile(filepath.Join(dir, fileLog), []byte(c.log), 0o600),
				os.WriteFile(filepath.Join(dir, fileConsole), []byte(c.console), 0o600))
			if err != nil {
				t.Fatal(err)
			}
			if got := endReason(dir, c.end); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestParseStat(t *testing.T) {
	const rest = " S 17 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 424242 1 1"
	for _, name := range []string{"qemu", "a) Z 1 (b", "x\n)"} {
		stat, err := parseStat([]byte("123 (" + name + ")" + rest))
		if err != nil || stat.state != 'S' || stat.parent != 17 || stat.startTicks != 424242 {
			t.Errorf("%q: %+v, %v", name, stat, err)
		}
	}
	for _, text := range []string{"", "1", "1 (x) S", "1 (x) S a" + strings.Repeat(" b", 30)} {
		if stat, err := parseStat([]byte(text)); err == nil {
			t.Errorf("%q was taken for %+v", text, stat)
		}
	}
}

func TestMatchPorts(t *testing.T) {
	const told = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n" +
		"  TCP[HOST_FORWARD]  14       127.0.0.1 40879       10.0.2.15    80     0     0\r\n" +
		"  TCP[ESTABLISHED]   15       127.0.0.1 40879       10.0.2.15    80     0     0\r\n" +
		"  TCP[HOST_FORWARD]  12               * 37123       10.0.2.15    80     0     0\r\n" +
		"  TCP[HOST_FORWARD]  11       127.0.0.1  8080       10.0.2.15    80     0     0\r\n" +
		"  UDP[HOST_FORWARD]  13         0.0.0.0 41170       10.0.2.15    53     0     0\r\n"
	wanted := []vmm.Port{
		{HostIP: "127.0.0.1", GuestPort: 80},
		{Protocol: "udp", GuestPort: 53},
		{Protocol: "tcp", HostIP: "127.0.0.1", HostPort: 8080, GuestPort: 80},
		{Protocol: "tcp", HostIP: "0.0.0.0", GuestPort: 80},
	}
	ports, err := matchPorts(wanted, told)
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, p := range ports {
		got = append(got, p.HostPort)
	}
	if !slices.Equal(got, []int{40879, 41170, 8080, 37123}) || ports[0].Protocol != "tcp" || ports[3].HostIP != "0.0.0.0" {
		t.Errorf("%+v", ports)
	}
	if ports, err := matchPorts(wanted, "nothing"); err == nil {
		t.Errorf("from nothing: %+v", ports)
	}
}

func TestArguments(t *testing.T) {
	spec := vmm.Spec{
		Ref: webapp, VCPUs: 2, MemoryMiB: 256, Kernel: "/k", Initrd: "/i", Cmdline: "a=b",
		Disks:   []vmm.Disk{{Path: "/d,readonly=off", Format: "raw", ReadOnly: true}, {Path: "/e", Format: "qcow2", Overlay: true}},
		Network: vmm.Network{Mode: "tap", Tap: "blx0", MAC: "52:54:00:12:34:56"},
	}
	line := strings.Join(arguments(specRecord{UUID: "u-u", Spec: spec}, features{"kvm", true, true}), " ")
	for _, want := range []string{
		"-accel kvm -cpu host", "-sandbox on,", "-uuid u-u", "-smp 2 -m 256", "-kernel /k", "-initrd /i",
		"panic=-1 reboot=t a=b", "file=/d,,readonly=off,format=raw,readonly=on,snapshot=off", "file=/e,format=qcow2,readonly=off,snapshot=on",
		"tap,id=net0,ifname=blx0,script=no,downscript=no", "mac=52:54:00:12:34:56", "name=blixard.guest",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %s", want, line)
		}
	}
}

func TestCheck(t *testing.T) {
	kernel := guestFile(t, idleGuest)
	good := vmm.Spec{Ref: webapp, VCPUs: 1, MemoryMiB: 64, Kernel: kernel, Network: vmm.Network{Mode: "none"}}
	if err := check(good); err != nil {
		t.Fatal(err)
	}
	port := func(p vmm.Port) func(*vmm.Spec) {
		return func(s *vmm.Spec) { s.Network = vmm.Network{Mode: "user", Ports: []vmm.Port{p}} }
	}
	for name, spoil := range map[string]func(*vmm.Spec){
		"no kernel":         func(s *vmm.Spec) { s.Kernel = "" },
		"missing kernel":    func(s *vmm.Spec) { s.Kernel = kernel + "x" },
		"relative kernel":   func(s *vmm.Spec) { s.Kernel = "vmlinuz" },
		"missing initrd":    func(s *vmm.Spec) { s.Initrd = "/nonesuch" },
		"line break":        func(s *vmm.Spec) { s.Cmdline = "a\nb" },
		"disk format":       func(s *vmm.Spec) { s.Disks = []vmm.Disk{{Path: kernel, Format: "raw,file=/etc/shadow"}} },
		"network disk":      func(s *vmm.Spec) { s.Disks = []vmm.Disk{{Path: "nbd://host/x", Format: "raw"}} },
		"read-only overlay": func(s *vmm.Spec) { s.Disks = []vmm.Disk{{Path: kernel, Format: "raw", ReadOnly: true, Overlay: true}} },
		"too much memory":   func(s *vmm.Spec) { s.MemoryMiB = maxMemoryMiB + 1 },
		"MAC":               func(s *vmm.Spec) { s.Network.MAC = "52:54:00:12:34:56,romfile=/x" },
		"multicast MAC":     func(s *vmm.Spec) { s.Network.MAC = "01:00:5e:00:00:01" },
		"tap":               func(s *vmm.Spec) { s.Network = vmm.Network{Mode: "tap", Tap: "x,script=/bin/sh"} },
		"long tap":          func(s *vmm.Spec) { s.Network = vmm.Network{Mode: "tap", Tap: "abcdefghijklmnop"} },
		"ports without it":  func(s *vmm.Spec) { s.Network.Ports = []vmm.Port{{GuestPort: 1}} },
		"protocol":          port(vmm.Port{Protocol: "sctp", GuestPort: 1}),
		"host address":      port(vmm.Port{HostIP: "127.0.0.1:1-:1,hostfwd=tcp", GuestPort: 1}),
		"IPv6":              port(vmm.Port{HostIP: "::1", GuestPort: 1}),
	} {
		spec := good
		spoil(&spec)
		if err := check(spec); !errors.Is(err, vmm.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
}

// A process is found only when time and name agree.
func TestIdentifyRefusesStrangers(t *testing.T) {
	stat, err := readStat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	inc := &incarnation{ref: webapp, spec: specRecord{UUID: "11111111-2222-4333-8444-555555555555"}}
	for _, pid := range []int{os.Getpid(), 1, -1, 0, 1 << 30} {
		if p, err := identify(inc, pid, stat.startTicks); p != nil || err != nil {
			t.Errorf("pid %d: %+v, %v", pid, p, err)
		}
	}
	if err := unix.Kill(os.Getpid(), 0); err != nil {
		t.Error(err)
	}
}

func TestAddressesOfASubnet(t *testing.T) {
	for subnet, want := range map[string]string{
		"10.0.2.0/24":     ",host=10.0.2.2,dns=10.0.2.3,dhcpstart=10.0.2.15",
		"10.64.32.0/19":   ",host=10.64.32.2,dns=10.64.32.3,dhcpstart=10.64.32.15",
		"192.168.1.96/27": ",host=192.168.1.98,dns=192.168.1.99,dhcpstart=192.168.1.111",
	} {
		if got := addressesOf(subnet); got != want {
			t.Errorf("%s: %s, want %s", subnet, got, want)
		}
	}
}
