package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/cli"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/sim"
	"github.com/blixard/blixard/internal/state"
)

// TestMain makes the test binary the program for the workers of a soak.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "sim" && os.Args[2] == "worker" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

// command runs a command line in this process.
func command(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, words bytes.Buffer
	code = cli.Run(context.Background(), cli.Env{
		Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &words, Getenv: func(string) string { return "" }, Extra: []*cobra.Command{simCommand()},
	}, args)
	return code, out.String(), words.String()
}

func wantExit(t *testing.T, want int, inStderr, stdin string, args ...string) {
	t.Helper()
	code, _, stderr := command(t, stdin, args...)
	if code != want || !strings.Contains(stderr, inStderr) {
		t.Errorf("%v ended with %d and said %q; want %d and %q", args, code, stderr, want, inStderr)
	}
}

const planned = `apiVersion: blixard.dev/v1
kind: Node
metadata: {name: node}
spec: {count: 3, vcpus: 8, memory: 8G, zone: a}
---
apiVersion: blixard.dev/v1
kind: VM
metadata: {name: web}
spec: {replicas: 3, memory: 1G, antiAffinityGroup: web}
---
apiVersion: blixard.dev/v1
kind: VM
metadata: {name: api}
spec: {replicas: 3, memory: 1G}
`

func TestSimPlan(t *testing.T) {
	code, out, stderr := command(t, planned, "sim", "plan", "-f", "-", "--lose", "node-2")
	for _, want := range []string{"Losing node-2", "its node node-2 was lost", "DOES NOT RUN", "anti-affinity", "why web has no place for 1:", "2 of 3 voters are left", "declared lost  after 6.0 s"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Fatalf("ended with %d; %q is not in\n%s%s", code, want, out, stderr)
		}
	}
	code, out, _ = command(t, planned, "sim", "plan", "-f", "-", "--drain", "node-2", "-o", "json")
	var r sim.WhatIfReport
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || r.OK || len(r.Moves) != 1 || len(r.Stays) != 1 {
		t.Errorf("%d, %v\n%s", code, err, out)
	}
	wantExit(t, 6, "1 wanted instance down in the end", planned, "sim", "plan", "-f", "-", "--lose", "node-2", "--check")
	wantExit(t, 2, "did you mean node-1?", planned, "sim", "plan", "-f", "-", "--lose", "nod-1")
	wantExit(t, 2, "no node is zone=c", planned, "sim", "plan", "-f", "-", "--lose", "zone=c")
	wantExit(t, 2, "give one of -f FILE, --snapshot FILE and --live", "", "sim", "plan")
	wantExit(t, 2, "standard input:4: spec.vcpuz is not known (did you mean vcpus?)", strings.Replace(planned, "vcpus", "vcpuz", 1), "sim", "plan", "-f", "-")
	wantExit(t, 2, "cannot read /no/such", "", "sim", "plan", "--snapshot", "/no/such")
	wantExit(t, 7, "cannot reach", "", "sim", "plan", "--live", "--addr", "127.0.0.1:1", "--timeout", "10s")
}

