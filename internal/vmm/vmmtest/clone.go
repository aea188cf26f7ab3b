package vmmtest

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/blixard/blixard/internal/vmm"
)

// cloner is what the suite needs of a driver that clones.
type cloner interface {
	vmm.Cloner
	vmm.Channels
}

var building = vmm.Ref{Instance: "template-1", Generation: 1}

func cloneRef(n int) vmm.Ref { return vmm.Ref{Instance: "clone-" + strconv.Itoa(n), Generation: 1} }

// cloning tells whether the driver has anything to do with templates.
func cloning(t *testing.T, o Options, d vmm.Driver) cloner {
	t.Helper()
	if o.Template == nil {
		return nil
	}
	c, ok := d.(cloner)
	if !ok {
		t.Fatalf("%T is no Cloner with Channels", d)
	}
	return c
}

// talk is a conversation with a guest on its call port.
type talk struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

func dialCall(t *testing.T, d vmm.Driver, ref vmm.Ref) *talk {
	t.Helper()
	conn, err := d.(vmm.Channels).DialCall(context(t), ref)
	check(t, err, "DialCall")
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Logf("closing a call port: %v", err)
		}
	})
	if deadline, ok := context(t).Deadline(); ok {
		check(t, conn.SetDeadline(deadline), "SetDeadline")
	}
	return &talk{t, conn, bufio.NewReader(conn)}
}

func (k *talk) say(line string) string {
	k.t.Helper()
	_, err := fmt.Fprintln(k.conn, line)
	check(k.t, err, "writing to the call port")
	return k.listen()
}

func (k *talk) listen() string {
	k.t.Helper()
	answer, err := k.in.ReadString('\n')
	check(k.t, err, "reading from the call port")
	return strings.TrimSuffix(answer, "\n")
}

func (k *talk) expect(line, want string) {
	k.t.Helper()
	if got := k.say(line); got != want {
		k.t.Errorf("said %q, got %q, want %q", line, got, want)
	}
}

// buildTemplate saves a guest that remembers "from the template".
func buildTemplate(t *testing.T, o Options, d cloner) vmm.Spec {
	t.Helper()
	spec := o.Template(t, building)
	spec.Template, spec.CallPort = filepath.Join(t.TempDir(), "a template, of many"), true
	start(t, d, spec)
	if s := one(t, d); s.Phase != vmm.Running || !s.Template {
		t.Errorf("a guest that is to become a template is listed as %+v", s)
	}
	guest := dialCall(t, d, building)
	guest.expect("get", "")
	guest.expect("set from the template", "ok")
	check(t, d.Snapshot(context(t), building), "Snapshot")
	if s := one(t, d); s.Phase != vmm.Exited || s.ExitReason == "" {
		t.Errorf("after Snapshot: %+v", s)
	}
	wantError(t, d.Start(context(t), spec), vmm.ErrStarted)
	check(t, d.Remove(context(t), building), "Remove")
	nothingLeft(t, o, d)
	return spec
}

func cloneOf(spec vmm.Spec, n int) vmm.Spec {
	spec.Ref = cloneRef(n)
	spec.Kernel, spec.Initrd, spec.Cmdline = "", "", ""
	return spec
}

func clone(t *testing.T, d cloner, spec vmm.Spec) {
	t.Helper()
	check(t, d.Clone(context(t), spec), "Clone")
}

// fingerprint is what the files of a directory are, and when they were written.
func fingerprint(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err, "ReadDir")
	var b strings.Builder
	for _, e := range entries {
		info, err := e.Info()
		check(t, err, "Info")
		file, err := os.Open(filepath.Join(dir, e.Name()))
		check(t, err, "Open")
		sum := sha256.New()
		_, err = io.Copy(sum, file)
		check(t, err, "reading")
		check(t, file.Close(), "closing")
		fmt.Fprintf(&b, "%s %s %x\n", e.Name(), info.ModTime(), sum.Sum(nil))
	}
	return b.String()
}

