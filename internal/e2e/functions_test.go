package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestFunctions deploys functions as a user does, on a cluster of real processes,
// and calls them in real guests. Parts that disturb others run after those that
// do not.
func TestFunctions(t *testing.T) {
	if testing.Short() {
		t.Skip("boots real guests for some minutes")
	}
	w := functionWorld(t, 3)
	together := func(name string, parts map[string]func(*deployer)) {
		t.Run(name, func(t *testing.T) {
			for name, part := range parts {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					part(w.deployer(t))
				})
			}
		})
	}
	together("ways in", map[string]func(*deployer){
		"example nix-hello": testExampleNixHello, "example image-processor": testExampleImageProcessor, "example bootstrap-go": testExampleBootstrapGo,
		"example bootstrap-shell": testExampleBootstrapShell, "example extension": testExampleExtension, "example streaming": testExampleStreaming,
		"example http-server": testExampleHTTPServer, "example http-busybox": testExampleHTTPBusybox, "example wasm-hello": testExampleWASM,
		"refused code": testRefusedCode, "unknown": testUnknown, "local": testFunctionTest,
	})
	together("behaviour", map[string]func(*deployer){
		"hostile": testHostile, "versions": testVersions, "http": testFunctionHTTP, "sdk": testSDK, "does not start": testDoesNotStart,
	})
	for _, part := range []struct {
		name string
		run  func(*deployer)
	}{
		{"clones", testClones}, {"limit", testLimit}, {"scale to zero", testScaleToZero},
		{"hypervisor killed", testHypervisorKilled}, {"accepting node killed", testAcceptingNodeKilled},
		{"node killed", testNodeKilled}, {"leader killed at the limit", testLimitLeaderKilled},
	} {
		t.Run(part.name, func(t *testing.T) { part.run(w.deployer(t)) })
	}
	t.Run("nothing left", func(t *testing.T) { w.deployer(t).nothingOfFunctions() })
}

// ground is a cluster, and programs to deploy to it.
type ground struct {
	c        *Cluster
	programs string
	made     sync.Map // what is built by its name: func() error
}

func functionWorld(t *testing.T, nodes int) *ground {
	t.Helper()
	c := Start(t, nodes)
	return &ground{c: c, programs: t.TempDir()}
}

func (w *ground) deployer(t *testing.T) *deployer { //nolint:thelper // it is no helper, it is what tests use
	return &deployer{user: &user{T: t, c: w.c}, w: w}
}

// deployer is a user of functions, in one test.
type deployer struct {
	*user
	w *ground
}

// program builds Go code once; env are what `go build` gets besides.
func (d *deployer) program(name, dir string, env ...string) string {
	d.Helper()
	path := filepath.Join(d.w.programs, filepath.Base(dir), name)
	build, _ := d.w.made.LoadOrStore(path, sync.OnceValue(func() error {
		cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", path, ".")
		cmd.Dir = dir
		cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", dir, err, out)
		}
		return nil
	}))
	if f, ok := build.(func() error); ok {
		if err := f(); err != nil {
			d.Fatal(err)
		}
	}
	return path
}

// probe is the function that does what it is told.
func (d *deployer) probe() string { return d.program("bootstrap", "testdata/probe") }

const examples = "../../examples/functions"

// deploy deploys code and deletes the function in the end.
func (d *deployer) deploy(name, code string, args ...string) {
	d.Helper()
	d.laterFunction(name)
	d.ok(slices.Concat([]string{"function", "create", name, "--config", code, "--timeout", "20s"}, args)...)
}

func (d *deployer) laterFunction(name string) {
	d.Cleanup(func() {
		if _, words, code := d.c.CLI("function", "delete", name); code != 0 && code != 3 {
			d.Errorf("deleting %s in the end: %s", name, words)
		}
	})
}

// called is a call that was answered.
type called struct {
	Payload json.RawMessage
	Report  struct {
		RequestID, Node, Start, ErrorType string
		Version                           string
		Parts                             struct{ TotalMs, HandlerMs float64 }
	}
}

func (c called) cold() bool { return c.Report.Start != "warm" }

// invoke calls a function that has to answer.
func (d *deployer) invoke(name, payload string) called {
	d.Helper()
	return decode[called](d.T, d.ok("function", "invoke", name, "--data", payload, "-o", "json"))
}

