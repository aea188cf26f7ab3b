package state_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// TestFunctionStories runs the scripts of testdata/functions: what is asked of
// the state about functions, and what it answers. Three nodes are ready. Run
// with -rewrite to record anew.
//
//	at MS                                     sets the clock
//	create F code=N [max=N] [memory=N] [publish] [desc=TEXT]
//	update F [code=N] [memory=N] [desc=TEXT] [publish] [revision=last|stale]
//	publish F [desc=TEXT]; delete F [version=N]
//	build F [version=N] node=NODE; report F [version=N] STATE [CODE] [node=NODE]
//	alias F NAME N [second=N share=MILLIONTHS] [put=new|replace]; unalias F NAME
//	set F max=N|default|trigger=ID:PATH[:METHOD]|untrigger=ID|url=Q:ID|unurl=Q|policy=ID:Q|unpolicy=ID:Q|async=Q:RETRIES|unasync=Q
//	lease F NODE N; return F NODE N [epoch=N]; short F NODE
//	enqueue ID F [qualifier=Q] [owner=NODE]; fail|throttle ID; succeed ID [next=ID:F]; dead ID [next=ID:F] [owner=NODE]
//	take NODE from=NODE [epoch=N]; replay ID; purge ID
//	key|revoke ID; node drain|active|lose|revive|join|remove|force NODE
//	resolve F Q [draw=N]; show F; events; slots F
func TestFunctionStories(t *testing.T) {
	datadriven.Walk(t, "testdata/functions", func(t *testing.T, path string) {
		st := &functionStory{t: t, s: state.New(), nowMS: 1000}
		st.do(&state.Bootstrap{ClusterID: "c", RaftID: 1, Node: state.NodeIdentity{Name: "n1", Address: "n1"}, FeatureLevel: 2})
		st.do(&state.JoinNode{Node: state.NodeIdentity{Name: "n2", Address: "n2"}})
		st.do(&state.JoinNode{Node: state.NodeIdentity{Name: "n3", Address: "n3"}})
		for _, n := range nodeNames {
			st.report(n)
		}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			st.t, st.out = t, strings.Builder{}
			lines := []string{d.Cmd}
			for _, a := range d.CmdArgs {
				lines[0] += " " + a.String()
			}
			if d.Input != "" {
				lines = append(lines, strings.Split(d.Input, "\n")...)
			}
			for _, line := range lines {
				st.line(strings.Fields(line))
			}
			return st.out.String()
		})
	})
}

type functionStory struct {
	t     *testing.T
	s     *state.State
	nowMS int64
	out   strings.Builder
}

func (st *functionStory) do(c state.Command) state.Result {
	results, _, err := st.s.Apply(st.s.Index()+1, 1, state.EncodeEntry([]state.Envelope{{NowMS: st.nowMS, Actor: "ann", Command: c}}))
	if err != nil {
		st.t.Fatal(err)
	}
	return results[0]
}

func (st *functionStory) report(n blixard.NodeName) {
	st.do(&state.ReportNode{Name: n, RaftID: st.s.View().Node(n).RaftID, Address: string(n), Hypervisors: []string{"qemu"}, FeatureLevel: 2})
}

// answer writes what became of a command.
func (st *functionStory) answer(c state.Command) {
	r := st.do(c)
	switch {
	case r.Err != nil:
		field := ""
		if r.Err.Field != "" {
			field = " [" + r.Err.Field + "]"
		}
		fmt.Fprintf(&st.out, "%s%s: %s\n", r.Err.Code, field, r.Err)
	case r.Outcome.Noop:
		fmt.Fprintf(&st.out, "as it was (%d)\n", r.Outcome.Value)
	default:
		fmt.Fprintf(&st.out, "ok (%d)\n", r.Outcome.Value)
	}
}

// words are the arguments of a line, those with '=' by their names.
type words struct {
	plain []string
	named map[string]string
}

func (w *words) at(i int) string {
	if i < len(w.plain) {
		return w.plain[i]
	}
	return ""
}

func (w *words) has(word string) bool { return slices.Contains(w.plain, word) }

func (w *words) number(name string) int {
	n, _ := strconv.Atoi(w.named[name])
	return n
}

