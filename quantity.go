package blixard

import (
	"math"
	"strconv"
	"strings"
)

// Quantity is a number in thousandths: of bytes for sizes, of units else.
// Replicated decisions compare integers only, since floats differ between
// machines.
type Quantity int64

// unitBytes are the size suffixes. All are binary, as hypervisors count: 32GB,
// 32G, 32Gi and 32GiB are the same amount.
var unitBytes = []struct {
	suffix string
	shift  uint
}{
	{"KIB", 10},
	{"MIB", 20},
	{"GIB", 30},
	{"TIB", 40},
	{"PIB", 50},
	{"KB", 10},
	{"MB", 20},
	{"GB", 30},
	{"TB", 40},
	{"PB", 50},
	{"KI", 10},
	{"MI", 20},
	{"GI", 30},
	{"TI", 40},
	{"PI", 50},
	{"K", 10},
	{"M", 20},
	{"G", 30},
	{"T", 40},
	{"P", 50},
	{"B", 0},
}

// ParseQuantity reads "8", "1.5", "500m" (thousandths, lower case only),
// "512M", "32GB".
func ParseQuantity(text string) (Quantity, error) {
	t := strings.TrimSpace(text)
	const hint = "units are B, K, M, G, T and P (binary: 1G = 1024M), also written KB, KiB, …"
	if n, ok := strings.CutSuffix(t, "m"); ok {
		v, err := strconv.ParseInt(n, 10, 64)
		if err != nil || v < 0 {
			return 0, Invalid("", hint, "%q is not a quantity", text)
		}
		return Quantity(v), nil
	}
	number, shift := t, uint(0)
	upper := strings.ToUpper(t)
	for _, u := range unitBytes {
		if n, ok := strings.CutSuffix(upper, u.suffix); ok {
			number, shift = strings.TrimSpace(n), u.shift
			break
		}
	}
	whole, frac, _ := strings.Cut(number, ".")
	if whole == "" || len(frac) > 3 || strings.HasPrefix(whole, "+") {
		return 0, Invalid("", hint, "%q is not a quantity", text)
	}
	w, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || w < 0 || strings.HasPrefix(whole, "-") {
		return 0, Invalid("", hint, "%q is not a quantity", text)
	}
	f := int64(0)
	if frac != "" {
		for _, r := range frac {
			if r < '0' || r > '9' {
				return 0, Invalid("", hint, "%q is not a quantity", text)
			}
		}
		f, err = strconv.ParseInt((frac + "00")[:3], 10, 64)
		if err != nil {
			return 0, Invalid("", hint, "%q is not a quantity", text)
		}
	}
	if w > (math.MaxInt64>>shift)/1000-1 {
		return 0, Invalid("", "", "%q is too large", text)
	}
	return Quantity((w*1000 + f) << shift), nil
}

// ParseMemoryMiB reads an amount of memory or disk; a bare number is MiB.
func ParseMemoryMiB(text string) (int64, error) {
	t := strings.TrimSpace(text)
	if n, err := strconv.ParseInt(t, 10, 64); err == nil {
		if n < 0 {
			return 0, Invalid("", "give a positive amount such as 512M", "%q is negative", text)
		}
		return n, nil
	}
	if before, ok := strings.CutSuffix(t, "m"); ok { // thousandths make no sense here, megabytes do
		t = before + "M"
	}
	q, err := ParseQuantity(t)
	if err != nil {
		return 0, err
	}
	bytes := int64(q) / 1000
	if bytes%(1<<20) != 0 || int64(q)%1000 != 0 {
		return 0, Invalid("", "give a whole number of MiB such as 512M", "%q is not a whole number of MiB", text)
	}
	return bytes >> 20, nil
}

// FormatMiB writes an amount of MiB in the largest unit that is exact.
func FormatMiB(mib int64) string {
	switch {
	case mib != 0 && mib%(1<<20) == 0:
		return strconv.FormatInt(mib>>20, 10) + "T"
	case mib != 0 && mib%(1<<10) == 0:
		return strconv.FormatInt(mib>>10, 10) + "G"
	default:
		return strconv.FormatInt(mib, 10) + "M"
	}
}
