package blixard

import (
	"strings"
	"unicode/utf8"
)

// maxName leaves room for "-<ordinal>" in instance IDs, which are DNS labels too.
const maxName = 56

// CheckName tells why name is not a usable name: names are DNS labels (RFC
// 1123), at most 56 characters, since they become host names.
func CheckName(name string) error {
	const hint = "use 1 to 56 lower-case letters, digits and '-', beginning with a letter or digit, ending with one"
	if name == "" {
		return Invalid("name", hint, "the name is empty")
	}
	if len(name) > maxName {
		return Invalid("name", hint, "the name %.20q… is %d characters long", name, len(name))
	}
	for i, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		case c == '-' && i > 0 && i < len(name)-1:
		default:
			return Invalid("name", hint, "the name %q has %q at position %d", name, string(c), utf8.RuneCountInString(name[:i])+1)
		}
	}
	return nil
}

// CheckLabelKey tells why key cannot be a label's key.
func CheckLabelKey(key string) error {
	if key == "" || len(key) > 63 {
		return Invalid("labels", "label keys have 1 to 63 characters", "the label key %.20q is %d characters long", key, len(key))
	}
	for i := range len(key) {
		c := key[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("._-/", rune(c)) {
			return Invalid("labels", "label keys are letters, digits and . _ - /", "the label key %q has %q in it", key, string(c))
		}
	}
	return nil
}

// CheckLabelValue tells why value cannot be a label's value.
func CheckLabelValue(value string) error {
	if len(value) > 255 {
		return Invalid("labels", "label values have at most 255 characters", "the label value %.20q… is %d characters long", value, len(value))
	}
	for _, r := range value {
		if r < ' ' || r == 0x7f || r == ',' {
			return Invalid("labels", "label values are printable and hold no comma", "the label value %q has %q in it", value, r)
		}
	}
	return nil
}

// Nearest returns the candidate most like name, for "did you mean"; "" when
// none is near.
func Nearest(name string, candidates []string) string {
	best, bestDistance := "", len(name)/2+1
	for _, c := range candidates {
		if d := distance(strings.ToLower(name), strings.ToLower(c)); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is the Levenshtein distance with transpositions.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	var before, prev, cur [65]int
	for j := range len(b) + 1 {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev = prev, cur
	}
	return prev[len(b)]
}
