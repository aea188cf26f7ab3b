// Command callguest is the guest of the tests of templates: PID 1 of a Linux
// that loads the drivers its initial RAM disk holds and answers lines on its call
// port with plain blocking calls. "set <text>" is answered "ok", "get" with the
// text, "mac" with the address of its interface, and anything else with itself.
package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const finitModule = 313 // of amd64

func main() {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"sysfs", "/sys"}, {"proc", "/proc"}} {
		tell("mounting "+m[1], os.MkdirAll(m[1], 0o755))
		tell("mounting "+m[1], syscall.Mount(m[0], m[1], m[0], 0, ""))
	}
	names, err := os.ReadFile("/modules/list")
	tell("listing drivers", err)
	for name := range strings.FieldsSeq(string(names)) {
		load("/modules/" + name)
	}
	fd := open("/dev/vport0p2")
	var text []byte
	buffer := make([]byte, 0, 1<<16)
	for {
		n, err := syscall.Read(fd, buffer[len(buffer):cap(buffer)])
		if n <= 0 { // nobody is there
			if err != nil && err != syscall.EINTR {
				tell("reading", err)
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		buffer = buffer[:len(buffer)+n]
		for {
			line, rest, found := bytes.Cut(buffer, []byte("\n"))
			if !found {
				break
			}
			answer := line
			if said, found := bytes.CutPrefix(line, []byte("set ")); found {
				text, answer = bytes.Clone(said), []byte("ok")
			} else if string(line) == "get" {
				answer = text
			} else if string(line) == "mac" {
				answer, err = os.ReadFile("/sys/class/net/eth0/address")
				tell("looking for the address", err)
				answer = bytes.TrimSpace(answer)
			}
			_, err := syscall.Write(fd, append(bytes.Clone(answer), '\n'))
			tell("writing", err)
			buffer = buffer[:copy(buffer, rest)]
		}
	}
}

func load(path string) {
	file, err := os.Open(path)
	tell("opening "+path, err)
	if err != nil {
		return
	}
	none := []byte{0}
	if _, _, errno := syscall.Syscall(finitModule, file.Fd(), uintptr(unsafe.Pointer(&none[0])), 0); errno != 0 {
		tell("loading "+path, errno)
	}
	tell("closing "+path, file.Close())
}

func open(path string) int {
	for {
		fd, err := syscall.Open(path, syscall.O_RDWR, 0)
		if err == nil {
			return fd
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func tell(what string, err error) {
	if err != nil {
		fmt.Println(what+":", err)
	}
}
