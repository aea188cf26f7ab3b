package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/blixard/blixard/internal/call"
)

// Requests of /dev/random (linux/random.h).
const (
	rndAddEntropy = 0x40085203
	rndReseed     = 0x5207
)

const (
	bootIDFile  = "/proc/sys/kernel/random/boot_id"
	entropySize = 64
)

// identityFileBytes is the size of the files below; what is not used is line ends.
const identityFileBytes = 1024

// functionIdentity is by what a guest is told from others. Files are mapped and
// sockets opened while it boots: a clone writes into memory and asks the kernel for
// little, since an emulator would have to translate all of what that does.
type functionIdentity struct {
	random, netlink                                     int // descriptors
	restore, machineID, bootID, hostname, hosts, resolv []byte

	device  string // of the network; "" without one
	index   uint32
	up      bool
	address netip.Prefix // that it has
	dns     string       // content of resolv.conf
}

// open makes ready what a clone will write to.
func (f *functionIdentity) open() error {
	for _, dir := range []string{"/run/blixard", "/etc"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("preparing the identity: %w", err)
		}
	}
	const bootID = "/run/blixard/boot_id"
	var err error
	if f.random, err = unix.Open("/dev/urandom", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("opening the kernel's generator: %w", err)
	}
	for _, file := range []struct {
		path string
		to   *[]byte
		size int
	}{
		{restoreFile, &f.restore, identityFileBytes},
		{"/etc/machine-id", &f.machineID, 33},
		{bootID, &f.bootID, 37},
		{"/etc/hostname", &f.hostname, 256},
		{"/etc/hosts", &f.hosts, identityFileBytes},
		{"/etc/resolv.conf", &f.resolv, identityFileBytes},
	} {
		if *file.to, err = mapFile(file.path, file.size); err != nil {
			return fmt.Errorf("preparing %s: %w", file.path, err)
		}
	}
	// The kernel's own is the template's in all clones.
	current, err := os.ReadFile(bootIDFile)
	if err != nil {
		return fmt.Errorf("reading the boot ID: %w", err)
	}
	if err := rewrite(f.bootID, string(current)); err != nil {
		return fmt.Errorf("writing the boot ID: %w", err)
	}
	if err := rewrite(f.hosts, "127.0.0.1 localhost\n"); err != nil {
		return fmt.Errorf("writing the hosts: %w", err)
	}
	if err := unix.Mount(bootID, bootIDFile, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("replacing the boot ID: %w", err)
	}
	if f.netlink, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	if err := unix.Bind(f.netlink, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	if err := withNetlink(func(n *netlink) error { return n.up("lo", 0) }); err != nil {
		return fmt.Errorf("bringing up lo: %w", err)
	}
	return nil
}

// assume is what a guest that boots is told.
func (f *functionIdentity) assume(init *call.Init) error {
	devices, err := filepath.Glob("/sys/class/net/*/device")
	if err != nil {
		return err
	}
	if len(devices) > 0 {
		f.device = filepath.Base(filepath.Dir(devices[0]))
		device, err := net.InterfaceByName(f.device)
		if err != nil {
			return fmt.Errorf("looking at %s: %w", f.device, err)
		}
		f.index = uint32(device.Index)
		// Only IPv4 is given, and what IPv6 does by itself would do it in each clone.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+f.device+"/disable_ipv6", []byte("1"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("turning IPv6 off: %w", err)
		}
	}
	name := init.Hostname
	if name == "" {
		name = "function"
	}
	return f.become(&call.Identity{
		UnixNano: init.UnixNano, Entropy: init.Entropy, Hostname: name,
		Address: init.Address, Gateway: init.Gateway, DNS: init.DNS, MTU: init.MTU,
	})
}

// identify implements functionMachine.
func (m *functionGuest) identify(identity *call.Identity) ([]string, error) {
	if len(identity.Entropy) < entropySize {
		return nil, fmt.Errorf("%d bytes of entropy, want %d", len(identity.Entropy), entropySize)
	}
	if err := m.identity.become(identity); err != nil {
		return nil, err
	}
	if identity.CheckClone {
		return m.identity.seen(identity)
	}
	return nil, nil
}

