package lambdaapi

import (
	"fmt"
	"strconv"
	"strings"
)

// violations are the constraints of the service's model that a request breaks.
// All of them are told at once.
type violations []string

func (v *violations) add(field, value, constraint string, args ...any) {
	*v = append(*v, fmt.Sprintf("Value %s at '%s' failed to satisfy constraint: %s", value, field, fmt.Sprintf(constraint, args...)))
}

func quoted(value string) string {
	if len(value) > 256 {
		value = value[:256] + "…"
	}
	return "'" + value + "'"
}

func (v *violations) missing(field string) { v.add(field, "null", "Member must not be null") }

func (v *violations) pattern(field, value, pattern string) {
	v.add(field, quoted(value), "Member must satisfy regular expression pattern: %s", pattern)
}

func (v *violations) enum(field, value string, set ...string) {
	v.add(field, quoted(value), "Member must satisfy enum value set: [%s]", strings.Join(set, ", "))
}

// length tells of a text that is shorter or longer than it may be.
func (v *violations) length(field, value string, least, most int) {
	if len(value) < least {
		v.add(field, quoted(value), "Member must have length greater than or equal to %d", least)
	} else {
		v.add(field, quoted(value), "Member must have length less than or equal to %d", most)
	}
}

// between checks a number.
func (v *violations) between(field string, value, least, most int64) {
	number := "'" + strconv.FormatInt(value, 10) + "'"
	if value < least {
		v.add(field, number, "Member must have value greater than or equal to %d", least)
	} else if value > most {
		v.add(field, number, "Member must have value less than or equal to %d", most)
	}
}

// oneOf checks a word; "" is none.
func (v *violations) oneOf(field, value string, set ...string) {
	for _, word := range set {
		if value == word || value == "" {
			return
		}
	}
	v.enum(field, value, set...)
}

// err is what a client is told; nil when nothing was broken.
func (v *violations) err() error {
	if len(*v) == 0 {
		return nil
	}
	noun := "errors"
	if len(*v) == 1 {
		noun = "error"
	}
	return refuse("ValidationException", "%d validation %s detected: %s", len(*v), noun, strings.Join(*v, "; "))
}
