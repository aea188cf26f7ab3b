package e2e

import (
	"archive/zip"
	"bytes"
	"debug/elf"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// zipped writes a zip with the given entries and returns its path.
func (d *deployer) zipped(name string, entries ...zipEntry) string {
	d.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, e := range entries {
		h := &zip.FileHeader{Name: e.name, Method: zip.Deflate}
		h.SetMode(e.mode)
		f, err := w.CreateHeader(h)
		if err == nil {
			_, err = f.Write(e.content)
		}
		if err != nil {
			d.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		d.Fatal(err)
	}
	return d.file(name, b.Bytes(), 0o600)
}

type zipEntry struct {
	name    string
	content []byte
	mode    fs.FileMode
}

func (d *deployer) file(name string, content []byte, mode fs.FileMode) string {
	d.Helper()
	path := filepath.Join(d.TempDir(), name)
	if err := os.WriteFile(path, content, mode); err != nil {
		d.Fatal(err)
	}
	return path
}

// Code that cannot be is refused when it comes, with the reason, and leaves
// nothing.
func testRefusedCode(d *deployer) {
	script := zipEntry{"bootstrap", []byte("#!/bin/sh\nexit 1\n"), 0o755}
	other, err := os.ReadFile(d.probe())
	if err != nil {
		d.Fatal(err)
	}
	other[18] = byte(elf.EM_AARCH64) // e_machine
	for _, c := range []struct{ what, path, words string }{
		{"up", d.zipped("up.zip", script, zipEntry{"../evil", []byte("x"), 0o644}), "leads out of it"},
		{"absolute", d.zipped("absolute.zip", script, zipEntry{"/etc/evil", []byte("x"), 0o644}), "absolute name"},
		{"link", d.zipped("link.zip", script, zipEntry{"link", []byte("../../etc/passwd"), 0o777 | fs.ModeSymlink}), "leads out of the zip"},
		{"twice", d.zipped("twice.zip", script, script), "twice"},
		{"bomb", d.zipped("bomb.zip", script, zipEntry{"zeroes", make([]byte, 64<<20), 0o644}), "bombs"},
		{"none", d.zipped("none.zip"), "holds no file"},
		{"damaged", d.file("damaged.zip", []byte("PK\x03\x04 and then nonsense"), 0o600), "not a zip"},
		{"empty", d.zipped("empty.zip", zipEntry{"bootstrap", nil, 0o755}), "empty"},
		{"elsewhere", d.zipped("elsewhere.zip", zipEntry{"src/bootstrap", []byte("#!/bin/sh\n"), 0o755}), `no file "bootstrap"`},
		{"architecture", d.file("bootstrap", other, 0o755), "arm64"},
	} {
		d.laterFunction("refused")
		d.fails(2, []string{c.words}, "function", "create", "refused", "--runtime", "bootstrap", "--config", c.path)
		d.fails(3, nil, "function", "describe", "refused")
	}
	big := d.file("event.json", bytes.Repeat([]byte(" "), 7<<20), 0o600)
	d.deploy("small", d.probe())
	d.fails(2, []string{"at most 6291456"}, "function", "invoke", "small", "--data", "@"+big)
	d.fails(2, []string{"at most 1048576"}, "function", "invoke", "small", "--async", "--data", "@"+d.file("2.json", []byte(`"`+strings.Repeat("a", 2<<20)+`"`), 0o600))
}

func testUnknown(d *deployer) {
	d.fails(3, []string{"no function", "nosuch"}, "function", "invoke", "nosuch")
	d.fails(3, []string{"nosuch"}, "function", "describe", "nosuch")
	d.fails(3, []string{"nosuch"}, "function", "logs", "nosuch")
	d.fails(3, []string{"nosuch"}, "function", "metrics", "nosuch")
	d.fails(3, []string{"nosuch"}, "function", "delete", "nosuch")
	d.fails(2, nil, "function", "invoke", "no such")
	d.deploy("known", d.probe())
	d.fails(3, []string{"no version 7"}, "function", "invoke", "known:7")
	d.fails(3, []string{"no alias", "live"}, "function", "invoke", "known:live")
	d.fails(3, nil, "function", "alias", "known", "live", "7")
	d.fails(4, nil, "function", "create", "known", "--config", d.probe())
	d.http(d.c.Nodes[0], 404, "GET", "/function/nosuch", "", "", "Authorization", "Bearer "+d.c.Token)
	d.http(d.c.Nodes[0], 401, "GET", "/function/known", "", "")
	d.http(d.c.Nodes[0], 404, "GET", "/nowhere", "", "")
	d.answers("known", `{}`, `"hello"`)
}

// A function that cannot start says so, and answers nothing; mended, it does.
func testDoesNotStart(d *deployer) {
	d.laterFunction("late")
	d.fails(6, []string{"Runtime.ExitError", "leaving at the start"}, "function", "create", "late", "--config", d.probe(), "--env", "AT_START=exit")
	d.fails(5, []string{"Failed", "leaving at the start"}, "function", "invoke", "late")
	d.ok("function", "update", "late", "--env", "AT_START=stay")
	d.answers("late", `{}`, `"hello"`)
	// Broken again, what ran before goes on answering.
	d.fails(6, []string{"the former code goes on answering"}, "function", "update", "late", "--env", "AT_START=exit")
	d.answers("late", `{}`, `"hello"`)
	if f := d.function("late"); f.Latest.State != "Failed" || !f.Latest.PreviousAnswers {
		d.Errorf("%+v", f.Latest)
	}
}

// Whatever the code does: a documented answer, and the next call works.
func testHostile(d *deployer) {
	const timeout = 5 * time.Second
	d.laterFunction("hostile")
	d.ok("function", "create", "hostile", "--config", d.probe(), "--timeout", timeout.String(), "--max-concurrent", "2")
	d.answers("hostile", `{}`, `"hello"`)
	const timedOut, noMemory = "Sandbox.Timedout", "Runtime.OutOfMemory"
	for _, c := range []struct {
		what, order string
		kinds       []string // what it may be told to have failed of; "": it has not
	}{
		{"exits", `{"op":"exit"}`, []string{"Runtime.ExitError"}},
		{"hangs", `{"op":"hang"}`, []string{timedOut}},
		{"burns", `{"op":"spin"}`, []string{timedOut}},
		{"forks", `{"op":"fork"}`, []string{timedOut, noMemory}},
		{"fills the disk", `{"op":"fill"}`, []string{"", noMemory}},
		{"eats the memory", `{"op":"memory"}`, []string{noMemory, timedOut}}, // on a slow machine
		{"prints 1 GB", `{"op":"print","bytes":1000000000}`, []string{timedOut, ""}},
		{"answers 7 MB", `{"op":"answer","bytes":7000000}`, []string{"Function.ResponseSizeTooLarge", timedOut}},
		{"answers no JSON", `{"op":"raw","text":"{no json"}`, []string{""}},
		{"answers nothing", `{"op":"raw"}`, []string{""}},
		{"is told no JSON", `{no json`, []string{""}},
	} {
		began := time.Now()
		out, words, code := d.c.CLI("function", "invoke", "hostile", "--data", c.order)
		took := time.Since(began)
		if !slices.ContainsFunc(c.kinds, func(kind string) bool {
			return kind == "" && code == 0 || kind != "" && code == 11 && strings.Contains(out, kind)
		}) {
			d.Errorf("a handler that %s: exit code %d\n%.500s\n%.2000s", c.what, code, out, words)
		}
		if took > timeout+8*time.Second {
			d.Errorf("a handler that %s: the answer took %s", c.what, took)
		}
		if out, words, code := d.c.CLI("function", "invoke", "hostile"); code != 0 || strings.TrimSpace(out) != `"hello"` {
			d.Errorf("after a handler that %s: exit code %d\n%.500s\n%.2000s", c.what, code, out, words)
		}
	}
	for _, n := range d.c.Nodes { // what is kept of 1 GB of output
		var bytes int64
		err := filepath.WalkDir(n.Dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || !strings.HasSuffix(path, ".log") {
				return nil //nolint:nilerr // what has just gone
			}
			if i, err := e.Info(); err == nil {
				bytes += i.Size()
			}
			return nil
		})
		if err != nil || bytes > 64<<20 {
			d.Errorf("%s keeps %d bytes of logs (%v)", n.Name, bytes, err)
		}
	}
	d.settled("hostile")
	// Both executions that it may have are to be had; for longer than before.
	d.ok("function", "update", "hostile", "--timeout", "1m")
	l := d.ledger()
	one, two := d.start("function", "invoke", "hostile", "--data", l.order("1")), d.start("function", "invoke", "hostile", "--data", l.order("2"))
	d.inOrder(l, 2, 40*time.Second)
	d.fails(8, []string{"2"}, "function", "invoke", "hostile")
	l.open()
	for i, wait := range []func() (string, string, int){one, two} {
		if out, words, code := wait(); code != 0 {
			d.Errorf("call %d: exit code %d\n%s%s", i, code, out, words)
		}
	}
	d.answers("hostile", `{"op":"raw","text":"7"}`, "7")
}