// become takes an identity. The first thing that fails ends it: a clone that is
// somebody else in part must not be used.
func (f *functionIdentity) become(i *call.Identity) error {
	if len(i.Entropy) > 0 {
		if err := f.reseed(i.Entropy); err != nil {
			return fmt.Errorf("reseeding the kernel's generator: %w", err)
		}
	}
	if i.UnixNano > 0 {
		now := unix.NsecToTimespec(i.UnixNano)
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			return fmt.Errorf("setting the clock: %w", err)
		}
	}
	for _, file := range []struct {
		file    []byte
		name    string
		content string
	}{
		{f.machineID, "machine-id", i.MachineID},
		{f.bootID, "boot_id", i.BootID},
		{f.hostname, "hostname", i.Hostname},
	} {
		if file.content == "" {
			continue
		}
		if strings.IndexByte(file.content, '\n') >= 0 {
			return fmt.Errorf("a line break in the %s", file.name)
		}
		if err := rewrite(file.file, file.content+"\n"); err != nil {
			return fmt.Errorf("writing the %s: %w", file.name, err)
		}
	}
	if i.Hostname != "" {
		if err := unix.Sethostname([]byte(i.Hostname)); err != nil {
			return fmt.Errorf("setting the host name: %w", err)
		}
	}
	if err := f.network(i); err != nil {
		return fmt.Errorf("setting up the network: %w", err)
	}
	if err := f.names(i); err != nil {
		return err
	}
	if i.Epoch == 0 {
		return nil
	}
	b := make([]byte, 0, 256)
	b = append(append(b, "epoch="...), strconv.FormatUint(i.Epoch, 10)...)
	b = append(append(b, "\ninstance="...), i.Instance...)
	b = append(append(b, "\nnode="...), i.Node...)
	b = append(append(b, "\nunix_ns="...), strconv.FormatInt(i.UnixNano, 10)...)
	b = append(append(b, "\nlog_stream="...), i.LogStream...)
	if err := rewrite(f.restore, string(append(b, '\n'))); err != nil {
		return fmt.Errorf("writing %s: %w", restoreFile, err)
	}
	return nil
}

// mapFile makes a file of line ends and maps it.
func mapFile(path string, size int) ([]byte, error) {
	if err := os.WriteFile(path, bytes.Repeat([]byte{'\n'}, size), 0o644); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// rewrite replaces a mapped file's content.
func rewrite(file []byte, content string) error {
	if len(content) > len(file) {
		return unix.ENOSPC
	}
	for i := copy(file, content); i < len(file); i++ {
		file[i] = '\n'
	}
	return nil
}

// reseed adds entropy and has the kernel use it at once.
func (f *functionIdentity) reseed(entropy []byte) error {
	pool := binary.NativeEndian.AppendUint32(make([]byte, 0, 8+len(entropy)+4), uint32(8*len(entropy)))
	pool = binary.NativeEndian.AppendUint32(pool, uint32(len(entropy)))
	pool = append(pool, entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.random), rndAddEntropy, uintptr(unsafe.Pointer(&pool[0]))); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(f.random), rndReseed, 0); errno != 0 {
		return errno
	}
	return nil
}

// names writes what names resolve by, when that changes.
func (f *functionIdentity) names(i *call.Identity) error {
	if i.Hostname != "" {
		address := "127.0.1.1"
		if f.address.IsValid() {
			address = f.address.Addr().String()
		}
		if err := rewrite(f.hosts, "127.0.0.1 localhost\n"+address+" "+i.Hostname+"\n"); err != nil {
			return fmt.Errorf("writing the hosts: %w", err)
		}
	}
	if len(i.DNS) == 0 {
		return nil
	}
	content := ""
	for _, server := range i.DNS {
		if _, err := netip.ParseAddr(server); err != nil {
			return fmt.Errorf("DNS server %q: %w", server, err)
		}
		content += "nameserver " + server + "\n"
	}
	if content == f.dns {
		return nil
	}
	if err := rewrite(f.resolv, content); err != nil {
		return fmt.Errorf("writing the DNS servers: %w", err)
	}
	f.dns = content
	return nil
}