func (st *functionStory) line(fields []string) {
	w := words{named: map[string]string{}}
	for _, f := range fields[1:] {
		if k, v, ok := strings.Cut(f, "="); ok {
			w.named[k] = v
		} else {
			w.plain = append(w.plain, f)
		}
	}
	v := st.s.View()
	f := blixard.FunctionName(w.at(0))
	node := blixard.NodeName(w.at(1))
	third, _ := strconv.Atoi(w.at(2))
	code := ""
	if w.named["code"] != "" {
		code = digest(w.number("code"))
	}
	spec := blixard.FunctionSpec{MemoryMiB: int64(w.number("memory")), Description: w.named["desc"]}
	spec.Defaults()
	switch fields[0] {
	case "at":
		n, _ := strconv.Atoi(w.at(0))
		st.nowMS = int64(n)
		st.out.WriteString("ok\n")
	case "create":
		st.answer(&state.CreateFunction{Name: f, Spec: spec, CodeDigest: code, CodeBytes: 10, MaxConcurrent: w.number("max"), Reserved: w.named["max"] != "", Publish: w.has("publish")})
	case "update":
		u := &state.UpdateFunction{Name: f, CodeDigest: code, Publish: w.has("publish")}
		if w.named["memory"] != "" || w.named["desc"] != "" {
			s := v.FunctionVersion(f, 0).Spec
			if w.named["memory"] != "" {
				s.MemoryMiB = int64(w.number("memory"))
			}
			s.Description = w.named["desc"]
			u.Spec = &s
		}
		switch w.named["revision"] {
		case "last":
			u.Revision = v.FunctionVersion(f, 0).RevisionID
		case "stale":
			u.Revision = "00000000-0000-0000-0000-000000000000"
		}
		st.answer(u)
	case "publish":
		st.answer(&state.PublishVersion{Name: f, Description: w.named["desc"]})
	case "delete":
		st.answer(&state.DeleteFunction{Name: f, Number: w.number("version")})
	case "build", "report":
		st.building(fields[0], f, &w)
	case "alias":
		m := &state.SetAlias{Function: f, Put: state.Put(w.named["put"]), Alias: blixard.FunctionAlias{Name: w.at(1), Number: third, Second: w.number("second"), SecondShare: w.number("share")}}
		st.answer(m)
	case "unalias":
		st.answer(&state.DeleteAlias{Function: f, Name: w.at(1)})
	case "set":
		st.set(f, &w)
	case "lease":
		st.answer(&state.LeaseSlots{Function: f, Node: node, NodeEpoch: v.Node(node).Epoch, Want: third})
	case "return":
		epoch := uint64(w.number("epoch"))
		if n := v.Node(node); n != nil && w.named["epoch"] == "" {
			epoch = n.Epoch
		}
		st.answer(&state.ReturnSlots{Function: f, Node: node, NodeEpoch: epoch, Count: third})
	case "short":
		fmt.Fprintf(&st.out, "%d\n", v.SlotsShort(f, node, st.nowMS))
	case "node":
		st.node(w.at(0), node)
	case "key":
		st.answer(&state.CreateAccessKey{Key: blixard.AccessKey{ID: w.at(0), Name: "ci", Role: "admin"}})
	case "revoke":
		st.answer(&state.RevokeAccessKey{ID: w.at(0)})
	case "resolve":
		fv, err := v.Resolve(f, w.at(1), w.number("draw"))
		switch {
		case err != nil:
			fmt.Fprintf(&st.out, "%s: %s\n", err.Code, err)
		case fv.Callable() == nil:
			fmt.Fprintf(&st.out, "%s is %s\n", blixard.VersionName(fv.Number), fv.State)
		default:
			fmt.Fprintf(&st.out, "%s with code %s\n", blixard.VersionName(fv.Number), fv.Callable().CodeDigest[62:])
		}
	case "show":
		st.show(v, f)
	case "events":
		v.AsyncEvents(func(e *blixard.AsyncEvent) bool { st.showEvent(e); return true })
		fmt.Fprintf(&st.out, "%+v\n", v.AsyncLoad())
	case "slots":
		v.SlotsOf(f, func(s *blixard.FunctionSlots) bool {
			fmt.Fprintf(&st.out, "%s@%d: %d, short of %d\n", s.Node, s.NodeEpoch, s.Count, s.Short)
			return true
		})
		fmt.Fprintf(&st.out, "%d leased\n", v.SlotsLeased(f))
	default:
		st.event(fields[0], &w)
	}
}

