package state_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

var functionNames = []blixard.FunctionName{"f", "g", "f_2"}

func functionSpec(t *rapid.T) blixard.FunctionSpec {
	s := blixard.FunctionSpec{
		MemoryMiB: rapid.SampledFrom([]int64{128, 256, 1}).Draw(t, "memory"), Description: rapid.SampledFrom([]string{"", "d"}).Draw(t, "description"),
		MinInstances: rapid.IntRange(0, 1).Draw(t, "min"),
	}
	s.Defaults()
	return s
}

// drawFunctionCommand makes a command about functions, often one that fits.
func drawFunctionCommand(t *rapid.T, v *state.View) state.Command {
	name, node := rapid.SampledFrom(functionNames).Draw(t, "function"), rapid.SampledFrom(nodeNames).Draw(t, "node")
	epoch := uint64(0)
	if n := v.Node(node); n != nil {
		epoch = n.Epoch
	}
	if rapid.IntRange(0, 5).Draw(t, "stale") == 0 {
		epoch++
	}
	code := digest(rapid.IntRange(1, 3).Draw(t, "code"))
	put := rapid.SampledFrom([]state.Put{state.PutAny, state.PutNew, state.PutReplace}).Draw(t, "put")
	qualifier := rapid.SampledFrom([]string{"", "$LATEST", "1", "live", "none"}).Draw(t, "qualifier")
	event := rapid.SampledFrom([]string{"e1", "e2", "e3", "e4"}).Draw(t, "event")
	number := rapid.IntRange(0, 3).Draw(t, "number")
	if v.Function(name) == nil || rapid.IntRange(0, 15).Draw(t, "create") == 0 {
		return &state.CreateFunction{
			Name: name, Spec: functionSpec(t), CodeDigest: code, CodeBytes: 5, MaxConcurrent: rapid.IntRange(-1, 5).Draw(t, "max"), Reserved: rapid.Bool().Draw(t, "reserved"),
			Publish: rapid.Bool().Draw(t, "publish"), Tags: []blixard.Label{{Key: "k", Value: "v"}},
		}
	}
	enqueue := func() *state.EnqueueEvent {
		return &state.EnqueueEvent{ID: event, Function: name, Qualifier: qualifier, Payload: []byte("{}"), Owner: node, OwnerEpoch: epoch}
	}
	switch rapid.IntRange(0, 23).Draw(t, "about functions") {
	case 0, 1:
		u := &state.UpdateFunction{Name: name, Publish: rapid.Bool().Draw(t, "publish")}
		if rapid.Bool().Draw(t, "with code") {
			u.CodeDigest = code
		}
		if rapid.Bool().Draw(t, "with spec") {
			s := functionSpec(t)
			u.Spec = &s
		}
		return u
	case 2:
		return &state.PublishVersion{Name: name, Description: rapid.SampledFrom([]string{"", "x"}).Draw(t, "description")}
	case 3, 4:
		return &state.SetAlias{Function: name, Put: put, Alias: blixard.FunctionAlias{
			Name: rapid.SampledFrom([]string{"live", "blue", "12"}).Draw(t, "alias"), Number: number, Second: rapid.IntRange(0, 3).Draw(t, "second"),
			SecondShare: rapid.SampledFrom([]int{0, 100_000, -1}).Draw(t, "share"),
		}}
	case 5:
		return &state.DeleteAlias{Function: name, Name: "live"}
	case 6:
		if rapid.IntRange(0, 2).Draw(t, "whole") > 0 {
			number = 0
		}
		return &state.DeleteFunction{Name: name, Number: number}
	case 7:
		return &state.SetFunction{
			Name: name, URL: &state.URLChange{Put: put, URL: blixard.FunctionURL{Qualifier: qualifier, ID: rapid.SampledFrom([]string{"u1", "u2", "U"}).Draw(t, "id"), Auth: "NONE", InvokeMode: "BUFFERED", CORS: &blixard.CORS{AllowOrigins: []string{"*"}}}},
			DropURL: rapid.SampledFrom([]string{"", "", "live"}).Draw(t, "drop"),
		}
	case 8:
		return &state.SetFunction{Name: name, Concurrency: &state.ConcurrencyChange{Max: rapid.IntRange(0, 6).Draw(t, "max"), Clear: rapid.IntRange(0, 3).Draw(t, "clear") == 0}, SetTags: []blixard.Label{{Key: "a", Value: "b"}}, DropTags: []string{"k"}}
	case 9:
		return &state.SetFunction{
			Name: name, Trigger: &blixard.Trigger{ID: rapid.SampledFrom([]string{"t1", "t2"}).Draw(t, "id"), Kind: "http", Qualifier: qualifier, Path: rapid.SampledFrom([]string{"/a", "/a/*", "/b/{proxy+}", "a", "/*/c"}).Draw(t, "path")},
			DropTrigger: rapid.SampledFrom([]string{"", "", "t2"}).Draw(t, "drop"),
		}
	case 10:
		return &state.SetFunction{Name: name, Policy: &blixard.PolicyStatement{ID: "s", Qualifier: qualifier, JSON: "{}"}, Limits: &state.LimitsChange{RateLimit: 5}}
	case 11:
		return &state.SetFunction{Name: name, Async: &blixard.AsyncConfig{Qualifier: qualifier, MaxRetries: rapid.IntRange(0, 3).Draw(t, "retries"), MaxAgeMS: 60_000}, DropAsync: rapid.SampledFrom([]string{"", "", "live"}).Draw(t, "drop")}
	case 12, 13:
		r := &state.ReportFunction{Function: name, Number: number, Node: node, NodeEpoch: epoch, Code: "InitError", Reason: "it failed"}
		r.State = rapid.SampledFrom([]blixard.FunctionState{blixard.FunctionActive, blixard.FunctionActive, blixard.FunctionFailed, blixard.FunctionPending, "Odd"}).Draw(t, "state")
		if fv := v.FunctionVersion(name, number); fv != nil {
			r.Seq = fv.Seq
			if rapid.IntRange(0, 3).Draw(t, "its builder") > 0 {
				r.Node, r.NodeEpoch = fv.Builder, fv.BuilderEpoch
			}
		}
		return r
	case 14:
		a := &state.AssignBuild{Function: name, Number: number, Node: node, NodeEpoch: epoch}
		if fv := v.FunctionVersion(name, number); fv != nil {
			a.Seq = fv.Seq
		}
		return a
	case 15, 16:
		return &state.LeaseSlots{Function: name, Node: node, NodeEpoch: epoch, Want: rapid.IntRange(-1, 5).Draw(t, "want")}
	case 17:
		return &state.ReturnSlots{Function: name, Node: node, NodeEpoch: epoch, Count: rapid.IntRange(-1, 5).Draw(t, "count")}
	case 18, 19:
		return enqueue()
	case 20:
		m := &state.TakeEvents{Node: node, NodeEpoch: epoch, Most: rapid.IntRange(0, 3).Draw(t, "most")}
		if e := v.AsyncEvent(event); e != nil {
			m.From, m.FromEpoch = e.Owner, e.OwnerEpoch
		}
		return m
	case 21:
		m := &state.SettleEvent{
			ID: event, Owner: node, OwnerEpoch: epoch, Result: rapid.SampledFrom([]state.Settlement{"success", "retry", "dead", "odd"}).Draw(t, "result"), FunctionError: rapid.Bool().Draw(t, "function error"),
			NotBeforeMS: 1000, Condition: state.ConditionRetriesExhausted, Error: "it failed",
		}
		if e := v.AsyncEvent(event); e != nil && rapid.IntRange(0, 3).Draw(t, "its owner") > 0 {
			m.Owner, m.OwnerEpoch = e.Owner, e.OwnerEpoch
		}
		if rapid.Bool().Draw(t, "destination") {
			m.Next = enqueue()
			m.Next.ID = rapid.SampledFrom([]string{"e1", "e5", "e6"}).Draw(t, "next")
		}
		return m
	case 22:
		if rapid.Bool().Draw(t, "replay") {
			return &state.ReplayEvent{ID: event, Node: node, NodeEpoch: epoch}
		}
		return rapid.SampledFrom([]state.Command{&state.PurgeEvent{ID: event}, &state.PurgeEvent{Function: name}}).Draw(t, "purge")
	}
	key := "BLXA" + strings.Repeat(rapid.SampledFrom([]string{"A", "B", "a"}).Draw(t, "key"), 16)
	return rapid.SampledFrom([]state.Command{
		&state.CreateAccessKey{Key: blixard.AccessKey{ID: key, Name: "n", Role: "admin"}}, &state.RevokeAccessKey{ID: key}, &state.RaiseLevel{Level: 2},
	}).Draw(t, "about keys")
}