// answers calls a function that has to answer so.
func (d *deployer) answers(name, payload, want string) called {
	d.Helper()
	got := d.invoke(name, payload)
	if string(got.Payload) != want {
		d.Errorf("%s with %.100s: %.300s, want %.300s", name, payload, got.Payload, want)
	}
	return got
}

// coldAndWarm calls a function that was not called yet until an instance that is
// there answers. An instance is not there at once after its call: scripts need a
// while until they ask for the next one.
func (d *deployer) coldAndWarm(name, payload, want string) {
	d.Helper()
	for i, warm := 0, false; !warm; i++ {
		out, words, code := d.c.CLI("function", "invoke", name, "--data", payload)
		if code != 0 || !strings.Contains(out, want) {
			d.Fatalf("call %d: %q is not in its answer: exit code %d\n%s%s", i, want, code, out, words)
		}
		warm = strings.HasPrefix(words, "warm on node")
		if i == 0 && !strings.HasPrefix(words, "cold on node") || i == 10 && !warm {
			d.Fatalf("call %d: %s", i, words)
		}
	}
}

// functionStatus is what `function describe -o json` tells.
type functionStatus struct {
	Latest struct {
		State, StateReason, StateCode string
		PreviousAnswers               bool
	}
	Nodes []struct {
		Node                                   string
		Instances, Warm, Busy, Starting, Slots int
		Template                               string
	}
	SilentNodes []string
}

func (d *deployer) function(name string) functionStatus {
	d.Helper()
	return decode[functionStatus](d.T, d.ok("function", "describe", name, "-o", "json"))
}

// settled waits until nothing of a function is busy or starting.
func (d *deployer) settled(name string) {
	d.Helper()
	d.until("no slot of "+name+" is stuck", 60*time.Second, func() error {
		for _, n := range d.function(name).Nodes {
			if n.Busy > 0 || n.Starting > 0 {
				return fmt.Errorf("%+v", n)
			}
		}
		return nil
	})
}

// atZero waits until nothing of a function is left on any node.
func (d *deployer) atZero(name string, within time.Duration) {
	d.Helper()
	d.until("nothing runs of "+name, within, func() error {
		for _, n := range d.function(name).Nodes {
			if n.Instances > 0 || n.Slots > 0 || n.Starting > 0 {
				return fmt.Errorf("%+v", n)
			}
		}
		return nil
	})
}

// instances are the hypervisors of functions' instances and pools.
func (d *deployer) instances() []Process {
	return slices.DeleteFunc(d.c.hypervisors(), func(p Process) bool {
		return !slices.ContainsFunc(p.Args, func(a string) bool { return strings.HasPrefix(a, "guest=fn-") })
	})
}

// nothingOfFunctions: no hypervisor and no directory of an instance. Templates are
// kept for a while, as an update may want them again.
func (d *deployer) nothingOfFunctions() {
	d.Helper()
	if out := d.ok("function", "list", "-o", "name"); strings.TrimSpace(out) != "" {
		d.Errorf("functions are left: %s", out)
	}
	d.until("nothing is left of functions", 60*time.Second, func() error {
		if left := d.instances(); len(left) > 0 {
			return fmt.Errorf("%d hypervisors: %v", len(left), left[0].Args)
		}
		for _, n := range d.c.Nodes {
			for _, dir := range []string{"functions/vms/vms", "functions/vms/trash"} {
				left, err := os.ReadDir(filepath.Join(n.Dir, dir))
				if err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
					return fmt.Errorf("%s of %s: %v, %v", dir, n.Name, left, err) //nolint:errorlint // nil, as a rule
				}
			}
		}
		return nil
	})
}

// trigger gives a function a path over HTTP, and waits until all nodes know it.
func (d *deployer) trigger(name, path string, args ...string) {
	d.Helper()
	out := d.ok(slices.Concat([]string{"function", "trigger", name, "--http", "--path", path}, args)...)
	id := strings.TrimPrefix(strings.Fields(out)[0], "trigger/")
	d.until("all nodes know "+id, 10*time.Second, func() error {
		for _, n := range d.c.Nodes {
			cmd := d.command("function", "trigger", name) // a read of the newest: what the node answers, it knows
			cmd.Env = append(cmd.Env, "BLIXARD_ADDR="+n.Address)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), id) {
				return fmt.Errorf("%s: %s%v", n.Name, out, err) //nolint:errorlint // nil, as a rule
			}
		}
		return nil
	})
}

// answer is an HTTP answer.
type answer struct {
	status int
	header http.Header
	body   string
}