func (st *functionStory) building(verb string, f blixard.FunctionName, w *words) {
	fv := st.s.View().FunctionVersion(f, w.number("version"))
	if fv == nil {
		fv = &blixard.FunctionVersion{}
	}
	node, epoch := fv.Builder, fv.BuilderEpoch
	if w.named["node"] != "" {
		node = blixard.NodeName(w.named["node"])
		if n := st.s.View().Node(node); n != nil {
			epoch = n.Epoch
		}
	}
	if verb == "build" {
		st.answer(&state.AssignBuild{Function: f, Number: w.number("version"), Seq: fv.Seq, Node: node, NodeEpoch: epoch})
		return
	}
	st.answer(&state.ReportFunction{
		Function: f, Number: w.number("version"), Seq: fv.Seq, Node: node, NodeEpoch: epoch, State: blixard.FunctionState(w.at(1)), Code: w.at(2), Reason: "as the log says",
	})
}

func (st *functionStory) set(f blixard.FunctionName, w *words) {
	m := &state.SetFunction{Name: f}
	part := func(name string) []string { return append(strings.Split(w.named[name], ":"), "", "") }
	for name := range w.named {
		p := part(name)
		n, _ := strconv.Atoi(p[1])
		switch name {
		case "max":
			m.Concurrency = &state.ConcurrencyChange{Max: w.number("max")}
		case "trigger":
			m.Trigger = &blixard.Trigger{ID: p[0], Kind: "http", Path: p[1]}
			if p[2] != "" {
				m.Trigger.Methods = []string{p[2]}
			}
		case "untrigger":
			m.DropTrigger = p[0]
		case "url":
			m.URL = &state.URLChange{Put: state.PutNew, URL: blixard.FunctionURL{Qualifier: p[0], ID: p[1], Auth: "NONE", InvokeMode: "BUFFERED"}}
		case "unurl":
			m.DropURL = p[0]
		case "policy":
			m.Policy = &blixard.PolicyStatement{ID: p[0], Qualifier: p[1], JSON: "{}"}
		case "unpolicy":
			m.DropPolicy = &state.PolicyRef{ID: p[0], Qualifier: p[1]}
		case "async":
			m.Async = &blixard.AsyncConfig{Qualifier: p[0], MaxRetries: n, MaxAgeMS: 60_000, OnFailure: "f"}
		case "unasync":
			m.DropAsync = p[0]
		}
	}
	if w.has("default") {
		m.Concurrency = &state.ConcurrencyChange{Clear: true}
	}
	st.answer(m)
}

func (st *functionStory) node(verb string, name blixard.NodeName) {
	n := st.s.View().Node(name)
	switch verb {
	case "drain":
		st.answer(&state.SetNode{Name: name, Availability: blixard.Draining})
	case "active":
		st.answer(&state.SetNode{Name: name, Availability: blixard.Active})
	case "lose":
		st.answer(&state.LoseNode{Name: name, RaftID: n.RaftID, Epoch: n.Epoch})
	case "revive":
		st.answer(&state.ReviveNode{Name: name, RaftID: n.RaftID})
	case "join":
		st.answer(&state.JoinNode{Node: state.NodeIdentity{Name: name, Address: string(name)}, Replace: true})
		st.report(name)
	case "remove", "force":
		st.answer(&state.RemoveNode{Name: name, Force: verb == "force"})
	}
}

