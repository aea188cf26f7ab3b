package qemu

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/blixard/blixard/internal/vmm"
)

const (
	machine       = "q35,sata=off,smbus=off,vmport=off"
	shutdownTrace = "qemu_system_shutdown_request" // writes why it ends to the log
	guestPort     = "blixard.guest"                // the virtio-serial port's name
	callPort      = "blixard.call"
	maxVCPUs      = 255
	maxMemoryMiB  = 4 << 20
	minMemoryMiB  = 8
	emulatedCPU   = "max,la57=off"
	// translationMiB bounds what emulation takes for translated code.
	translationMiB = 128
)

// sandbox forbids QEMU to start programs or gain rights; it never has to.
var sandbox = []string{"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"}

// features is what the probe found usable; it decides about the command line.
type features struct {
	Acceleration string // kvm, tcg
	Sandbox      bool
	Trace        bool
}

func (f features) machineArguments() []string { return f.argumentsFor(machine, translationMiB) }

func (f features) argumentsFor(machine string, translationMiB int) []string {
	arguments := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", machine}
	if f.Acceleration == "kvm" {
		arguments = append(arguments, "-accel", "kvm", "-cpu", "host")
	} else {
		// Five-level paging only makes emulated page walks longer.
		arguments = append(arguments, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", translationMiB), "-cpu", emulatedCPU)
	}
	if f.Sandbox {
		arguments = append(arguments, sandbox...)
	}
	if f.Trace {
		arguments = append(arguments, "-trace", "enable="+shutdownTrace)
	}
	return arguments
}

var (
	macPattern  = regexp.MustCompile(`^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$`)
	tapPattern  = regexp.MustCompile(`^[a-zA-Z0-9][-a-zA-Z0-9_.]{0,14}$`)
	diskFormats = map[string]bool{"raw": true, "qcow2": true}
)

// check refuses what QEMU would refuse late, or understand as something else.
// Errors wrap vmm.ErrInvalid.
func check(spec vmm.Spec) error { return checkSpec(spec, true) }

// checkSpec is check for a guest that boots, or for a clone, which does not and
// needs no kernel.
func checkSpec(spec vmm.Spec, boots bool) error {
	if err := spec.Ref.Check(); err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return fmt.Errorf("vm %s: %s: %w", spec.Ref, fmt.Sprintf(format, args...), vmm.ErrInvalid)
	}
	if spec.VCPUs < 1 || spec.VCPUs > maxVCPUs {
		return bad("%d vCPUs, want 1 to %d", spec.VCPUs, maxVCPUs)
	}
	if spec.MemoryMiB < minMemoryMiB || spec.MemoryMiB > maxMemoryMiB {
		return bad("%d MiB of memory, want %d to %d", spec.MemoryMiB, minMemoryMiB, maxMemoryMiB)
	}
	var files []string
	if boots {
		if spec.Kernel == "" {
			return bad("no kernel")
		}
		if strings.ContainsAny(spec.Cmdline, "\x00\n\r") {
			return bad("the kernel command line has a line break or NUL in it")
		}
		files = append(files, spec.Kernel)
		if spec.Initrd != "" {
			files = append(files, spec.Initrd)
		}
	}
	if t := spec.Template; t != "" && (!filepath.IsAbs(t) || strings.ContainsRune(t, 0)) {
		return bad("template %q is not an absolute path", t)
	}
	for _, disk := range spec.Disks {
		if !diskFormats[disk.Format] {
			return bad("disk %s has format %q, want raw or qcow2", disk.Path, disk.Format)
		}
		if disk.ReadOnly && disk.Overlay {
			return bad("disk %s is to be read-only and written to an overlay", disk.Path)
		}
		if spec.Template != "" && !disk.ReadOnly {
			return bad("disk %s of a template can be written; what the guest had written before it was saved would be missing in its clones", disk.Path)
		}
		files = append(files, disk.Path)
	}
	for _, path := range files {
		// QEMU runs in the incarnation's directory: a relative path would be
		// another file there.
		if !strings.HasPrefix(path, "/") || strings.ContainsRune(path, 0) {
			return bad("%q is not an absolute path", path)
		}
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("vm %s: %w: %w", spec.Ref, vmm.ErrInvalid, err)
		}
	}
	return checkNetwork(spec.Network, bad)
}

