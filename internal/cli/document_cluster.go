package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/blixard/blixard"
)

// maxDocumentNodes bounds the nodes of a described cluster.
const maxDocumentNodes = 10_000

// NodeDocument is a machine of a cluster that documents describe: one that
// need not exist.
type NodeDocument struct {
	Name         blixard.NodeName
	Zone         string
	Labels       []blixard.Label
	Roles        []string
	Witness      bool
	Availability blixard.Availability // empty: active
	Capacity     blixard.Resources
	Reserved     blixard.Resources
	MaxInstances int
	Hypervisors  []string
	Acceleration string
}

// VMDocument is a VM that a document describes, without defaults.
type VMDocument struct {
	Name    blixard.VMName
	Spec    blixard.VMSpec
	Stopped bool
}

// ClusterDocuments is a cluster that documents describe.
type ClusterDocuments struct {
	Nodes []NodeDocument
	VMs   []VMDocument
}

// ReadCluster reads documents of the kinds Node, VM, Platform and List from
// files, directories and "-" for stdin, as `blixard apply` reads those of VMs.
// Its errors name file and line of everything that is wrong.
func ReadCluster(stdin io.Reader, paths []string) (ClusterDocuments, error) {
	var out ClusterDocuments
	a := &app{env: Env{Stdin: stdin}}
	files, err := a.documentFiles(paths)
	if err != nil {
		return out, err
	}
	var vms []vmDocument
	var wrong documentErrors
	for _, path := range files {
		data, err := a.readFile(path)
		if err != nil {
			return out, err
		}
		docs, err := parseInto(&reader{file: shownName(path), nodes: &out.Nodes}, data)
		if de, ok := errors.AsType[documentErrors](err); ok {
			wrong = append(wrong, de...)
		} else if err != nil {
			return out, err
		}
		vms = append(vms, docs...)
	}
	if wrong = append(wrong, doubled(vms)...); len(wrong) > 0 {
		return out, wrong
	}
	seen := map[blixard.NodeName]bool{}
	for i := range out.Nodes {
		name := out.Nodes[i].Name
		if seen[name] {
			return out, blixard.Invalid("documents", "", "the node %s is described twice", name)
		}
		seen[name] = true
	}
	if len(out.Nodes)+len(vms) == 0 {
		return out, blixard.Invalid("documents", "`blixard help documents` shows how they look", "there is no document in %s", strings.Join(paths, ", "))
	}
	for i := range vms {
		out.VMs = append(out.VMs, VMDocument{Name: blixard.VMName(vms[i].name), Spec: vms[i].spec, Stopped: vms[i].desired == "stopped"})
	}
	return out, nil
}

// node reads a document of kind Node: one machine, or count alike.
func (r *reader) node(n, metadata, spec *yaml.Node) {
	if r.nodes == nil {
		r.fail(n, "machines become members with `blixard cluster join`; `blixard sim plan -f` takes described ones", "a document of kind Node cannot be applied")
		return
	}
	name, count := "", 1
	d := NodeDocument{}
	before := len(r.errors)
	if metadata == nil || spec == nil {
		r.fail(n, "write metadata: {name: …} and spec: {vcpus: …, memory: …}", "the node has no name or no spec")
		return
	}
	r.mapping("metadata", metadata, map[string]field{"name": r.nodeName(&name), "labels": r.labels(&d.Labels, checkLabel)})
	r.mapping("spec", spec, r.nodeFields(&d, &count))
	if len(r.errors) > before {
		return
	}
	switch {
	case name == "":
		r.fail(metadata, "write metadata: {name: …}", "the node has no metadata.name")
	case d.Capacity.MilliCPU == 0 || d.Capacity.MemoryMiB == 0:
		r.fail(spec, "write spec: {vcpus: 8, memory: 32G}", "the node %s has no vcpus or no memory", name)
	case !d.Reserved.Fits(d.Capacity):
		r.fail(spec, "", "the node %s reserves more than it has", name)
	case len(*r.nodes)+count > maxDocumentNodes:
		r.fail(spec, "", "there are more than %d nodes", maxDocumentNodes)
	default:
		r.addNodes(n, d, name, count)
	}
}

func (r *reader) addNodes(n *yaml.Node, d NodeDocument, name string, count int) {
	if d.Capacity.DiskMiB == 0 {
		d.Capacity.DiskMiB = 1 << 20 // a TiB: the disk is not what the question is about
	}
	for i := 1; i <= count; i++ {
		d.Name = blixard.NodeName(name)
		if count > 1 {
			d.Name = blixard.NodeName(fmt.Sprintf("%s-%d", name, i))
		}
		if err := blixard.CheckName(string(d.Name)); err != nil {
			r.failed(n, "metadata.name", err)
			return
		}
		*r.nodes = append(*r.nodes, d)
	}
}

func (r *reader) nodeName(to *string) field {
	return func(path string, n *yaml.Node) {
		r.text(to)(path, n)
		if err := blixard.CheckName(*to); n.Kind == yaml.ScalarNode && err != nil {
			r.failed(n, path, err)
		}
	}
}

func (r *reader) nodeFields(d *NodeDocument, count *int) map[string]field {
	return map[string]field{
		"count":  r.positive(count),
		"zone":   r.text(&d.Zone),
		"labels": r.labels(&d.Labels, checkLabel),
		"roles":  r.texts(&d.Roles), "witness": r.boolean(&d.Witness),
		"vcpus": r.cores(&d.Capacity.MilliCPU), "memory": r.memory(&d.Capacity.MemoryMiB), "disk": r.memory(&d.Capacity.DiskMiB),
		"reserved": func(path string, n *yaml.Node) {
			r.mapping(path, n, map[string]field{
				"vcpus": r.cores(&d.Reserved.MilliCPU), "memory": r.memory(&d.Reserved.MemoryMiB), "disk": r.memory(&d.Reserved.DiskMiB),
			})
		},
		"maxInstances": r.positive(&d.MaxInstances), "hypervisors": r.texts(&d.Hypervisors), "acceleration": r.text(&d.Acceleration),
		"availability": func(path string, n *yaml.Node) {
			word := ""
			r.text(&word)(path, n)
			if err := oneOf(path, word, []string{string(blixard.Active), string(blixard.Cordoned), string(blixard.Draining)}); err != nil {
				r.failed(n, path, err)
			}
			d.Availability = blixard.Availability(word)
		},
	}
}

// cores reads whole vCPUs into thousandths.
func (r *reader) cores(to *int64) field {
	return func(path string, n *yaml.Node) {
		whole := 0
		r.positive(&whole)(path, n)
		*to = int64(whole) * 1000
	}
}
