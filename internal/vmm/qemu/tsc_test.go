package qemu

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestHostTSC compares with what the kernel says, where that is the counter's.
func TestHostTSC(t *testing.T) {
	khz := hostTSCKHz()
	if khz < 100_000 || khz > 20_000_000 {
		t.Fatalf("the counter runs at %d kHz", khz)
	}
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`cpu MHz\s*: ([0-9.]+)`).FindSubmatch(text)
	if m == nil || !strings.Contains(string(text), "tsc_known_freq") {
		t.Logf("%d kHz, and nothing to compare it with", khz)
		return
	}
	mhz, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	if off := float64(khz)/1000/mhz - 1; off < -0.01 || off > 0.01 {
		t.Errorf("measured %d kHz, the kernel says %.3f MHz", khz, mhz)
	}
	if w := (features{Acceleration: "tcg"}).clockWord(); w != "tsc_early_khz="+strconv.FormatInt(khz, 10) {
		t.Errorf("%q", w)
	}
	if w := (features{Acceleration: "kvm"}).clockWord(); w != "" {
		t.Errorf("%q with kvm", w)
	}
}