func (st *functionStory) event(verb string, w *words) {
	v := st.s.View()
	e := v.AsyncEvent(w.at(0))
	if e == nil {
		e = &blixard.AsyncEvent{}
	}
	owner, epoch := e.Owner, e.OwnerEpoch
	if w.named["owner"] != "" {
		owner = blixard.NodeName(w.named["owner"])
		epoch = v.Node(owner).Epoch
	}
	settle := &state.SettleEvent{ID: w.at(0), Owner: owner, OwnerEpoch: epoch}
	if id, f, ok := strings.Cut(w.named["next"], ":"); ok {
		settle.Next = &state.EnqueueEvent{ID: id, Function: blixard.FunctionName(f), Payload: []byte(`{"version":"1.0"}`), Owner: owner, OwnerEpoch: epoch}
	}
	switch verb {
	case "enqueue":
		st.answer(&state.EnqueueEvent{ID: w.at(0), Function: blixard.FunctionName(w.at(1)), Qualifier: w.named["qualifier"], Payload: []byte("{}"), Owner: owner, OwnerEpoch: epoch})
	case "fail", "throttle":
		settle.Result, settle.FunctionError, settle.Error = state.SettleRetry, verb == "fail", "boom"
		if settle.NotBeforeMS, settle.Condition = state.NextAttempt(e, settle.FunctionError, st.nowMS); settle.Condition != "" {
			settle.Result = state.SettleDead
		}
		st.answer(settle)
	case "succeed":
		settle.Result = state.SettleSuccess
		st.answer(settle)
	case "dead":
		settle.Result, settle.Condition, settle.Error = state.SettleDead, state.ConditionZeroConcurrency, "none may run"
		st.answer(settle)
	case "take":
		to := blixard.NodeName(w.at(0))
		st.answer(&state.TakeEvents{From: blixard.NodeName(w.named["from"]), FromEpoch: uint64(w.number("epoch")), Node: to, NodeEpoch: v.Node(to).Epoch, Most: 100})
	case "replay":
		st.answer(&state.ReplayEvent{ID: w.at(0), Node: "n1", NodeEpoch: v.Node("n1").Epoch})
	case "purge":
		st.answer(&state.PurgeEvent{ID: w.at(0)})
	default:
		st.t.Fatalf("unknown line %q", verb)
	}
}

func (st *functionStory) show(v *state.View, name blixard.FunctionName) {
	f := v.Function(name)
	if f == nil {
		st.out.WriteString("none\n")
		return
	}
	fmt.Fprintf(&st.out, "%s: at most %d (reserved %t), next version %d, deleting %t\n", f.Name, f.MaxConcurrent, f.Reserved, f.NextNumber, f.Deleting)
	v.FunctionVersions(name, func(fv *blixard.FunctionVersion) bool {
		fmt.Fprintf(&st.out, "  %s: code %s, %d MiB, %q, seq %d, %s", blixard.VersionName(fv.Number), fv.CodeDigest[62:], fv.Spec.MemoryMiB, fv.Spec.Description, fv.Seq, fv.State)
		if fv.StateCode != "" {
			fmt.Fprintf(&st.out, " (%s: %s)", fv.StateCode, fv.StateReason)
		}
		if fv.Builder != "" {
			fmt.Fprintf(&st.out, " by %s", fv.Builder)
		}
		if p := fv.Previous; p != nil {
			fmt.Fprintf(&st.out, ", meanwhile code %s seq %d", p.CodeDigest[62:], p.Seq)
		}
		st.out.WriteString("\n")
		return true
	})
	for _, a := range f.Aliases {
		fmt.Fprintf(&st.out, "  %s -> %d, %d of a million -> %d\n", a.Name, a.Number, a.SecondShare, a.Second)
	}
	for _, u := range f.URLs {
		fmt.Fprintf(&st.out, "  URL %s for %s\n", u.ID, u.Qualifier)
	}
	for _, t := range f.Triggers {
		fmt.Fprintf(&st.out, "  trigger %s: %s %v for %s\n", t.ID, t.Path, t.Methods, t.Qualifier)
	}
	for _, p := range f.Policy {
		fmt.Fprintf(&st.out, "  policy %s for %s\n", p.ID, p.Qualifier)
	}
	for _, a := range f.Async {
		fmt.Fprintf(&st.out, "  %s is retried %d times\n", a.Qualifier, a.MaxRetries)
	}
}

func (st *functionStory) showEvent(e *blixard.AsyncEvent) {
	fmt.Fprintf(&st.out, "%s: %s:%s on %q@%d, %d attempts, %d tries, not before %d, accepted %d, %d hops", e.ID, e.Function, e.Qualifier, e.Owner, e.OwnerEpoch, e.Attempts, e.Tries, e.NotBeforeMS, e.AcceptedMS, e.Hops)
	if e.Dead {
		fmt.Fprintf(&st.out, ", dead since %d: %s", e.DeadMS, e.Condition)
	}
	if e.LastError != "" {
		fmt.Fprintf(&st.out, ", %q", e.LastError)
	}
	st.out.WriteString("\n")
}
