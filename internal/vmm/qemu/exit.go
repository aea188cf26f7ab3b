package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	logTailBytes     = 16 << 10
	consoleTailBytes = 64 << 10
	reasonLines      = 3
	reasonBytes      = 500
)

// shutdownWords are QEMU's ShutdownCause values (include/sysemu/runstate.h), as
// its trace writes them.
var shutdownWords = map[string]string{
	"1": "host error",
	"2": "stopped by request",
	"3": "reset by request",
	"4": "stopped by a signal to QEMU",
	"5": "stopped by the user interface",
	"6": "guest shut down",
	"7": "guest rebooted",
	"8": "guest panicked",
	"9": "guest rebooted", // by a subsystem reset
}

var (
	shutdownLine = regexp.MustCompile(`(?m)` + shutdownTrace + ` reason=(\d+)\s*$`)
	signalLine   = regexp.MustCompile(`(?m)terminating on signal (\d+) from pid \d+`)
	panicLine    = regexp.MustCompile(`Kernel panic - not syncing: ([^\r\n]+)`)
)

// endReason tells in words how the process ended whose files are in dir.
func endReason(dir string, e ended) string {
	text := tail(filepath.Join(dir, fileLog), logTailBytes)
	last := lastLines(text)
	if e.known && e.status.Signaled() {
		sig := e.status.Signal()
		what := "QEMU was killed"
		if sig != unix.SIGKILL && sig != unix.SIGTERM {
			what = "QEMU crashed"
		}
		return withLines(fmt.Sprintf("%s by signal %d (%s)", what, int(sig), sig), last)
	}
	if found := shutdownLine.FindAllStringSubmatch(text, -1); len(found) > 0 {
		cause := found[len(found)-1][1]
		words := shutdownWords[cause]
		if words == "" {
			words = "QEMU shut down, cause " + cause
		}
		if words == "guest rebooted" {
			words = resetReason(dir)
		}
		return words
	}
	if m := signalLine.FindStringSubmatch(text); m != nil {
		return "QEMU was stopped by signal " + m[1]
	}
	if e.known && e.status.ExitStatus() != 0 {
		return withLines(fmt.Sprintf("QEMU failed with status %d", e.status.ExitStatus()), last)
	}
	if e.known && last == "" {
		return resetReason(dir) // the end that QEMU says nothing about, see -no-reboot
	}
	return withLines("process ended", last)
}

// resetReason tells why a guest reset its machine, which ends it.
func resetReason(dir string) string {
	console := tail(filepath.Join(dir, fileConsole), consoleTailBytes)
	if panics := panicLine.FindAllStringSubmatch(console, -1); len(panics) > 0 {
		words := "guest kernel panicked: " + printable(panics[len(panics)-1][1])
		if strings.Contains(words, "System is deadlocked on memory") || strings.Contains(words, "unable to mount root") && strings.Contains(console, "Initramfs unpacking failed") {
			words += "; it has too little memory"
		}
		return words
	}
	if strings.TrimSpace(console) == "" {
		return "the guest reset before its console came up; often it has too little memory"
	}
	return "guest rebooted"
}

// readReason is the recorded reason, or what the files still tell.
func readReason(dir string) string {
	var exit exitRecord
	if ok, err := readJSON(filepath.Join(dir, fileExit), &exit); err == nil && ok && exit.Reason != "" {
		return exit.Reason
	}
	return endReason(dir, ended{})
}

func withLines(what, lines string) string {
	if lines == "" {
		return what
	}
	return what + ": " + lines
}

// lastLines is the end of QEMU's own words, without traces and warnings.
func lastLines(text string) string {
	var kept []string
	for line := range strings.Lines(text) {
		line = strings.TrimPrefix(strings.TrimSpace(printable(line)), "qemu-system-x86_64: ")
		if line == "" || strings.Contains(line, shutdownTrace) || strings.HasPrefix(line, "warning: ") || strings.Contains(line, "info: QEMU waiting for connection") {
			continue
		}
		kept = append(kept, line)
	}
	if len(kept) > reasonLines {
		kept = kept[len(kept)-reasonLines:]
	}
	return clip(strings.Join(kept, "; "))
}

func clip(s string) string {
	if len(s) > reasonBytes {
		return strings.ToValidUTF8(s[:reasonBytes], "") + "…"
	}
	return s
}

// printable keeps a guest from writing control characters into our words.
func printable(s string) string {
	return clip(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '�' {
			return -1
		}
		return r
	}, s))
}

// tail is the end of a file, or nothing when it cannot be read: reasons are
// for people, and are no reason to fail.
func tail(path string, limit int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > limit {
		if _, err := f.Seek(-limit, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	return string(text)
}