// Each clone goes on where the template was saved, and changes nothing but
// itself.
func clones(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := buildTemplate(t, o, d)
	before := fingerprint(t, spec.Template)
	if got := strings.Join(fileNames(t, spec.Template), " "); got != "devices memory template.json" {
		t.Errorf("the template has the files %s", got)
	}
	const many = 4
	var talks []*talk
	var all sync.WaitGroup
	errs := make([]error, many)
	for n := range many {
		all.Go(func() { errs[n] = d.Clone(context(t), cloneOf(spec, n)) })
	}
	all.Wait()
	for n, err := range errs {
		check(t, err, "Clone "+strconv.Itoa(n))
	}
	for _, s := range list(t, d) {
		if s.Phase != vmm.Paused || s.Pid == 0 || !s.Template {
			t.Errorf("a new clone is listed as %+v", s)
		}
	}
	for n := range many {
		wantError(t, d.Clone(context(t), cloneOf(spec, n)), vmm.ErrStarted)
		guest := dialCall(t, d, cloneRef(n))
		check(t, d.Resume(context(t), cloneRef(n)), "Resume")
		talks = append(talks, guest)
	}
	for n, guest := range talks {
		guest.expect("get", "from the template")
		guest.expect("set clone "+strconv.Itoa(n), "ok")
	}
	for n, guest := range talks {
		guest.expect("get", "clone "+strconv.Itoa(n))
	}
	if m, ok := d.(vmm.Meter); ok {
		private, shared, err := m.MemoryUse(context(t), cloneRef(0))
		check(t, err, "MemoryUse")
		if private <= 0 || shared <= 0 {
			t.Errorf("memory use is %d and %d bytes", private, shared)
		}
		_, _, err = m.MemoryUse(context(t), building)
		wantError(t, err, vmm.ErrNotFound)
	}
	clone(t, d, cloneOf(spec, many))
	last := dialCall(t, d, cloneRef(many))
	check(t, d.Resume(context(t), cloneRef(many)), "Resume")
	last.expect("get", "from the template")
	for n := range many + 1 {
		if n%2 == 0 {
			check(t, d.Stop(context(t), cloneRef(n), 0), "Stop")
		}
		check(t, d.Remove(context(t), cloneRef(n)), "Remove")
	}
	nothingLeft(t, o, d)
	if after := fingerprint(t, spec.Template); after != before {
		t.Errorf("clones changed the template from\n%s to\n%s", before, after)
	}
}

func fileNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	check(t, err, "ReadDir")
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// A clone outlives the daemon, paused or not, and its port can be dialled anew.
func clonesAcrossReopen(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := buildTemplate(t, o, d)
	clone(t, d, cloneOf(spec, 0))
	key, err := d.TemplateKey(context(t))
	check(t, err, "TemplateKey")
	d = cloning(t, o, o.Reopen(t, d))
	if again, err := d.TemplateKey(context(t)); err != nil || again != key || key == "" {
		t.Errorf("the key of templates was %q, is %q, %v", key, again, err)
	}
	if s := one(t, d); s.Phase != vmm.Paused || !s.Template {
		t.Errorf("after reopening: %+v", s)
	}
	wantError(t, d.Clone(context(t), cloneOf(spec, 0)), vmm.ErrStarted)
	check(t, d.Resume(context(t), cloneRef(0)), "Resume")
	guest := dialCall(t, d, cloneRef(0))
	guest.expect("get", "from the template")
	d = cloning(t, o, o.Reopen(t, d))
	o.Kill(t, d, one(t, d))
	exited(t, d)
	check(t, d.Remove(context(t), cloneRef(0)), "Remove")
	clone(t, d, cloneOf(spec, 1)) // of a template that another daemon built
	check(t, d.Stop(context(t), cloneRef(1), 0), "Stop of a paused clone")
	check(t, d.Remove(context(t), cloneRef(1)), "Remove")
	nothingLeft(t, o, d)
}

// A template is its files, wherever they are.
func templatesTravel(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := buildTemplate(t, o, d)
	there := filepath.Join(t.TempDir(), "elsewhere")
	check(t, os.CopyFS(there, os.DirFS(spec.Template)), "CopyFS")
	check(t, os.RemoveAll(spec.Template), "RemoveAll")
	other := cloning(t, o, o.New(t))
	spec.Template = there
	clone(t, other, cloneOf(spec, 0))
	guest := dialCall(t, other, cloneRef(0))
	check(t, other.Resume(context(t), cloneRef(0)), "Resume")
	guest.expect("get", "from the template")
}