// recording writes a recording of a small cluster; its hash is wrong by flip.
func recording(t *testing.T, flip uint64) (path string, s *state.State) {
	t.Helper()
	s, err := sim.Describe([]sim.WhatIfNode{{Name: "node1", Capacity: blixard.Resources{MilliCPU: 8000, MemoryMiB: 4096}}}, nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	v := s.View()
	w, err := record.NewWriter(&b, record.Header{Node: "node1", Release: "test", Index: v.Index, Term: v.Term, Conf: &raftpb.ConfState{Voters: []uint64{1}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Snapshot(v); err != nil {
		t.Fatal(err)
	}
	spec := blixard.VMSpec{Replicas: 1}
	spec.Defaults()
	for _, name := range []blixard.VMName{"web", "db"} {
		data := state.EncodeEntry([]state.Envelope{{NowMS: 1_700_000_000_000, Actor: "alice", Command: &state.CreateVM{Name: name, Spec: spec}}})
		index, term := s.Index()+1, uint64(2)
		if err := w.Entry(&raftpb.Entry{Index: &index, Term: &term, Type: raftpb.EntryNormal.Enum(), Data: data}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Apply(index, term, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Checkpoint(record.Checkpoint{Index: s.Index(), Hash: s.View().Hash() ^ flip}); err != nil {
		t.Fatal(err)
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "incident.blxrec")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, s
}

func TestSimReplay(t *testing.T) {
	path, s := recording(t, 0)
	code, out, _ := command(t, "", "sim", "replay", path)
	for _, want := range []string{"alice: create web with 1 replicas, stopped\n", "result      sound", "1 recorded hashes agree"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("ended with %d; %q is not in\n%s", code, want, out)
		}
	}
	code, out, _ = command(t, "", "sim", "replay", path, "--at", "4", "-o", "json")
	var r shownReplay
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || !r.OK || r.To != 4 || r.State == nil || len(r.State.VMs) != int(4-r.From) {
		t.Errorf("%d, %v\n%s", code, err, out)
	}
	wantExit(t, 2, "the recording ends at index", "", "sim", "replay", path, "--at", "99")
	wantExit(t, 2, "begins at index", "", "sim", "replay", path, "--at", "1")
	wantExit(t, 2, "there is no file", "", "sim", "replay", path+"x")
	wantExit(t, 2, "neither a recording nor a schedule", "{}", "sim", "replay", "-")
	wantExit(t, 2, "needs FILE", "", "sim", "replay")

	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wantExit(t, 2, "it ends within a frame", string(data[:len(data)-5]), "sim", "replay", "-")

	wrong, _ := recording(t, 1)
	wantExit(t, 1, "the recorded cluster broke S13", "", "sim", "replay", "-q", wrong)

	// A snapshot of the same cluster can be asked what if.
	snapshot := filepath.Join(t.TempDir(), "state.snapshot")
	f, err := os.Create(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.View().WriteTo(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if code, out, stderr := command(t, "", "sim", "plan", "--snapshot", snapshot); code != 0 || !strings.Contains(out, "node1") {
		t.Errorf("%d\n%s%s", code, out, stderr)
	}
}

func TestSimRun(t *testing.T) {
	play := func() map[string]any {
		code, out, stderr := command(t, "", "sim", "run", "--seed", "5", "--profile", "calm", "--nodes", "3", "--vms", "10", "--hours", "0.005", "-o", "json")
		if code != 0 {
			t.Fatalf("ended with %d: %s%s", code, out, stderr)
		}
		var r map[string]any
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	first, second := play(), play()
	for _, key := range []string{"ok", "seed", "trace_hash", "events", "virtual_seconds", "violation"} {
		if _, there := first[key]; !there {
			t.Errorf("the result has no %q", key)
		}
	}
	if first["trace_hash"] != second["trace_hash"] || first["trace_hash"] == "" {
		t.Errorf("hashes %v and %v", first["trace_hash"], second["trace_hash"])
	}
	wantExit(t, 2, "did you mean swarm?", "", "sim", "run", "--profile", "swrm")
	wantExit(t, 2, "--nodes is 12", "", "sim", "run", "--nodes", "12")
	wantExit(t, 2, "sim has no command", "", "sim", "rnu")
	wantExit(t, 2, "--size belongs to --profile scale", "", "sim", "run", "--size", "4x4")
}

func TestSimScale(t *testing.T) {
	code, out, stderr := command(t, "", "sim", "run", "--profile", "scale", "--size", "10x500", "--seed", "3", "-o", "json")
	var r shownScale
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || !r.OK || len(r.Sizes) != 1 || r.Sizes[0].Placed < 500 || r.Sizes[0].PerInstance <= 0 {
		t.Errorf("%d, %v\n%s%s", code, err, out, stderr)
	}
	wantExit(t, 2, "write --size 100x20000", "", "sim", "run", "--profile", "scale", "--size", "1000")
}

func TestSimSoak(t *testing.T) {
	code, out, stderr := command(t, "", "sim", "soak", "--seeds", "4", "--from", "1", "--parallel", "2", "--profile", "calm", "--nodes", "3", "--vms", "5", "--hours", "0.002", "-o", "json")
	var r soakReport
	if err := json.Unmarshal([]byte(out), &r); code != 0 || err != nil || !r.OK || r.Seeds != 4 || r.Events == 0 || len(r.Coverage) == 0 {
		t.Errorf("%d, %v\n%s%s", code, err, out, stderr)
	}
	wantExit(t, 2, "--parallel is 0", "", "sim", "soak", "--parallel", "0")
}
