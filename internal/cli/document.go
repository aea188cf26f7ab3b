package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

const apiVersion = "blixard.dev/v1"

// Bounds of what is read.
const (
	maxDocumentBytes = 64 << 20
	maxDocumentVMs   = 10_000
)

func writeDocumentHelp(w io.Writer) {
	fmt.Fprint(w, `Documents are YAML, several to a file with --- between them. A field that is not
known is an error; either all of the documents are applied or none.

  apiVersion: blixard.dev/v1
  kind: VM
  metadata:
    name: webapp
    labels: {team: shop}
    version: 12               # as "blixard get -o yaml" prints it: a VM that was
                              # changed since is left alone; left out: any
  spec:
    image: builtin            # or sha256:… of an imported image
    replicas: 3
    vcpus: 1
    memory: 512M              # a bare number is MiB
    disk: 1G
    command: [httpd, -f, -p, "80"]
    env: {GREETING: hello}
    publish: ["8080:80"]      # [HOST:]GUEST[/udp]
    network: user             # or bridge
    hypervisor: qemu
    constraints: ["storage=nvme", "memory>=32GB"]
    preferences: [{constraint: gpu=available, weight: 80}]
    affinity: [cache]
    antiAffinityGroup: web
    spreadAcross: zone
    strategy: spread          # or binpack
    priority: 500
    singleton: false
    onPartition: continue     # or stop
    restart: {mode: always, backoff: 1s, maxBackoff: 1m, maxRestarts: 0}
    healthCheck: {kind: http, port: 80, path: /, interval: 5s, timeout: 2s,
                  startPeriod: 10s, failureThreshold: 3}   # or "http:80/"
    dependsOn: [database]
    stopGrace: 10s
    desired: running          # or stopped; left out: new VMs start

kind: Platform holds several VMs in spec.vms, each with name and the fields of a
VM's spec, and

    placement:
      nodeSelector: {storage: nvme}            # must hold
      spreadAcross: zone
      nodeAffinity:
        required: {gpu: "yes"}                 # must hold
        preferred: {rack: r1, disk: fast}      # better to hold; each label for itself

kind: Node describes a machine that need not exist, for blixard sim plan only:
spec {vcpus, memory, disk, reserved, zone, labels, roles, witness, hypervisors,
maxInstances, availability, acceleration, count}; count: 3 stands for three
alike, name-1 to name-3.
`)
}

// vmDocument is one VM of a file.
type vmDocument struct {
	file    string
	line    int // of the VM's name
	name    string
	spec    blixard.VMSpec
	desired string
	version uint64     // that it is to have; 0: any
	image   *yaml.Node // nil: not given
}

func (v *vmDocument) request() *blixardv1.VMDocument {
	return &blixardv1.VMDocument{Name: v.name, Spec: requestSpec(v.spec), Desired: v.desired, ExpectVersion: v.version}
}

// readDocuments reads files, directories and "-" for standard input. Errors are
// documentErrors, or about the files themselves.
func (a *app) readDocuments(paths []string) ([]vmDocument, error) {
	var all []vmDocument
	var wrong documentErrors
	files, err := a.documentFiles(paths)
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		data, err := a.readFile(path)
		if err != nil {
			return nil, err
		}
		docs, err := parseDocuments(shownName(path), data)
		if de, ok := errors.AsType[documentErrors](err); ok {
			wrong = append(wrong, de...)
		} else if err != nil {
			return nil, err
		}
		all = append(all, docs...)
	}
	wrong = append(wrong, doubled(all)...)
	if len(wrong) > 0 {
		return nil, wrong
	}
	if len(all) > maxDocumentVMs {
		return nil, blixard.Invalid("documents", "split them into several files", "there are %d VMs; at most %d can be applied at once", len(all), maxDocumentVMs)
	}
	if len(all) == 0 {
		return nil, blixard.Invalid("documents", "`blixard help documents` shows how they look", "there is no document in %s", strings.Join(paths, ", "))
	}
	return all, nil
}

func shownName(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// doubled finds VMs that are described twice.
func doubled(docs []vmDocument) documentErrors {
	var out documentErrors
	first := map[string]*vmDocument{}
	for i := range docs {
		d := &docs[i]
		if before := first[d.name]; before != nil {
			out = append(out, documentError{file: d.file, line: d.line, text: fmt.Sprintf("the VM %s is described twice, first in %s:%d", d.name, before.file, before.line)})
			continue
		}
		first[d.name] = d
	}
	return out
}

// documentFiles lists the files of a directory, in order; other paths stand for
// themselves.
func (a *app) documentFiles(paths []string) ([]string, error) {
	var out []string
	for _, path := range paths {
		info, err := os.Stat(path)
		if path == "-" || err == nil && !info.IsDir() {
			out = append(out, path)
			continue
		}
		if err != nil {
			return nil, fileError(path, err)
		}
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, fileError(path, err)
		}
		before := len(out)
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".yaml" || ext == ".yml" || ext == ".json") {
				out = append(out, filepath.Join(path, e.Name()))
			}
		}
		if len(out) == before {
			return nil, blixard.Invalid("--file", "", "the directory %s holds no .yaml, .yml or .json file", path)
		}
	}
	return out, nil
}

// fileError explains a file that cannot be read.
func fileError(path string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return blixard.Invalid("file", "", "there is no file %s", path)
	}
	return blixard.Invalid("file", "", "cannot read %s: %v", path, err)
}