// derivedOfFunctions is what is derived of rows about functions.
func derivedOfFunctions(v *state.View) string {
	var b strings.Builder
	for _, f := range functionNames {
		fmt.Fprintf(&b, "%s leased=%d short=%d", f, v.SlotsLeased(f), v.SlotsShort(f, "", 0))
		v.AsyncEventsOf(f, func(e *blixard.AsyncEvent) bool { b.WriteString(" " + e.ID); return true })
		b.WriteString("\n")
	}
	for _, n := range nodeNames {
		v.SlotsOn(n, func(s *blixard.FunctionSlots) bool { fmt.Fprintf(&b, " %+v", *s); return true })
	}
	for _, id := range []string{"u1", "u2"} {
		if f, u := v.FunctionByURL(id); f != nil {
			fmt.Fprintf(&b, " %s=%s/%s", id, f.Name, u.Qualifier)
		}
	}
	v.PendingVersions(func(fv *blixard.FunctionVersion) bool {
		fmt.Fprintf(&b, " pending %s:%d", fv.Function, fv.Number)
		return true
	})
	v.EventOwners(func(n blixard.NodeName, epoch uint64) bool {
		fmt.Fprintf(&b, " %q@%d:", n, epoch)
		v.EventsOwnedBy(n, epoch, func(e *blixard.AsyncEvent) bool { b.WriteString(" " + e.ID); return true })
		return true
	})
	fmt.Fprintf(&b, " %+v\n", v.AsyncLoad())
	return b.String()
}