// problem is the reason in an answer of Blixard's own.
func (a answer) problem() string {
	var p struct{ Reason string }
	if json.Unmarshal([]byte(a.body), &p) != nil {
		return ""
	}
	return p.Reason
}

// calls has many connections, as many callers have.
var calls = &http.Client{Timeout: 2 * time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// post sends a request to a node's port.
func post(ctx context.Context, n *Node, method, path, host, body string, headers ...string) (answer, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+n.Address+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	request.Host = host
	for i := 0; i+1 < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	got, err := calls.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer got.Body.Close()
	b, err := io.ReadAll(got.Body)
	return answer{got.StatusCode, got.Header, string(b)}, err
}

// http sends a request that has to be answered with a status.
func (d *deployer) http(n *Node, status int, method, path, host, body string, headers ...string) answer {
	d.Helper()
	got, err := post(d.Context(), n, method, path, host, body, headers...)
	if err != nil {
		d.Fatalf("%s %s: %v", method, path, err)
	}
	if got.status != status {
		d.Fatalf("%s %s: %d, want %d: %.300s", method, path, got.status, status, got.body)
	}
	return got
}

// ledger is a server on the host that calls of the probe report to. It counts
// those that are under way, by their connections, and lets them end.
type ledger struct {
	port int

	mu        sync.Mutex
	now, most int
	seen      map[string]int // by text
	gate      chan struct{}  // closed: calls end at once
}

func (d *deployer) ledger() *ledger {
	d.Helper()
	l := &ledger{seen: make(map[string]int), gate: make(chan struct{})}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		d.Fatal(err)
	}
	l.port = listener.Addr().(*net.TCPAddr).Port
	server := &http.Server{Handler: l, ReadHeaderTimeout: time.Minute}
	server.SetKeepAlivesEnabled(false)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	d.Cleanup(func() {
		if err := server.Close(); err != nil {
			d.Error(err)
		}
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			d.Error(err)
		}
	})
	return l
}

// ServeHTTP holds a call until the gate opens or its guest is gone.
func (l *ledger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	l.now++
	l.most = max(l.most, l.now)
	l.seen[r.URL.RawQuery]++
	gate := l.gate
	l.mu.Unlock()
	select {
	case <-gate:
	case <-r.Context().Done():
	}
	// Counted out before the guest can know: the count is never too high.
	l.mu.Lock()
	l.now--
	l.mu.Unlock()
	if _, err := io.WriteString(w, "held"); err != nil {
		return // the guest is gone
	}
}

// open lets calls end, those that are under way and those that come.
func (l *ledger) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.gate:
	default:
		close(l.gate)
	}
}

// shut has calls that come wait again.
func (l *ledger) shut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gate = make(chan struct{})
}

func (l *ledger) count() (now, most int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.most
}

func (l *ledger) times(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen[text]
}

// order is an event of the probe that the ledger holds.
func (l *ledger) order(text string) string {
	return fmt.Sprintf(`{"op":"tell","port":%d,"text":%q}`, l.port, text)
}

// inOrder waits until the ledger holds n calls.
func (d *deployer) inOrder(l *ledger, n int, within time.Duration) {
	d.Helper()
	d.until(fmt.Sprintf("%d calls are under way", n), within, func() error {
		if now, _ := l.count(); now != n {
			return fmt.Errorf("%d are", now)
		}
		return nil
	})
}

// until polls, and shows the nodes' words when it gives up.
func (d *deployer) until(what string, within time.Duration, f func() error) {
	d.Helper()
	c := &Cluster{t: d.T, dir: d.c.dir, Nodes: d.c.Nodes}
	c.Eventually(what, within, f)
}

// start runs a command in the background; wait gives what it printed.
func (d *deployer) start(args ...string) (wait func() (stdout, stderr string, code int)) {
	d.Helper()
	var out, words bytes.Buffer
	cmd := d.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &words
	if err := cmd.Start(); err != nil {
		d.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return func() (string, string, int) {
		d.Helper()
		select {
		case err := <-ended:
			if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
				d.Fatal(err)
			}
		case <-time.After(2 * time.Minute):
			if err := cmd.Process.Kill(); err != nil {
				d.Error(err)
			}
			d.Fatalf("blixard %s does not end", strings.Join(args, " "))
		}
		return out.String(), words.String(), cmd.ProcessState.ExitCode()
	}
}
