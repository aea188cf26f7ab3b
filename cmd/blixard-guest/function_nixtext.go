package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// nixError is what a caller learns of an evaluation that failed.
type nixError struct {
	kind, message string
	trace         []string // "at /var/task/handler.nix:3:49"
}

var nixPlace = regexp.MustCompile(`^\s*at (\S+:[0-9]+(:[0-9]+)?):?$`)

// nixKinds tell errors apart by their texts. Those of Nix have no other names.
var nixKinds = []struct{ part, kind string }{
	{"json.exception.parse_error", "Runtime.InvalidEvent"},
	{"infinite recursion encountered", "Nix.InfiniteRecursion"},
	{"stack overflow", "Nix.StackOverflow"},
	{"out of memory", "Runtime.OutOfMemory"},
	{"attribute '", "Nix.MissingAttribute"},
	{"syntax error", "Nix.SyntaxError"},
	{"undefined variable", "Nix.UndefinedVariable"},
	{"cannot coerce", "Nix.TypeError"},
	{"cannot convert", "Nix.TypeError"},
	{"was expected", "Nix.TypeError"},
	{"value is ", "Nix.TypeError"},
	{"assertion ", "Nix.AssertionError"},
	{"called without required argument", "Nix.MissingArgument"},
	{"forbidden in restricted mode", "Nix.Forbidden"},
	{"forbidden in pure eval", "Nix.Forbidden"},
	{"division by zero", "Nix.ArithmeticError"},
}

// nixFault finds the error in what an evaluator has said.
func nixFault(said string, exit functionExit) nixError {
	var e nixError
	lines := strings.Split(said, "\n")
	for i, line := range lines {
		if place := nixPlace.FindStringSubmatch(line); place != nil {
			e.trace = append(e.trace, "at "+place[1])
		}
		text, ok := strings.CutPrefix(strings.TrimSpace(line), "error:")
		if !ok {
			continue
		}
		// Newer evaluators begin with where they were, and say what was wrong last.
		if text = strings.TrimSpace(text); text != "" {
			e.message = text
		} else if e.message == "" && i+1 < len(lines) {
			e.message = strings.TrimSpace(lines[i+1])
		}
	}
	switch {
	case exit.memory:
		return nixError{kind: "Runtime.OutOfMemory", message: "the function used more memory than it has", trace: e.trace}
	case e.message == "" && exit.signal != "":
		return nixError{kind: "Runtime.ExitError", message: "the evaluator was ended by a signal: " + exit.signal}
	case e.message == "":
		return nixError{kind: "Runtime.ExitError", message: fmt.Sprintf("the evaluator has ended with exit status %d", exit.code)}
	}
	e.kind = "Nix.EvalError"
	for _, known := range nixKinds {
		if strings.Contains(e.message, known.part) {
			e.kind = known.kind
			break
		}
	}
	return e
}

// body is the error as functions of AWS Lambda give it.
func (e nixError) body(requestID string) []byte {
	b := appendJSONString([]byte(`{"errorMessage":`), e.message)
	b = appendJSONString(append(b, `,"errorType":`...), e.kind)
	if requestID != "" {
		b = appendJSONString(append(b, `,"requestId":`...), requestID)
	}
	b = append(b, `,"stackTrace":[`...)
	for i, place := range e.trace {
		if i == 32 {
			break
		}
		if i > 0 {
			b = append(b, ',')
		}
		b = appendJSONString(b, place)
	}
	return append(b, "]}"...)
}

// appendJSONString appends s as a string of JSON.
func appendJSONString(b []byte, s string) []byte {
	const digits = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range strings.ToValidUTF8(s, "\uFFFD") {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r < 0x20 || r == 0x7f:
			b = append(b, '\\', 'u', '0', '0', digits[r>>4], digits[r&15])
		default:
			b = append(b, string(r)...)
		}
	}
	return append(b, '"')
}

// checkNixEvent refuses JSON that Nix would read as something else: characters
// of value 0, at which its strings end, and integers beyond 64 bits, which wrap.
// All else that is wrong the evaluator says by itself.
func checkNixEvent(payload []byte) error {
	inString, digits, negative, integer := false, 0, false, true
	number := ""
	flush := func(end int) error {
		if digits >= 19 && integer {
			number = string(payload[end-digits : end])
			limit := "9223372036854775807"
			if negative {
				limit = "9223372036854775808"
			}
			if digits > 19 || number > limit {
				return fmt.Errorf("the event has the integer %.24s, which does not fit into 64 bits", number)
			}
		}
		digits, negative, integer = 0, false, true
		return nil
	}
	for i := 0; i < len(payload); i++ {
		c := payload[i]
		if inString {
			switch c {
			case '"':
				inString = false
			case '\\':
				i++
				if i+4 < len(payload) && payload[i] == 'u' && string(payload[i+1:i+5]) == "0000" {
					return errors.New(`the event has the character \u0000, at which Nix's strings end`)
				}
			}
			continue
		}
		switch {
		case c >= '0' && c <= '9':
			digits++
			continue
		case c == '.' || c == 'e' || c == 'E':
			integer = false
			digits = 0
			continue
		case c == '+' || c == '-' && !integer:
			continue
		}
		if err := flush(i); err != nil {
			return err
		}
		negative = c == '-'
		inString = c == '"'
	}
	return flush(len(payload))
}

// randomWord is 64 bits that a function cannot guess.
func randomWord() (string, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("making a word: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}