// network gives the interface its address, all in one message to the kernel.
func (f *functionIdentity) network(i *call.Identity) error {
	if i.MAC == "" && i.Address == "" {
		return nil
	}
	if f.device == "" {
		return errors.New("the guest has no network device")
	}
	var batch netlinkBatch
	link := []byte{unix.AF_UNSPEC, 0, 0, 0}
	link = binary.NativeEndian.AppendUint32(link, f.index)
	var flags uint32
	if !f.up {
		flags = unix.IFF_UP
	}
	link = binary.NativeEndian.AppendUint32(link, flags)
	link = binary.NativeEndian.AppendUint32(link, flags)
	if i.MAC != "" {
		mac, err := hex.DecodeString(strings.ReplaceAll(i.MAC, ":", ""))
		if err != nil || len(mac) != 6 {
			return fmt.Errorf("MAC address %q", i.MAC)
		}
		link = attribute(link, unix.IFLA_ADDRESS, mac)
	}
	if i.MTU > 0 {
		link = attribute(link, unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(i.MTU)))
	}
	if !f.up || i.MAC != "" || i.MTU > 0 {
		batch.add(unix.RTM_NEWLINK, 0, link)
	}
	wanted := f.address
	if i.Address != "" {
		var err error
		if wanted, err = netip.ParsePrefix(i.Address); err != nil {
			return fmt.Errorf("address %q: %w", i.Address, err)
		}
		if f.address.IsValid() && f.address != wanted {
			batch.add(unix.RTM_DELADDR, 0, addressBody(f.index, f.address))
		}
		if f.address != wanted {
			batch.add(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, addressBody(f.index, wanted))
		}
		if i.Gateway != "" {
			gateway, err := netip.ParseAddr(i.Gateway)
			if err != nil {
				return fmt.Errorf("gateway %q: %w", i.Gateway, err)
			}
			route := []byte{family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
			route = attribute(route, unix.RTA_GATEWAY, gateway.AsSlice())
			route = attribute(route, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, f.index))
			batch.add(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, route)
		}
	}
	if err := batch.send(f.netlink); err != nil {
		return err
	}
	f.address, f.up = wanted, true
	return nil
}

func addressBody(index uint32, address netip.Prefix) []byte {
	body := []byte{family(address.Addr()), byte(address.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	body = binary.NativeEndian.AppendUint32(body, index)
	body = attribute(body, unix.IFA_LOCAL, address.Addr().AsSlice())
	return attribute(body, unix.IFA_ADDRESS, address.Addr().AsSlice())
}

// netlinkBatch is several requests in one datagram, each acknowledged.
type netlinkBatch struct {
	message []byte
	count   uint32
}

func (b *netlinkBatch) add(kind uint16, flags int, body []byte) {
	b.count++
	b.message = binary.NativeEndian.AppendUint32(b.message, uint32(unix.NLMSG_HDRLEN+len(body)))
	b.message = binary.NativeEndian.AppendUint16(b.message, kind)
	b.message = binary.NativeEndian.AppendUint16(b.message, uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags))
	b.message = binary.NativeEndian.AppendUint32(b.message, b.count)
	b.message = binary.NativeEndian.AppendUint32(b.message, 0)
	b.message = append(b.message, body...)
}

// send sends the batch and waits for all acknowledgements.
func (b *netlinkBatch) send(fd int) error {
	if err := unix.Sendto(fd, b.message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	reply := make([]byte, 8192)
	var failed error
	for seen := uint32(0); seen < b.count; {
		n, _, err := unix.Recvfrom(fd, reply, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for rest := reply[:n]; len(rest) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(rest))
			if size < unix.NLMSG_HDRLEN+4 || size > len(rest) {
				return errors.New("the kernel's answer makes no sense")
			}
			if binary.NativeEndian.Uint16(rest[4:]) == unix.NLMSG_ERROR {
				seen++
				if code := int32(binary.NativeEndian.Uint32(rest[unix.NLMSG_HDRLEN:])); code != 0 && failed == nil {
					failed = fmt.Errorf("request %d of %d: %w", binary.NativeEndian.Uint32(rest[8:]), b.count, unix.Errno(-code))
				}
			}
			rest = rest[min(len(rest), (size+3)&^3):]
		}
	}
	return failed
}

// seen reads back what a program in the guest would see.
func (f *functionIdentity) seen(i *call.Identity) ([]string, error) {
	var random [16]byte
	if _, err := unix.Getrandom(random[:], 0); err != nil {
		return nil, fmt.Errorf("reading random bytes: %w", err)
	}
	seen := []string{"random=" + hex.EncodeToString(random[:]), "epoch=" + strconv.FormatUint(i.Epoch, 10), "address=" + f.address.String()}
	files := []struct{ name, path string }{
		{"machine-id", "/etc/machine-id"}, {"boot_id", bootIDFile}, {"hostname", "/proc/sys/kernel/hostname"}, {"restore", restoreFile},
	}
	if f.device != "" {
		files = append(files, struct{ name, path string }{"mac", "/sys/class/net/" + f.device + "/address"})
	}
	for _, file := range files {
		text, err := os.ReadFile(file.path)
		if err != nil {
			return nil, fmt.Errorf("reading the identity back: %w", err)
		}
		seen = append(seen, file.name+"="+strings.TrimSpace(string(text)))
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
		return nil, fmt.Errorf("reading the clock: %w", err)
	}
	return append(seen, "clock="+strconv.FormatInt(now.Nano(), 10)), nil
}
