package converge

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"github.com/blixard/blixard"
)

// TestScripts tells the planner's behaviour case by case. Each line of a script
// gives one thing the planner is told:
//
//	row   REF STATE WANTED [singleton] [continue] [stop-on-partition] [paused] [why=…]
//	found REF PHASE [lease] [orderly] [reason=…]
//	local REF [busy=KIND] [prepared] [ready] [attached] [exit=CODE] [stops=N] …
//
// Values of why, reason and the like are written with _ for blanks.
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd != "plan" {
				d.Fatalf(t, "unknown command %q", d.Cmd)
			}
			in := Input{NowMS: 1000, ViewIndex: 10, Lease: Lease{UntilMS: 5000, Index: 10}, Pauses: true, Acceleration: "tcg", Limits: testLimits}
			for _, arg := range d.CmdArgs {
				v := func() int64 { return mustInt(t, arg.Vals[0]) }
				switch arg.Key {
				case "now":
					in.NowMS = v()
				case "view":
					in.ViewIndex = uint64(v())
				case "lease":
					in.Lease.UntilMS = v()
				case "contact":
					in.Lease.Index = uint64(v())
				case "starts":
					in.Limits.Starts = int(v())
				case "effects":
					in.Limits.Effects = int(v())
				default:
					d.Fatalf(t, "unknown argument %q", arg.Key)
				}
			}
			for line := range strings.Lines(d.Input) {
				if err := in.read(strings.Fields(line)); err != nil {
					d.Fatalf(t, "%s: %v", strings.TrimSpace(line), err)
				}
			}
			actions, wake := Plan(in)
			var b strings.Builder
			for _, a := range actions {
				fmt.Fprintln(&b, a)
			}
			if wake != Never {
				fmt.Fprintf(&b, "wake at %d\n", wake)
			}
			if b.Len() == 0 {
				return "nothing\n"
			}
			return b.String()
		})
	})
}

var testLimits = Limits{Starts: 2, Effects: 4, FenceMS: 1000, OrphanGraceMS: 3000, ResendMS: 5000}

func mustInt(t *testing.T, text string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (in *Input) read(words []string) error {
	if len(words) < 2 {
		return fmt.Errorf("too short")
	}
	name, generation, _ := strings.Cut(words[1], "#")
	g, err := strconv.ParseUint(generation, 10, 64)
	if err != nil {
		return err
	}
	ref := Ref{blixard.InstanceID(name), g}
	switch words[0] {
	case "row":
		row, err := readRow(ref, words[2:])
		in.Rows = append(in.Rows, row)
		return err
	case "found":
		f := Found{Ref: ref, Phase: Phase(words[2])}
		for _, w := range words[3:] {
			key, value, _ := strings.Cut(w, "=")
			value = strings.ReplaceAll(value, "_", " ")
			switch key {
			case "lease":
				f.StopsOnPartition = true
			case "orderly":
				f.Orderly = true
			case "reason":
				f.Reason = value
			case "address":
				f.Address = value
			case "port":
				f.Ports = append(f.Ports, blixard.PublishedPort{Protocol: "tcp", Address: value, GuestPort: 80})
			default:
				return fmt.Errorf("unknown %q", w)
			}
		}
		in.Found = append(in.Found, f)
		return nil
	case "local":
		l, err := readLocal(ref, words[2:])
		in.Locals = append(in.Locals, l)
		return err
	}
	return fmt.Errorf("unknown %q", words[0])
}

func readRow(ref Ref, words []string) (*blixard.Instance, error) {
	vm, ordinal, _ := strings.Cut(string(ref.Instance), "-")
	n, err := strconv.Atoi(ordinal)
	if err != nil {
		return nil, err
	}
	spec := &blixard.VMSpec{StopGraceMS: 10_000}
	row := &blixard.Instance{
		ID: ref.Instance, VM: blixard.VMName(vm), Ordinal: n, Generation: ref.Generation, Spec: spec,
		State: blixard.InstanceState(words[0]), Wanted: blixard.Wanted(words[1]),
	}
	for _, w := range words[2:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "singleton":
			spec.Singleton = true
		case "continue", "stop-on-partition":
			spec.OnPartition = strings.TrimSuffix(key, "-on-partition")
		case "paused":
			row.Paused = true
		case "seen-paused":
			row.StatePaused = true
		case "acceleration":
			row.Acceleration = value
		case "why":
			row.WantReason = strings.ReplaceAll(value, "_", " ")
		default:
			return nil, fmt.Errorf("unknown %q", w)
		}
	}
	return row, nil
}

func readLocal(ref Ref, words []string) (Local, error) {
	l := Local{Ref: ref}
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		n, _ := strconv.ParseInt(value, 10, 64)
		switch key {
		case "busy":
			l.Busy = Kind(value)
		case "prepared":
			l.Prepared = true
		case "ready":
			l.Ready, l.Attached = true, true
		case "attached":
			l.Attached = true
		case "exit":
			l.Exit = &Exit{Code: int(n)}
		case "not-started":
			l.Exit = &Exit{Code: 126, Reason: strings.ReplaceAll(value, "_", " "), NotStarted: true}
		case "stops":
			l.FailedStops = int(n)
		case "not-before":
			l.NotBeforeMS = n
		case "deadline":
			l.BootDeadlineMS = n
		case "killed":
			l.Killed = strings.ReplaceAll(value, "_", " ")
		case "failure":
			l.Failure = strings.ReplaceAll(value, "_", " ")
		case "health":
			l.Health = blixard.Health(value)
		case "sent-running":
			vm, ordinal, _ := strings.Cut(string(ref.Instance), "-")
			o, _ := strconv.Atoi(ordinal)
			l.Sent = &Observation{VM: blixard.VMName(vm), Ordinal: o, Generation: ref.Generation, State: blixard.Running, Acceleration: "tcg"}
		case "sent-at":
			l.SentMS = n
		case "sent-index":
			l.SentIndex = uint64(n)
		default:
			return l, fmt.Errorf("unknown %q", w)
		}
	}
	return l, nil
}