// readFile reads a file, or standard input for "-", up to the bound.
func (a *app) readFile(path string) ([]byte, error) {
	in := a.env.Stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fileError(path, err)
		}
		defer f.Close()
		in = f
	}
	if in == nil {
		return nil, nil
	}
	data, err := io.ReadAll(io.LimitReader(in, maxDocumentBytes+1))
	if err != nil {
		return nil, fileError(shownName(path), err)
	}
	if len(data) > maxDocumentBytes {
		return nil, blixard.Invalid("file", "", "%s is larger than %d MiB", shownName(path), maxDocumentBytes>>20)
	}
	return data, nil
}

// parseDocuments reads the VMs of one file.
func parseDocuments(file string, data []byte) ([]vmDocument, error) {
	return parseInto(&reader{file: file}, data)
}

// parseInto reads documents with a reader of one's own.
func parseInto(r *reader, data []byte) ([]vmDocument, error) {
	var docs []vmDocument
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			r.errors = append(r.errors, syntaxError(r.file, err))
			break
		}
		if n.Kind == yaml.DocumentNode && len(n.Content) == 1 && !isNull(n.Content[0]) {
			docs = append(docs, r.document(resolve(n.Content[0]))...)
		}
	}
	if len(r.errors) > 0 {
		slices.SortStableFunc(r.errors, func(x, y documentError) int { return x.line - y.line })
		return nil, r.errors
	}
	return docs, nil
}

// syntaxError takes the line out of the YAML library's words.
func syntaxError(file string, err error) documentError {
	text, line := strings.TrimPrefix(err.Error(), "yaml: "), 1
	if n, scanErr := fmt.Sscanf(text, "line %d: ", &line); n == 1 && scanErr == nil {
		if _, rest, found := strings.Cut(text, ": "); found {
			text = rest
		}
	}
	return documentError{file: file, line: line, text: "this is not YAML: " + text}
}

// document reads one document.
func (r *reader) document(n *yaml.Node) []vmDocument {
	var version, kind string
	var metadata, spec, items *yaml.Node
	keep := func(to **yaml.Node) field { return func(_ string, n *yaml.Node) { *to = n } }
	r.mapping("", n, map[string]field{
		"apiVersion": r.text(&version), "kind": r.text(&kind), "metadata": keep(&metadata), "spec": keep(&spec), "items": keep(&items),
	})
	if n.Kind != yaml.MappingNode {
		return nil
	}
	if version != apiVersion {
		r.fail(n, "write apiVersion: "+apiVersion, "the apiVersion %q is not known", version)
		return nil
	}
	if items != nil && kind != "List" {
		r.fail(items, "", "items belongs to kind List only")
	}
	switch kind {
	case "VM":
		return r.vmOf(n, metadata, spec)
	case "Platform":
		return r.platform(n, metadata, spec)
	case "Node":
		r.node(n, metadata, spec)
		return nil
	case "List":
		var out []vmDocument
		if items != nil {
			r.each("items", items, func(path string, n *yaml.Node) {
				if r.lists {
					r.fail(n, "", "%s: a list cannot hold lists", path)
					return
				}
				r.lists = true
				out = append(out, r.document(n)...)
				r.lists = false
			})
		}
		return out
	}
	hint := "known: VM, Platform"
	if near := blixard.Nearest(kind, []string{"VM", "Platform"}); near != "" {
		hint = "did you mean " + near + "? " + hint
	}
	r.fail(n, hint, "the kind %q is not known", kind)
	return nil
}

// vmOf reads a document of kind VM.
func (r *reader) vmOf(n, metadata, spec *yaml.Node) []vmDocument {
	doc := newDocument(r.file, n.Line)
	if metadata == nil {
		r.fail(n, "write metadata: {name: …}", "the VM has no metadata.name")
		return nil
	}
	var labels []blixard.Label
	r.mapping("metadata", metadata, map[string]field{"name": r.vmName(&doc), "labels": r.labels(&labels, checkLabel), "version": r.version(&doc.version)})
	if doc.name == "" && !r.errorIn(metadata) {
		r.fail(metadata, "write metadata: {name: …}", "the VM has no metadata.name")
	}
	before := len(r.errors)
	if spec != nil {
		r.mapping("spec", spec, r.specFields(&doc))
	} else {
		spec = n
	}
	if len(labels) > 0 && len(doc.spec.Labels) > 0 {
		r.fail(spec, "move them to metadata.labels", "labels are given in metadata.labels and in spec.labels")
	}
	doc.spec.Labels = append(doc.spec.Labels, labels...)
	if len(r.errors) == before {
		r.complete(spec, "spec", &doc)
	}
	return []vmDocument{doc}
}

func newDocument(file string, line int) vmDocument {
	return vmDocument{file: file, line: line, spec: blixard.VMSpec{Replicas: 1}}
}

// errorIn tells whether something was found wrong within n.
func (r *reader) errorIn(n *yaml.Node) bool {
	return len(r.errors) > 0 && r.errors[len(r.errors)-1].line >= n.Line
}

func (r *reader) vmName(doc *vmDocument) field {
	return func(path string, n *yaml.Node) {
		r.text(&doc.name)(path, n)
		doc.line = n.Line
		if err := blixard.CheckName(doc.name); n.Kind == yaml.ScalarNode && err != nil {
			r.failed(n, path, err)
		}
	}
}

// complete checks a VM as a whole.
func (r *reader) complete(n *yaml.Node, path string, doc *vmDocument) {
	err := checkSpec(doc.name, doc.spec)
	if err == nil {
		return
	}
	var e *blixard.Error
	if asError(err, &e) && e.Field != "" && n.Kind == yaml.MappingNode {
		first, _, _ := strings.Cut(e.Field, ".")
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == first {
				r.failed(n.Content[i], join(path, e.Field), err)
				return
			}
		}
	}
	r.failed(n, path, err)
}
