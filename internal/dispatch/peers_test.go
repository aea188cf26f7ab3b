package dispatch_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/dispatch"
)

// pair is two nodes that know each other.
func pair(t *testing.T) (a, b *world) {
	c := newCluster(t, "n1", "n2")
	la, lb := &later{}, &later{}
	a = newNode(t, c, "n1", func(o *dispatch.Options) { o.Peers = la })
	b = newNode(t, c, "n2", func(o *dispatch.Options) { o.Peers = lb })
	p := peers(t, a, b)
	la.Peers, lb.Peers = p, p
	return a, b
}

func TestTemplateAndCodeComeFromAPeer(t *testing.T) {
	a, b := pair(t)
	a.deploy("f", 10, nil)
	if r := b.must("f", "echo"); r.Start != blixard.StartRestored || r.Node != "n2" {
		t.Errorf("%+v", r)
	}
	if contains(b.notes, "init") {
		t.Error("the function was initialised again")
	}
	if fv := b.version("f"); !b.store.Has(fv.CodeDigest) {
		t.Error("the code is not there")
	}
}

func TestCopiesAreKept(t *testing.T) {
	a, b := pair(t)
	a.deploy("f", 10, nil)
	b.until("a copy", func() bool { s := b.status("f"); return s.HasTemplate() })
	if contains(b.notes, "init") {
		t.Error("the function was initialised again")
	}
}

func TestWithoutATemplateItIsMadeFirst(t *testing.T) {
	a, b := pair(t)
	a.deploy("f", 10, nil)
	a.stop()
	if err := os.RemoveAll(filepath.Join(a.options.Dir, "templates")); err != nil {
		t.Fatal(err)
	}
	if r := b.must("f", "echo"); r.Start != blixard.StartRestored {
		t.Errorf("%+v", r)
	}
	if s := b.status("f"); !s.HasTemplate() {
		t.Errorf("%+v", s)
	}
}

func TestNeighbourGetsIdleSlots(t *testing.T) {
	a, b := pair(t)
	a.deploy("f", 4, nil)
	for range 3 {
		a.must("f", "echo")
	}
	a.until("all slots here", func() bool {
		a.must("f", "echo")
		return a.cluster.View().Slots("f", "n1").Count > 0
	})
	// The other one asks until the idle ones came back.
	b.until("a call over there", func() bool { _, _, err := b.invoke("f", "echo"); return err == nil })
	if n := a.cluster.View().SlotsLeased("f"); n > 4 {
		t.Errorf("%d slots are leased of 4", n)
	}
}

func TestPeersTell(t *testing.T) {
	a, b := pair(t)
	a.deploy("f", 10, nil)
	a.must("f", "log hello from the guest")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p := b.options.Peers
	var lines []string
	done := errors.New("seen enough")
	err := dispatch.LogsOn(ctx, p, "n1", dispatch.LogQuery{Function: "f", Any: true, Follow: true}, func(l dispatch.LogLine) error {
		lines = append(lines, l.Text)
		if strings.HasPrefix(l.Text, "REPORT") {
			if strings.Contains(l.Text, "Init Duration") {
				a.must("f", "log again")
				return nil
			}
			return done
		}
		return nil
	})
	if !errors.Is(err, done) || !contains(lines, "hello from the guest") || !contains(lines, "again") || !contains(lines, "START RequestId") {
		t.Errorf("%v: %q", err, lines)
	}
	m, err := dispatch.MetricsOn(ctx, p, "n1", "f")
	if err != nil || m.Invocations() != 2 {
		t.Errorf("%+v, %v", m, err)
	}
	s, err := dispatch.StatusOn(ctx, p, "n1")
	if err != nil || s.Node != "n1" || len(s.Functions) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	kinds := map[string]bool{}
	if err := dispatch.EventsOn(ctx, p, "n1", "f", false, func(e dispatch.Event) error { kinds[e.Kind] = true; return nil }); err != nil {
		t.Error(err)
	}
	for _, kind := range []string{"build", "template", "lease", "ready"} {
		if !kinds[kind] {
			t.Errorf("no event %s in %v", kind, kinds)
		}
	}
	if err := dispatch.LogsOn(ctx, p, "n1", dispatch.LogQuery{Function: "none"}, nil); blixard.CodeOf(err) != blixard.CodeNotFound {
		t.Errorf("%v", err)
	}
	if _, err := p.Get(ctx, "n1", "template/../../etc/passwd"); err == nil {
		t.Error("a path leads out")
	}
}