func checkNetwork(n vmm.Network, bad func(string, ...any) error) error {
	if n.MAC != "" && !macPattern.MatchString(n.MAC) {
		return bad("MAC address %q, want six lower-case hexadecimal bytes of a unicast address", n.MAC)
	}
	if len(n.Ports) > 0 && n.Mode != "user" {
		return bad("published ports need network mode user, not %q", n.Mode)
	}
	if err := n.CheckSubnet(); err != nil {
		return err
	}
	switch n.Mode {
	case "none", "user":
	case "tap":
		if !tapPattern.MatchString(n.Tap) {
			return bad("tap device %q", n.Tap)
		}
	default:
		return bad("network mode %q, want user, tap or none", n.Mode)
	}
	for _, p := range n.Ports {
		if protocol(p) != "tcp" && protocol(p) != "udp" {
			return bad("protocol %q of a published port, want tcp or udp", p.Protocol)
		}
		if p.HostPort < 0 || p.HostPort > 65535 || p.GuestPort < 1 || p.GuestPort > 65535 {
			return bad("published port %d:%d is out of range", p.HostPort, p.GuestPort)
		}
		if p.HostIP == "" {
			continue
		}
		if ip, err := netip.ParseAddr(p.HostIP); err != nil || !ip.Is4() {
			return bad("host address %q of a published port, want IPv4", p.HostIP)
		}
	}
	return nil
}

func protocol(p vmm.Port) string {
	if p.Protocol == "" {
		return "tcp"
	}
	return p.Protocol
}

// arguments is QEMU's command line; sockets and logs are relative to its
// working directory.
func arguments(record specRecord, f features) []string {
	spec := record.Spec
	a := append(f.machineArguments(),
		"-name", "guest="+spec.Ref.String(),
		"-uuid", record.UUID,
		"-smp", strconv.Itoa(spec.VCPUs),
		"-m", strconv.Itoa(spec.MemoryMiB),
		"-kernel", spec.Kernel,
		"-append", strings.TrimSpace(strings.TrimSpace("console=ttyS0 quiet panic=-1 reboot=t "+f.clockWord())+" "+spec.Cmdline),
		"-chardev", socket("qmp", sockQMP), "-mon", "chardev=qmp,mode=control",
		"-chardev", socket("console", sockConsole)+",logfile="+fileConsole+",logappend=on", "-serial", "chardev:console",
		// First of the virtio devices, so that the guest sees /dev/vport0p1.
		"-device", "virtio-serial-pci,id=serial0",
		"-chardev", socket("guest", sockGuest), "-device", "virtserialport,bus=serial0.0,nr=1,chardev=guest,name="+guestPort,
		"-device", "virtio-rng-pci",
	)
	if spec.CallPort {
		a = append(a, "-chardev", socket("call", sockCall), "-device", "virtserialport,bus=serial0.0,nr=2,chardev=call,name="+callPort)
	}
	if spec.Initrd != "" {
		a = append(a, "-initrd", spec.Initrd)
	}
	a = append(a, diskArguments(spec.Disks)...)
	return append(a, networkArguments(spec.Network)...)
}

func diskArguments(disks []vmm.Disk) (a []string) {
	for i, disk := range disks {
		a = append(a,
			"-drive", fmt.Sprintf("if=none,id=disk%d,file=%s,format=%s,readonly=%s,snapshot=%s", i, escape(disk.Path), disk.Format, onOff(disk.ReadOnly), onOff(disk.Overlay)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	return a
}

func networkArguments(n vmm.Network) []string {
	device := "virtio-net-pci,netdev=net0,romfile="
	if n.MAC != "" {
		device += ",mac=" + n.MAC
	}
	switch n.Mode {
	case "user":
		var b strings.Builder
		b.WriteString("user,id=net0")
		if n.Subnet != "" {
			b.WriteString(",net=" + n.Subnet + addressesOf(n.Subnet))
		}
		for _, p := range n.Ports {
			fmt.Fprintf(&b, ",hostfwd=%s:%s:%d-:%d", protocol(p), p.HostIP, p.HostPort, p.GuestPort)
		}
		return []string{"-netdev", b.String(), "-device", device}
	case "tap":
		return []string{"-netdev", "tap,id=net0,ifname=" + n.Tap + ",script=no,downscript=no", "-device", device}
	default:
		return nil
	}
}

// addressesOf says which addresses of a subnet are the gateway's, the name server's
// and the guest's by DHCP. Left to itself QEMU puts 2.2, 2.3 and 2.15 at the end of
// networks that are larger than 256.
func addressesOf(subnet string) string {
	p, err := netip.ParsePrefix(subnet)
	if err != nil || !p.Addr().Is4() {
		return "" // CheckSubnet has refused it
	}
	at := func(n byte) string {
		a := p.Masked().Addr().As4()
		a[3] += n
		return netip.AddrFrom4(a).String()
	}
	return ",host=" + at(2) + ",dns=" + at(3) + ",dhcpstart=" + at(15)
}

func socket(id, path string) string {
	return "socket,id=" + id + ",path=" + path + ",server=on,wait=off"
}

// escape protects a value within an option list, where a comma separates.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