func wrongClones(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := buildTemplate(t, o, d)
	for name, spoil := range map[string]func(*vmm.Spec){
		"vcpus":        func(s *vmm.Spec) { s.VCPUs++ },
		"memory":       func(s *vmm.Spec) { s.MemoryMiB *= 2 },
		"network":      func(s *vmm.Spec) { s.Network = vmm.Network{Mode: otherMode(s.Network.Mode)} },
		"no call port": func(s *vmm.Spec) { s.CallPort = false },
		"no template":  func(s *vmm.Spec) { s.Template = "" },
		"relative":     func(s *vmm.Spec) { s.Template = "template" },
		"another disk": func(s *vmm.Spec) {
			s.Disks = append(slices.Clone(s.Disks), vmm.Disk{Path: os.Args[0], Format: "raw", ReadOnly: true})
		},
		"hostile name":       func(s *vmm.Spec) { s.Ref.Instance = "../evil" },
		"subnet without net": func(s *vmm.Spec) { s.Network.Subnet = "all of it" },
	} {
		bad := cloneOf(spec, 0)
		spoil(&bad)
		if err := d.Clone(context(t), bad); !errors.Is(err, vmm.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	wantError(t, d.Start(context(t), spec), vmm.ErrInvalid) // there is a template already
	for name, spoil := range map[string]func(*testing.T, string){
		"template.json is missing": without("template.json"),
		"memory is missing":        without("memory"),
		"devices are missing":      without("devices"),
		"nothing is there":         func(t *testing.T, dir string) { check(t, os.RemoveAll(dir), "RemoveAll") },
		"it is of another machine": func(t *testing.T, dir string) {
			path := filepath.Join(dir, "template.json")
			text, err := os.ReadFile(path)
			check(t, err, "ReadFile")
			var record map[string]any
			check(t, json.Unmarshal(text, &record), "Unmarshal")
			record["Key"] = "another machine"
			text, err = json.Marshal(record)
			check(t, err, "Marshal")
			check(t, os.WriteFile(path, text, 0o600), "WriteFile")
		},
		"it is torn": func(t *testing.T, dir string) {
			check(t, os.WriteFile(filepath.Join(dir, "template.json"), []byte("{"), 0o600), "WriteFile")
		},
	} {
		bad := cloneOf(spec, 0)
		bad.Template = filepath.Join(t.TempDir(), "copy")
		check(t, os.CopyFS(bad.Template, os.DirFS(spec.Template)), "CopyFS")
		spoil(t, bad.Template)
		if err := d.Clone(context(t), bad); !errors.Is(err, vmm.ErrTemplate) {
			t.Errorf("%s: got %v, want ErrTemplate", name, err)
		}
	}
	nothingLeft(t, o, d)
}

func without(name string) func(*testing.T, string) {
	return func(t *testing.T, dir string) { check(t, os.Remove(filepath.Join(dir, name)), "Remove") }
}

func otherMode(mode string) string {
	if mode == "none" {
		return "user"
	}
	return "none"
}

func wrongSnapshots(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	wantError(t, d.Snapshot(context(t), building), vmm.ErrNotFound)
	wantError(t, d.Snapshot(context(t), vmm.Ref{Instance: "../evil"}), vmm.ErrInvalid)
	start(t, d, o.Spec(t, webapp))
	wantError(t, d.Snapshot(context(t), webapp), vmm.ErrInvalid)
	_, err := d.DialCall(context(t), webapp)
	wantError(t, err, vmm.ErrInvalid)
	check(t, d.Remove(context(t), webapp), "Remove")

	spec := buildTemplate(t, o, d)
	clone(t, d, cloneOf(spec, 0))
	wantError(t, d.Snapshot(context(t), cloneRef(0)), vmm.ErrInvalid)
	if s := one(t, d); s.Phase != vmm.Paused {
		t.Errorf("a refused Snapshot left %+v", s)
	}
	check(t, d.Stop(context(t), cloneRef(0), 0), "Stop")
	wantError(t, d.Snapshot(context(t), cloneRef(0)), vmm.ErrNotRunning)
	wantError(t, d.Resume(context(t), cloneRef(0)), vmm.ErrNotRunning)
	_, err = d.DialCall(context(t), cloneRef(0))
	wantError(t, err, vmm.ErrNotRunning)
	check(t, d.Remove(context(t), cloneRef(0)), "Remove")
	nothingLeft(t, o, d)
}

// What was to become a template and did not leaves nothing that could be taken
// for one, and the next try works.
func abandonedTemplate(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := o.Template(t, building)
	spec.Template, spec.CallPort = filepath.Join(t.TempDir(), "template"), true
	start(t, d, spec)
	dialCall(t, d, building).expect("get", "")
	d = cloning(t, o, o.Reopen(t, d))
	wantError(t, d.Clone(context(t), cloneOf(spec, 0)), vmm.ErrTemplate)
	ctx, cancel := contextWithCancel(t)
	cancel()
	if d.Snapshot(ctx, building) == nil {
		t.Error("Snapshot succeeded without a context")
	}
	wantError(t, d.Clone(context(t), cloneOf(spec, 0)), vmm.ErrTemplate)
	check(t, d.Remove(context(t), building), "Remove")
	nothingLeft(t, o, d)
	spec.Ref.Generation++
	start(t, d, spec)
	d = cloning(t, o, o.Reopen(t, d)) // who saves it need not be who started it
	dialCall(t, d, spec.Ref).expect("get", "")
	check(t, d.Snapshot(context(t), spec.Ref), "Snapshot")
	check(t, d.Remove(context(t), spec.Ref), "Remove")
	clone(t, d, cloneOf(spec, 0))
	check(t, d.Remove(context(t), cloneRef(0)), "Remove of a paused clone")
	nothingLeft(t, o, d)
}

func canceledClone(t *testing.T, o Options) {
	d := cloning(t, o, o.New(t))
	if d == nil {
		return
	}
	spec := buildTemplate(t, o, d)
	ctx, cancel := contextWithCancel(t)
	cancel()
	if d.Clone(ctx, cloneOf(spec, 0)) == nil {
		t.Fatal("Clone succeeded without a context")
	}
	for _, s := range list(t, d) {
		if s.Phase == vmm.Running || s.Phase == vmm.Paused {
			t.Errorf("it runs unnoticed: %+v", s)
		}
	}
	check(t, d.Remove(context(t), cloneRef(0)), "Remove")
	nothingLeft(t, o, d)
}