// leases is an independent account of slots: who holds how many, and from which
// epoch.
type leases struct {
	held  map[string]int // function/node/epoch
	bound map[blixard.FunctionName]int
}

func (l *leases) sum(f blixard.FunctionName) (n int) {
	for key, c := range l.held {
		if strings.HasPrefix(key, string(f)+"/") {
			n += c
		}
	}
	return n
}

func (l *leases) drop(part string) {
	maps.DeleteFunc(l.held, func(key string, _ int) bool { return strings.Contains(key, part) })
}

// TestSlotsAreExact: a grant is what was asked for or all that is left, the sum
// over nodes never grows above what may run at once, what is there is what was
// granted less what was returned or lost, and nothing else changes it.
func TestSlotsAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := state.New()
		apply := func(c state.Command) state.Result {
			r, _ := do(t, s, state.Envelope{NowMS: int64(s.Index()), Command: c})
			return r
		}
		apply(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}, FeatureLevel: 2})
		for _, n := range nodeNames[1:] {
			apply(&state.JoinNode{Node: state.NodeIdentity{Name: n, Address: string(n)}})
		}
		for _, n := range nodeNames {
			apply(&state.ReportNode{Name: n, RaftID: s.View().Node(n).RaftID, Address: string(n), FeatureLevel: 2})
		}
		l := leases{held: map[string]int{}, bound: map[blixard.FunctionName]int{}}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			v := s.View()
			f, node := rapid.SampledFrom(functionNames[:2]).Draw(t, "function"), rapid.SampledFrom(nodeNames).Draw(t, "node")
			epoch, raftID := uint64(0), uint64(0)
			if n := v.Node(node); n != nil {
				epoch, raftID = n.Epoch, n.RaftID
			}
			if epoch > 0 && rapid.IntRange(0, 4).Draw(t, "stale") == 0 {
				epoch--
			}
			key := fmt.Sprintf("%s/%s/%d", f, node, epoch)
			n := rapid.IntRange(0, 5).Draw(t, "n")
			before := l.sum(f)
			switch rapid.IntRange(0, 11).Draw(t, "step") {
			case 0:
				spec := blixard.FunctionSpec{}
				spec.Defaults()
				if apply(&state.CreateFunction{Name: f, Spec: spec, CodeDigest: digest(1), MaxConcurrent: n, Reserved: true}).Err == nil {
					l.bound[f] = n
				}
			case 1:
				if apply(&state.SetFunction{Name: f, Concurrency: &state.ConcurrencyChange{Max: n}}).Err == nil {
					l.bound[f] = n
				}
			case 2:
				apply(&state.DeleteFunction{Name: f})
			case 3:
				if r := apply(&state.LoseNode{Name: node, RaftID: raftID, Epoch: epoch}); r.Err == nil && !r.Outcome.Noop {
					l.drop("/" + string(node) + "/")
				}
			case 4:
				apply(&state.ReviveNode{Name: node, RaftID: raftID})
			case 5:
				apply(&state.SetNode{Name: node, Availability: rapid.SampledFrom([]blixard.Availability{"active", "draining", "cordoned"}).Draw(t, "availability")})
			case 6:
				r := apply(&state.JoinNode{Node: state.NodeIdentity{Name: node, Address: string(node)}, Replace: true})
				if row := s.View().Node(node); row != nil {
					if held := s.View().Slots(f, node); r.Err == nil && held.Count > 0 && held.NodeEpoch >= row.Epoch {
						t.Fatalf("%s joins anew in epoch %d and has %+v", node, row.Epoch, held)
					}
					apply(&state.ReportNode{Name: node, RaftID: row.RaftID, Address: string(node), FeatureLevel: 2})
				}
			case 7:
				held := 0
				v.SlotsOn(node, func(s *blixard.FunctionSlots) bool { held += s.Count; return true })
				force := rapid.Bool().Draw(t, "force")
				if r := apply(&state.RemoveNode{Name: node, Force: force}); r.Err == nil && held > 0 && !force {
					t.Fatalf("%s was removed with %d slots", node, held)
				}
			case 8:
				r := apply(&state.ReturnSlots{Function: f, Node: node, NodeEpoch: epoch, Count: n})
				if back := min(n, l.held[key]); r.Err == nil && back > 0 {
					if int(r.Outcome.Value) != back {
						t.Fatalf("%d of %d were returned, it says %d", n, l.held[key], r.Outcome.Value)
					}
					l.held[key] -= back
				}
			default:
				r := apply(&state.LeaseSlots{Function: f, Node: node, NodeEpoch: epoch, Want: n})
				if r.Err != nil {
					break
				}
				if want := max(0, min(n, l.bound[f]-before)); int(r.Outcome.Value) != want {
					t.Fatalf("%d of %d were free and %d asked for, %d granted", l.bound[f]-before, l.bound[f], n, r.Outcome.Value)
				}
				if row := v.Node(node); row.State != blixard.NodeReady || row.Availability != blixard.Active || row.Epoch != epoch {
					t.Fatalf("slots for %s, which is %s and %s", node, row.State, row.Availability)
				}
				l.held[key] += int(r.Outcome.Value)
			}
			now := s.View()
			for _, f := range functionNames[:2] {
				if now.SlotsLeased(f) != l.sum(f) {
					t.Fatalf("%s: %d leased, %d by the account %v", f, now.SlotsLeased(f), l.sum(f), l.held)
				}
				if sum := now.SlotsLeased(f); sum > v.SlotsLeased(f) && sum > now.Function(f).MaxConcurrent {
					t.Fatalf("%s: %d leased of %d", f, l.sum(f), l.bound[f])
				}
				if now.Function(f) == nil && l.sum(f) > 0 {
					t.Fatalf("%s is gone, and %d slots are leased", f, l.sum(f))
				}
			}
			now.AllSlots(func(s *blixard.FunctionSlots) bool {
				if got := l.held[fmt.Sprintf("%s/%s/%d", s.Function, s.Node, s.NodeEpoch)]; got != s.Count {
					t.Fatalf("%+v, by the account %d", *s, got)
				}
				return true
			})
		}
	})
}

