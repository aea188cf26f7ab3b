package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The outline's Scenario 0: each command, and what it prints.
func testExampleImageProcessor(d *deployer) {
	d.laterFunction("image-processor")
	d.says("function/image-processor created, ready to be called after", "function", "create", "image-processor", "--config", examples+"/image-processor/image-processor.nix",
		"--memory", "128M", "--timeout", "30s", "--concurrent-executions", "100")
	d.says("image-processor (0 instances running, 0 warm)", "function", "list")
	d.coldAndWarm("image-processor", `{"imagePath": "/data/input.jpg"}`, "/data/input.processed.jpg")
	d.says("image-processor (1 instance warm on node", "function", "list")
	d.trigger("image-processor", "/api/process-image")
	got := d.http(d.c.Nodes[1], 200, "POST", "/api/process-image", "", `{"imagePath": "/data/input.jpg"}`, "Content-Type", "application/json")
	if !strings.Contains(got.body, `"/data/input.processed.jpg"`) {
		d.Errorf("%v %s", got.header, got.body)
	}
	// What the handler misses is its error, and says so.
	got = d.http(d.c.Nodes[1], 502, "POST", "/api/process-image", "", `{}`, "Content-Type", "application/json")
	if got.problem() != "FunctionError" || got.header.Get("X-Amzn-Requestid") == "" {
		d.Errorf("%v %s", got.header, got.body)
	}
	d.untilLogged("image-processor", "Nix.MissingAttribute")
	d.says("Invocations: ", "function", "metrics", "image-processor")
	d.says("REPORT RequestId", "function", "logs", "image-processor")
	d.says("CONCURRENT", "function", "list", "-o", "wide")
}

func testExampleNixHello(d *deployer) {
	d.deploy("hello", examples+"/nix-hello/hello.nix")
	d.coldAndWarm("hello", `{"type": "order"}`, "Hello from NixOS serverless! Event: order")
	out, words, code := d.c.CLI("function", "invoke", "hello", "--data", "{}")
	if code != 11 || !strings.Contains(out, "Nix.MissingAttribute") {
		d.Errorf("without the attribute: exit code %d\n%s%s", code, out, words)
	}
}

func testExampleBootstrapGo(d *deployer) {
	d.deploy("hello-go", d.program("bootstrap", examples+"/bootstrap-go"))
	d.coldAndWarm("hello-go", `{"name": "you"}`, "Hello, you")
	out, words, code := d.c.CLI("function", "invoke", "hello-go")
	if code != 11 || !strings.Contains(out, "whom to greet?") {
		d.Errorf("without a name: exit code %d\n%s%s", code, out, words)
	}
}

func testExampleBootstrapShell(d *deployer) {
	d.deploy("hello-sh", examples+"/bootstrap-shell/bootstrap")
	d.coldAndWarm("hello-sh", `{"a": 1}`, `"event": {"a": 1}`)
	if _, words, code := d.c.CLI("function", "invoke", "hello-sh", "--data", `{"a": 1}`, "--log"); code != 0 || !strings.Contains(words, "answering") {
		d.Errorf("--log: exit code %d: %s", code, words)
	}
}

func testExampleExtension(d *deployer) {
	d.deploy("audited", examples+"/extension")
	d.coldAndWarm("audited", `{"a": 1}`, `"event": {"a": 1}`)
	d.untilLogged("audited", `audit: {`)
}

func testExampleStreaming(d *deployer) {
	d.deploy("parts", d.program("bootstrap", examples+"/streaming"))
	url := d.ok("function", "url", "parts", "--stream")
	got := d.http(d.c.Nodes[2], 200, "POST", "/", host(d, url), `{"parts": 5}`)
	if strings.Count(strings.TrimSpace(got.body), "\n") != 4 {
		d.Errorf("five parts: %q", got.body)
	}
}

func testExampleHTTPServer(d *deployer) {
	d.deploy("web", d.program("server", examples+"/http-server"), "--runtime", "http", "--target-concurrency", "10")
	d.trigger("web", "/count")
	for _, n := range d.c.Nodes {
		got := d.http(n, 200, "GET", "/count", "", "")
		if strings.Count(strings.TrimSpace(got.body), "\n") < 2 {
			d.Errorf("counting on %s: %q", n.Name, got.body)
		}
	}
}

func testExampleHTTPBusybox(d *deployer) {
	d.laterFunction("site")
	d.ok("function", "create", "site", "--runtime", "http", "--config", examples+"/http-busybox", "--", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/var/task")
	d.trigger("site", "/{proxy+}", "--host", "site.example")
	if got := d.http(d.c.Nodes[0], 200, "GET", "/cgi-bin/echo?a=b", "site.example", ""); strings.TrimSpace(got.body) != "a=b" {
		d.Errorf("echo: %q", got.body)
	}
	if got := d.http(d.c.Nodes[1], 200, "GET", "/cgi-bin/time", "site.example", ""); !strings.Contains(got.body, "UTC") {
		d.Errorf("time: %q", got.body)
	}
	d.http(d.c.Nodes[1], 404, "GET", "/nothing", "site.example", "") // the function's own answer
}

func testExampleWASM(d *deployer) {
	d.deploy("hello-wasm", d.program("hello.wasm", examples+"/wasm-hello", "GOOS=wasip1", "GOARCH=wasm"), "--memory", "192M")
	d.coldAndWarm("hello-wasm", `{"name": "you"}`, "you")
}

// `function test` needs no cluster and leaves nothing behind.
func testFunctionTest(d *deployer) {
	dir := d.TempDir()
	cmd := exec.Command(filepath.Join(bin, "blixard"), "function", "test", examples+"/nix-hello/hello.nix", "--data", `{"type": "order"}`)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir, "BLIXARD_ADDR=127.0.0.1:1"}
	var said words
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "Event: order") {
		d.Errorf("%s: %v\n%s", out, err, said.String())
	}
	if left := processes(dir); len(left) > 0 {
		d.Errorf("processes are left: %v", left)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		d.Error(err)
	}
	for _, e := range left {
		// What every call needs again may be kept where caches are.
		if e.Name() != ".cache" {
			d.Errorf("%s is left", e.Name())
		}
	}
}

// untilLogged waits for a text in a function's log.
func (d *deployer) untilLogged(name, text string) {
	d.Helper()
	d.until(text+" is logged", 20*time.Second, func() error {
		if out := d.ok("function", "logs", name); !strings.Contains(out, text) {
			return errText(out)
		}
		return nil
	})
}

type errText string

func (e errText) Error() string { return string(e) }

// host is the host name in what `function url` prints.
func host(t testing.TB, printed string) string {
	t.Helper()
	_, rest, found := strings.Cut(printed, "http://")
	name, _, slash := strings.Cut(rest, "/")
	if !found || !slash {
		t.Fatalf("there is no URL in %q", printed)
	}
	return name
}
