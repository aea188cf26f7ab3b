package cli

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

// zeros are the paths of what is not set in a value.
func zeros(v reflect.Value, path string) []string {
	if v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct {
		if v.IsZero() {
			return []string{path}
		}
		return nil
	}
	var out []string
	for i := range v.NumField() {
		out = append(out, zeros(v.Field(i), path+"."+v.Type().Field(i).Name)...)
	}
	return out
}

// TestAFlagForEveryFieldOfASpec: whatever a VM can be, `vm create` can say, and so
// can a document.
func TestAFlagForEveryFieldOfASpec(t *testing.T) {
	var flags specFlags
	cmd := &cobra.Command{}
	flags.add(cmd, cobra.NoFileCompletions)
	for _, set := range []string{
		"type=long-lived", "image=builtin", "hypervisor=qemu", "replicas=2", "vcpus=2", "memory=1G", "disk=1G", "constraint=zone=a", "prefer=zone=a:60",
		"affinity=web", "anti-affinity-group=g", "spread-across=zone", "strategy=binpack", "priority=7", "env=A=b", "label=a=b", "publish=80:80",
		"health-check=http:80/ok", "health-interval=1s", "health-timeout=1s", "health-start-period=1s", "health-retries=2", "singleton=true",
		"on-partition=stop", "restart=never", "restart-backoff=1s", "restart-max-backoff=2s", "max-restarts=3", "depends-on=web", "network=user", "stop-grace=1s",
	} {
		name, value, _ := strings.Cut(set, "=")
		if err := cmd.Flags().Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	spec, err := flags.merge(cmd.Flags(), nil, []string{"/bin/true"})
	if err != nil {
		t.Fatal(err)
	}
	// An http check has no command; `--health-check exec:COMMAND` has nothing else.
	if left := zeros(reflect.ValueOf(spec), "spec"); !slices.Equal(left, []string{"spec.Health.Command"}) {
		t.Errorf("no flag sets %v", left)
	}
	// The document of this VM says as much.
	file := filepath.Join(t.TempDir(), "vm.yaml")
	var doc bytes.Buffer
	a := &app{output: formatYAML}
	if err := a.printObject(&doc, document(&blixardv1.VM{Name: "all", Desired: "running", Spec: requestSpec(spec)})); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, doc.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	docs, err := a.readDocuments([]string{file})
	if err != nil {
		t.Fatalf("%v\n%s", err, doc.String())
	}
	if got, want := requestSpec(docs[0].spec), requestSpec(spec); !proto.Equal(got, want) {
		t.Errorf("a document loses something:\n%v\n%v", got, want)
	}
	var none blixard.VMSpec
	if left := zeros(reflect.ValueOf(none), ""); len(left) < 20 {
		t.Errorf("only %d fields are looked at", len(left))
	}
}

func TestCompareNatural(t *testing.T) {
	have := []string{"web-10", "web-2", "b", "web-02", "a", "web-1x", "web-1", ""}
	slices.SortFunc(have, compareNatural)
	want := []string{"", "a", "b", "web-1", "web-1x", "web-2", "web-02", "web-10"}
	if !slices.Equal(have, want) {
		t.Fatalf("have %q, want %q", have, want)
	}
}

func TestConditions(t *testing.T) {
	for _, c := range []struct {
		filter string
		have   cell
		want   bool
	}{
		{"a=running", str("Running"), true},
		{"a!=running", str("Running"), false},
		{"a=web-*", str("web-1"), true},
		{"a=*/x*", str("img/xy"), true},
		{"a=[w]*", str("web"), false},
		{"a>=512M", mib(512), true},
		{"a>512M", mib(512), false},
		{"a=1G", mib(1024), true},
		{"a<10", num(9), true},
		{"a>=1G", str("2G"), true},
		{"a>1m", cell{text: "2m0s", number: 120_000, kind: ageCell}, true},
		{"a=node2", str("node1,node2"), true},
		{"a<=1", str("words"), false},
	} {
		cond, err := parseCondition(c.filter)
		if err != nil {
			t.Fatalf("%s: %v", c.filter, err)
		}
		got, err := cond.holds(c.have)
		if err != nil || got != c.want {
			t.Errorf("%s on %q is %v (%v), want %v", c.filter, c.have.text, got, err, c.want)
		}
	}
	for _, bad := range []string{"", "=", "=x", "name", "  =x"} {
		if _, err := parseCondition(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestVisible(t *testing.T) {
	if got := visible("a\x1b[31m\nb\x07\u0090ü"); got != "a?[31m b??ü" {
		t.Fatalf("%q", got)
	}
}

// TestLogLines: pieces of several logs become whole lines, whatever their
// borders.
func TestLogLines(t *testing.T) {
	var b bytes.Buffer
	l := &logLines{w: &b, prefix: true, rest: map[string][]byte{}}
	for _, p := range [][2]string{{"a-1", "one\r\ntw"}, {"a-2", "x"}, {"a-1", "o\n"}, {"a-2", "y\nend"}} {
		if err := l.take(p[0], []byte(p[1])); err != nil {
			t.Fatal(err)
		}
	}
	l.flush()
	if want := "a-1 | one\na-1 | two\na-2 | xy\na-2 | end\n"; b.String() != want {
		t.Fatalf("%q", b.String())
	}
	b.Reset()
	if err := l.take("a-1", bytes.Repeat([]byte("z"), 3*maxLogLine)); err != nil || len(l.rest["a-1"]) > maxLogLine {
		t.Fatalf("%d bytes are held back (%v)", len(l.rest["a-1"]), err)
	}
}

// TestDocumentsRoundTrip: what a document says is what it is printed as.
func TestDocumentsRoundTrip(t *testing.T) {
	docs, err := parseDocuments("x.yaml", []byte(`
apiVersion: blixard.dev/v1
kind: List
items:
- &a
  apiVersion: blixard.dev/v1
  kind: VM
  metadata: {name: a, labels: {x: "1", y: "2"}, version: 7}
  spec: {memory: 64, healthCheck: "exec:true", stopGrace: 1500ms, env: [A=b]}
`))
	if err != nil || len(docs) != 1 {
		t.Fatalf("%v, %d documents", err, len(docs))
	}
	d := docs[0]
	if d.name != "a" || d.spec.MemoryMiB != 64 || len(d.spec.Labels) != 2 || d.request().ExpectVersion != 7 || d.spec.Health.Command[2] != "true" || d.spec.StopGraceMS != 1500 || d.spec.Env[0].Value != "b" || d.spec.Replicas != 1 {
		t.Fatalf("%+v", d.spec)
	}
}

func FuzzDocuments(f *testing.F) {
	f.Add("apiVersion: blixard.dev/v1\nkind: VM\nmetadata: {name: a}\nspec: {memory: 1G, publish: ['80:80/udp', {guestPort: 1}], restart: {mode: never}}\n")
	f.Add("apiVersion: blixard.dev/v1\nkind: Platform\nspec: {vms: [{name: a, placement: {nodeSelector: {a: b}}}], functions: []}\n")
	f.Add("a: &a [*a, *a]\n")
	f.Add("apiVersion: blixard.dev/v1\nkind: List\nitems: &x [*x]\n")
	f.Add("&d\napiVersion: blixard.dev/v1\nkind: List\nitems: [*d]\n")
	f.Fuzz(func(t *testing.T, text string) {
		docs, err := parseDocuments("f", []byte(text))
		for _, d := range docs {
			if err == nil {
				if err := checkSpec(d.name, d.spec); err != nil {
					t.Fatalf("a document was taken that the cluster refuses: %v", err)
				}
			}
		}
	})
}

// TestArgumentsOfOthers: commands of the caller refuse arguments as ours do.
func TestArgumentsOfOthers(t *testing.T) {
	var stderr bytes.Buffer
	run := func(*cobra.Command, []string) error { return nil }
	env := Env{
		Stdout: io.Discard, Stderr: &stderr, Getenv: func(string) string { return "" },
		Extra:        []*cobra.Command{{Use: "server", Args: cobra.NoArgs, RunE: run}},
		ClusterExtra: []*cobra.Command{{Use: "join", Args: cobra.NoArgs, RunE: run}, {Use: "pair A B", Args: cobra.ExactArgs(2), RunE: run}},
	}
	for line, want := range map[string]int{"server": 0, "server foo": 2, "cluster join foo": 2, "cluster pair a": 2, "cluster pair a b": 0} {
		stderr.Reset()
		if got := Run(t.Context(), env, strings.Fields(line)); got != want {
			t.Errorf("%s exits %d, want %d", line, got, want)
		}
		if want != 0 && !strings.Contains(stderr.String(), "hint: usage: blixard ") {
			t.Errorf("%s: %s", line, stderr.String())
		}
	}
}

// TestOurs: only hypervisors and servers of a directory belong to it.
func TestOurs(t *testing.T) {
	const dir, exe = "/tmp/dev", "blixard"
	for _, c := range []struct {
		p    process
		want bool
	}{
		{process{exe: "qemu-system-x86_64", cwd: "/tmp/dev/nodes/node1/vms/web-1.1"}, true},
		{process{exe: "qemu-system-x86_64", cwd: "/", args: []string{"-pidfile", "/tmp/dev/x"}}, true},
		{process{exe: "qemu-system-x86_64", cwd: "/", args: []string{"-drive", "file=/tmp/dev/x,format=raw"}}, true},
		{process{exe: "qemu-system-x86_64", cwd: "/tmp/dev2"}, false},
		{process{exe: "qemu-system-x86_64", cwd: "/", args: []string{"/tmp/dev2/x"}}, false},
		{process{exe: "blixard", args: []string{"blixard", "server", "--data-dir", "/tmp/dev/nodes/node1"}}, true},
		{process{exe: "blixard", args: []string{"blixard", "server", "--data-dir", "/tmp/other"}}, false},
		{process{exe: "blixard", args: []string{"blixard", "dev", "logs"}, cwd: "/tmp/dev"}, false},
		{process{exe: "bash", cwd: "/tmp/dev/nodes"}, false},
		{process{exe: "tail", args: []string{"tail", "-f", "/tmp/dev/logs/node1.log"}}, false},
		{process{exe: "qemu-system-x86_64", cwd: "/tmp/dev", state: 'Z'}, false},
	} {
		if got := c.p.ours(dir, exe); got != c.want {
			t.Errorf("%s in %s %v: %v, want %v", c.p.exe, c.p.cwd, c.p.args, got, c.want)
		}
	}
}

// TestEndAll ends a real process that looks like a hypervisor of the directory,
// and leaves others alone.
func TestEndAll(t *testing.T) {
	dir := t.TempDir()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatalf("sleep is missing: apt-get install coreutils (%v)", err)
	}
	data, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	fake := filepath.Join(t.TempDir(), "qemu-system-fake")
	if err := os.WriteFile(fake, data, 0o700); err != nil {
		t.Fatal(err)
	}
	start := func(path string) *exec.Cmd {
		cmd := exec.Command(path, "60")
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	vm, other := start(fake), start(sleep)
	// The exec of a child may not be done when Start returns on some kernels.
	for deadline := time.Now().Add(5 * time.Second); ; {
		if p, err := readProcess(vm.Process.Pid); err == nil && strings.HasPrefix(p.exe, "qemu-system-") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the process does not show")
		}
	}
	if err := endAll(dir, "blixard", 0); err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err == nil {
		t.Error("the hypervisor ended by itself")
	}
	p, err := readProcess(other.Process.Pid)
	if err != nil || p.state == 'Z' {
		t.Errorf("another process was ended (%v)", err)
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := other.Wait(); err == nil {
		t.Error("it was not killed")
	}
}

func TestReadableLog(t *testing.T) {
	line := readableLog(`{"timestamp":"2024-12-09T15:30:00.5Z","level":"INFO","component":"consensus","event":"x","node_id":"node1","msg":"leader changed","raft_term":15,"leader":"node 2"}`)
	if !strings.Contains(line, `INFO  consensus  leader changed leader="node 2" raft_term=15`) {
		t.Fatal(line)
	}
	if got := readableLog("panic: \x1b[2J"); got != "panic: ?[2J" {
		t.Fatal(got)
	}
}