// TestAcceptedEventsStay: an event that was accepted leaves only by success, by
// failing for good, by a purge or with its function; a destination's event is
// there in the same moment.
func TestAcceptedEventsStay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawWorld(t)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			before := s.View()
			c := drawFunctionCommand(t, before)
			r, _ := do(t, s, state.Envelope{NowMS: 50, Command: c})
			now := s.View()
			if m, ok := c.(*state.EnqueueEvent); ok && r.Err == nil && now.AsyncEvent(m.ID) == nil {
				t.Fatalf("%s was accepted and is not there", m.ID)
			}
			before.AsyncEvents(func(e *blixard.AsyncEvent) bool {
				if e.Dead || now.AsyncEvent(e.ID) != nil && !now.AsyncEvent(e.ID).Dead {
					return true
				}
				gone := now.AsyncEvent(e.ID) == nil
				switch c := c.(type) {
				case *state.SettleEvent:
					owns := c.Owner == e.Owner && c.OwnerEpoch == e.OwnerEpoch
					if r.Err != nil || c.ID != e.ID || gone && c.Result != state.SettleSuccess && c.Next == nil || c.Result == state.SettleDead && !owns {
						t.Fatalf("%+v ended %+v", *c, *e)
					}
					if c.Next != nil && gone && c.Result == state.SettleDead && now.AsyncEvent(c.Next.ID) == nil {
						t.Fatalf("%+v lost its destination", *c)
					}
				case *state.DeleteFunction:
					if c.Name != e.Function || !gone {
						t.Fatalf("deleting %s ended an event of %s", c.Name, e.Function)
					}
				case *state.PurgeEvent:
					if c.ID != e.ID {
						t.Fatalf("%+v ended %s", *c, e.ID)
					}
				default:
					t.Fatalf("%T ended %s", c, e.ID)
				}
				return true
			})
		}
	})
}

