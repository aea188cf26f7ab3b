package blixard_test

import (
	"testing"

	"github.com/blixard/blixard"
)

func TestParseQuantity(t *testing.T) {
	for _, c := range []struct {
		text string
		want blixard.Quantity // -1: refused
	}{
		{"8", 8000},
		{"1.5", 1500},
		{" 2 ", 2000},
		{"500m", 500},
		{"0", 0},
		{"1K", 1024_000},
		{"1k", 1024_000},
		{"1.5G", 3 << 29 * 1000},
		{"32GB", 32 << 30 * 1000},
		{"32Gi", 32 << 30 * 1000},
		{"32GiB", 32 << 30 * 1000},
		{"512M", 512 << 20 * 1000},
		{"7B", 7000},
		{"0.125", 125},
		{"", -1},
		{"512Q", -1},
		{"-1", -1},
		{"-0", -1},
		{"+1", -1},
		{"1.2345", -1},
		{"1.-5", -1},
		{".5", -1},
		{"1e3", -1},
		{"G", -1},
		{"1 2", -1},
		{"9999999P", -1},
		{"9223372036854775807", -1},
		{"9223372036854775808", -1},
		{"-5m", -1},
		{"1.5m", -1},
	} {
		got, err := blixard.ParseQuantity(c.text)
		if c.want < 0 != (err != nil) || err == nil && got != c.want {
			t.Errorf("ParseQuantity(%q) = %d, %v; want %d", c.text, got, err, c.want)
		}
		if err != nil && blixard.CodeOf(err) != blixard.CodeInvalid {
			t.Errorf("ParseQuantity(%q) is refused with %s", c.text, blixard.CodeOf(err))
		}
	}
}

func TestParseMemoryMiB(t *testing.T) {
	for _, c := range []struct {
		text string
		want int64 // -1: refused
	}{
		{"512", 512},
		{"512M", 512},
		{"512m", 512},
		{"512MiB", 512},
		{"2G", 2048},
		{"1.5G", 1536},
		{"1T", 1 << 20},
		{"1024K", 1},
		{"0", 0},
		{"1K", -1},
		{"1B", -1},
		{"-1", -1},
		{"512Q", -1},
		{"", -1},
	} {
		got, err := blixard.ParseMemoryMiB(c.text)
		if c.want < 0 != (err != nil) || err == nil && got != c.want {
			t.Errorf("ParseMemoryMiB(%q) = %d, %v; want %d", c.text, got, err, c.want)
		}
	}
}

func TestFormatMiB(t *testing.T) {
	for mib, want := range map[int64]string{0: "0M", 1: "1M", 512: "512M", 1024: "1G", 1536: "1536M", 1 << 20: "1T", 3 << 20: "3T", 1<<20 + 1024: "1025G"} {
		if got := blixard.FormatMiB(mib); got != want {
			t.Errorf("FormatMiB(%d) = %s, want %s", mib, got, want)
		}
	}
}

func FuzzParseQuantity(f *testing.F) {
	for _, s := range []string{"8", "1.5", "500m", "32GB", "1.5GiB", "-1", "9223372036854775807", "0.001P"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if q, err := blixard.ParseQuantity(text); err == nil && q < 0 {
			t.Fatalf("%q is %d", text, q)
		}
		mib, err := blixard.ParseMemoryMiB(text)
		if err != nil {
			return
		}
		if mib < 0 {
			t.Fatalf("%q is %d MiB", text, mib)
		}
		if mib > blixard.MaxDiskMiB {
			return // a bare number may be more than a quantity holds; no spec takes it
		}
		if again, err := blixard.ParseMemoryMiB(blixard.FormatMiB(mib)); err != nil || again != mib {
			t.Fatalf("%q is %d MiB, written %s, which is %d, %v", text, mib, blixard.FormatMiB(mib), again, err)
		}
	})
}
