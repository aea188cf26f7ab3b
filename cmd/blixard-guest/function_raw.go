package main

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls that never wait are made without telling the Go scheduler: under
// emulation a first one takes so long that the scheduler would look for something
// else to do meanwhile, which costs more than the call.

// readNow reads from a descriptor that does not block.
func readNow(fd int, p []byte) (int, error) {
	return rawResult(syscall.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p))))
}

// readAt reads a file of the kernel's from its beginning.
func readAt(fd int, p []byte) (int, error) {
	return rawResult(syscall.RawSyscall6(unix.SYS_PREAD64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0, 0))
}

// sendNow sends what a socket takes at once.
func sendNow(fd int, p []byte) (int, error) {
	return rawResult(syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0))
}

// setTimer arms a timerfd, once.
func setTimer(fd int, nano int64) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(1, nano))}
	_, err := rawResult(syscall.RawSyscall6(unix.SYS_TIMERFD_SETTIME, uintptr(fd), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0))
	return err
}

func rawResult(n, _ uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