// TestVersionsNeverChange: a published version keeps its code and configuration
// for as long as it is there, and its number is never given again.
func TestVersionsNeverChange(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seen := map[string]blixard.FunctionVersion{}
		gone := map[string]bool{}
		drawLog(t, func(s *state.State, _ []byte) {
			here := map[string]bool{}
			v := s.View()
			v.Functions(func(f *blixard.Function) bool {
				v.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
					if fv.Previous != nil && (fv.Previous.State != blixard.FunctionActive || fv.Previous.Previous != nil || fv.State == blixard.FunctionActive) {
						t.Fatalf("%s:%d is %s with a former %s", f.Name, fv.Number, fv.State, fv.Previous.State)
					}
					if fv.Number == 0 {
						return true
					}
					key := fmt.Sprintf("%s/%d/%d", f.Name, f.UID, fv.Number)
					old, known := seen[key]
					if gone[key] || known && (old.Seq != fv.Seq || old.CodeDigest != fv.CodeDigest || old.RevisionID != fv.RevisionID || old.Spec.MemoryMiB != fv.Spec.MemoryMiB) {
						t.Fatalf("%s was %+v and is %+v", key, old, *fv)
					}
					if fv.Number >= f.NextNumber {
						t.Fatalf("%s, and the next is %d", key, f.NextNumber)
					}
					seen[key], here[key] = *fv, true
					return true
				})
				for i := range f.Aliases {
					a := &f.Aliases[i]
					if v.FunctionVersion(f.Name, a.Number) == nil || v.FunctionVersion(f.Name, a.Second) == nil {
						t.Fatalf("the alias %+v of %s points to nothing", *a, f.Name)
					}
				}
				return true
			})
			for key := range seen {
				gone[key] = gone[key] || !here[key]
			}
		})
	})
}

// TestRevisionsDiffer: no two revisions that are there at once are the same, nor
// are what names the templates of two versions.
func TestRevisionsDiffer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		_, s := drawLog(t, func(*state.State, []byte) {})
		v := s.View()
		var all []string
		v.Functions(func(f *blixard.Function) bool {
			v.FunctionVersions(f.Name, func(fv *blixard.FunctionVersion) bool {
				all = append(all, fv.RevisionID, fmt.Sprint(f.UID, fv.Seq))
				return true
			})
			for i := range f.Aliases {
				all = append(all, f.Aliases[i].RevisionID)
			}
			return true
		})
		slices.Sort(all)
		if n := len(all); len(slices.Compact(all)) != n {
			t.Fatalf("revisions repeat: %v", all)
		}
	})
}