// TestTransfer: a template arrives as it is, holes included, and not at all when
// it was damaged.
func TestTransfer(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	memory := make([]byte, 5<<20)
	for i := range 3000 {
		memory[1<<20+i*7] = byte(i)
	}
	copy(memory[len(memory)-3:], "end")
	f, err := os.Create(filepath.Join(from, "memory"))
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(memory); at += 4096 {
		if page := memory[at : at+4096]; bytes.Count(page, []byte{0}) < 4096 {
			if _, err := f.WriteAt(page, int64(at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(f.Close(), os.WriteFile(filepath.Join(from, "template.json"), []byte("{}"), 0o600), os.WriteFile(filepath.Join(from, "empty"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	var wire bytes.Buffer
	if err := dispatch.SendTemplate(&wire, from); err != nil {
		t.Fatal(err)
	}
	if wire.Len() > 100_000 {
		t.Errorf("%d bytes for 3,000", wire.Len())
	}
	if err := dispatch.ReceiveTemplate(bytes.NewReader(wire.Bytes()), to); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"memory", "template.json", "empty"} {
		want, err := os.ReadFile(filepath.Join(from, name))
		got, err2 := os.ReadFile(filepath.Join(to, name))
		if err := errors.Join(err, err2); err != nil || sha256.Sum256(got) != sha256.Sum256(want) {
			t.Errorf("%s: %v, %d bytes of %d", name, err, len(got), len(want))
		}
	}
	for _, at := range []int{0, wire.Len() / 3, wire.Len() / 2} {
		bad := bytes.Clone(wire.Bytes())
		bad[at] ^= 0x20
		if err := dispatch.ReceiveTemplate(bytes.NewReader(bad), t.TempDir()); err == nil {
			t.Errorf("damage at %d was not seen", at)
		}
	}
	if err := dispatch.ReceiveTemplate(bytes.NewReader(wire.Bytes()[:wire.Len()-50]), t.TempDir()); err == nil {
		t.Error("a cut was not seen")
	}
}

func FuzzReceiveTemplate(f *testing.F) {
	f.Add([]byte("F\x00\x01a\x00\x00\x00\x00\x00\x00\x00\x01"))
	f.Fuzz(func(t *testing.T, plain []byte) {
		dir := t.TempDir()
		if err := dispatch.ReceivePlain(bytes.NewReader(plain), dir); err == nil {
			return
		}
		entries, err := os.ReadDir(filepath.Dir(dir))
		if err != nil || len(entries) != 1 {
			t.Errorf("%v: %v", entries, err)
		}
	})
}

// TestTidy: what nobody has is removed, templates at once when they take too
// much.
func TestTidy(t *testing.T) {
	w := newWorld(t, func(o *dispatch.Options) { o.Limits.CodeKeep = time.Nanosecond })
	w.deploy("f", 1, nil)
	p := w.put("bootstrap", []byte("#!/bin/sh\n# unused\n"))
	unused := map[string]time.Time{}
	w.until("the removal", func() bool { w.d.TidyNow(unused); return !w.store.Has(p.Digest) })
	if !w.store.Has(w.version("f").CodeDigest) {
		t.Error("code that is needed was removed")
	}
	w.until("the template", func() bool { s := w.status("f"); return s.HasTemplate() })
}

// TestMetricsAreWellFormed: what is exported can be gathered and has its values.
func TestMetricsAreWellFormed(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	w := newWorld(t, func(o *dispatch.Options) { o.Registerer = reg })
	w.deploy("f", 10, nil)
	w.must("f", "echo")
	w.must("f", "echo")
	if _, _, err := w.invoke("f", "fail now"); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			key := f.GetName()
			for _, l := range m.GetLabel() {
				key += " " + l.GetValue()
			}
			got[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for key, want := range map[string]float64{
		"blixard_function_errors_total f function": 1, "blixard_function_errors_total f timeout": 0, "blixard_function_invocations_total f warm": 2,
		"blixard_function_duration_seconds f": 3, "blixard_function_cold_start_seconds f": 1, "blixard_function_instances f ready": 1,
	} {
		if value, ok := got[key]; !ok || value != want {
			t.Errorf("%s = %v, want %v", key, value, want)
		}
	}
}
