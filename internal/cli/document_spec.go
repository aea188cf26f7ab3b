package cli

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/blixard/blixard"
)

// nixHint is what to use where a Nix configuration was given.
const nixHint = "use image: builtin, or an imported kernel+initrd or root filesystem (`blixard vm create --image PATH`), with memory, vcpus and command"

// refuseNix explains why a Nix configuration cannot be used.
func refuseNix(path string) *blixard.Error {
	return &blixard.Error{
		Code:    blixard.CodeRefused,
		Message: fmt.Sprintf("%s is a Nix configuration: nodes need the microvm.nix driver to run it, and this build has the qemu driver only", path),
		Hint:    nixHint,
	}
}

// specFields reads the spec of a VM.
func (r *reader) specFields(doc *vmDocument) map[string]field {
	s := &doc.spec
	return map[string]field{
		"type": r.text(&s.Type),
		"image": func(path string, n *yaml.Node) {
			r.text(&s.Image)(path, n)
			doc.image = n
			if s.Image != "builtin" && !strings.HasPrefix(s.Image, "sha256:") {
				r.fail(n, "import it with `blixard vm create --image PATH`, and give its sha256:… here", "%s must be builtin or sha256:…", path)
			}
		},
		"config": func(_ string, n *yaml.Node) {
			r.fail(n, nixHint, "%s", refuseConfig(n.Value))
		},
		"hypervisor":        r.text(&s.Hypervisor),
		"replicas":          r.integer(&s.Replicas),
		"vcpus":             r.positive(&s.VCPUs),
		"memory":            r.memory(&s.MemoryMiB),
		"disk":              r.memory(&s.DiskMiB),
		"command":           r.texts(&s.Command),
		"env":               r.labels(&s.Env, nil),
		"labels":            r.labels(&s.Labels, checkLabel),
		"publish":           r.ports(s),
		"network":           r.text(&s.Network),
		"constraints":       r.constraints(s),
		"preferences":       r.preferences(s),
		"affinity":          r.vmNames(&s.AffinityVMs),
		"antiAffinityGroup": r.text(&s.AntiAffinityGroup),
		"spreadAcross":      r.spread(s),
		"strategy":          r.text(&s.Strategy),
		"priority":          r.positive(&s.Priority),
		"singleton":         r.boolean(&s.Singleton),
		"onPartition":       r.text(&s.OnPartition),
		"restart":           r.restart(s),
		"healthCheck":       r.healthCheck(s),
		"dependsOn":         r.vmNames(&s.DependsOn),
		"stopGrace":         r.duration(&s.StopGraceMS),
		"desired": func(path string, n *yaml.Node) {
			r.text(&doc.desired)(path, n)
			if doc.desired != "running" && doc.desired != "stopped" {
				r.fail(n, "", "%s must be running or stopped", path)
			}
		},
	}
}

func refuseConfig(path string) string {
	if strings.EqualFold(filepath.Ext(path), ".nix") {
		return refuseNix(path).Message
	}
	return fmt.Sprintf("config %q cannot be used here: configurations are for the microvm.nix driver, and this build has the qemu driver only", path)
}

func (r *reader) ports(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		r.each(path, n, func(path string, n *yaml.Node) {
			if n.Kind == yaml.ScalarNode {
				p, err := parsePort(n.Value)
				if err != nil {
					r.failed(n, path, err)
					return
				}
				s.Publish = append(s.Publish, p)
				return
			}
			var p blixard.Port
			r.mapping(path, n, map[string]field{"hostPort": r.integer(&p.HostPort), "guestPort": r.integer(&p.GuestPort), "protocol": r.text(&p.Protocol)})
			s.Publish = append(s.Publish, p)
		})
	}
}

func (r *reader) constraints(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		r.each(path, n, func(path string, n *yaml.Node) {
			more, err := parseConstraints(n.Value)
			switch {
			case n.Kind != yaml.ScalarNode:
				r.fail(n, "", `%s must be a text such as "storage=nvme"`, path)
			case err != nil:
				r.failed(n, path, err)
			}
			s.Constraints = append(s.Constraints, more...)
		})
	}
}

func (r *reader) preferences(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		r.each(path, n, func(path string, n *yaml.Node) {
			text, weight := n.Value, 0
			if n.Kind != yaml.ScalarNode {
				r.mapping(path, n, map[string]field{"constraint": r.text(&text), "weight": r.positive(&weight)})
			}
			more, err := parsePreference(text)
			if err != nil {
				r.failed(n, path, err)
			}
			for i := range more {
				if weight > 0 {
					more[i].Weight = weight
				}
			}
			s.Preferences = append(s.Preferences, more...)
		})
	}
}

func (r *reader) vmNames(to *[]blixard.VMName) field {
	return func(path string, n *yaml.Node) {
		r.each(path, n, func(path string, n *yaml.Node) {
			var name string
			r.text(&name)(path, n)
			if err := blixard.CheckName(name); n.Kind == yaml.ScalarNode && err != nil {
				r.failed(n, path, err)
			}
			*to = append(*to, blixard.VMName(name))
		})
	}
}

// spread reads the label to spread over; availability zones are the node's zone.
func (r *reader) spread(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		r.text(&s.SpreadAcross)(path, n)
		if slices.Contains([]string{"zones", "availability-zone", "availability-zones"}, s.SpreadAcross) {
			s.SpreadAcross = "zone"
		}
	}
}

func (r *reader) restart(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		if n.Kind == yaml.ScalarNode {
			s.Restart.Mode = n.Value
			return
		}
		p := &s.Restart
		r.mapping(path, n, map[string]field{
			"mode": r.text(&p.Mode), "backoff": r.duration(&p.BackoffMS), "maxBackoff": r.duration(&p.MaxBackoffMS), "maxRestarts": r.integer(&p.MaxRestarts),
		})
	}
}

func (r *reader) healthCheck(s *blixard.VMSpec) field {
	return func(path string, n *yaml.Node) {
		if n.Kind == yaml.ScalarNode {
			h, err := parseHealth(n.Value)
			if err != nil {
				r.failed(n, path, err)
			}
			s.Health = h
			return
		}
		h := &blixard.HealthCheck{}
		r.mapping(path, n, map[string]field{
			"kind": r.text(&h.Kind), "port": r.integer(&h.Port), "path": r.text(&h.Path), "command": r.texts(&h.Command),
			"interval": r.duration(&h.IntervalMS), "timeout": r.duration(&h.TimeoutMS), "startPeriod": r.duration(&h.StartPeriodMS), "failureThreshold": r.positive(&h.FailureThreshold),
		})
		s.Health = h
	}
}

// platform reads a document of kind Platform: several VMs.
func (r *reader) platform(n, metadata, spec *yaml.Node) []vmDocument {
	platform := newDocument(r.file, n.Line)
	if metadata != nil {
		r.mapping("metadata", metadata, map[string]field{"name": r.vmName(&platform), "labels": r.labels(&platform.spec.Labels, checkLabel)})
	}
	if spec == nil {
		r.fail(n, "write spec: {vms: [...]}", "the platform has no spec")
		return nil
	}
	later := func(what string) field {
		return func(path string, n *yaml.Node) {
			r.fail(n, "leave the section out, and apply it when there is a release with it", "%s: this build has no %s yet; nothing of it can be applied", path, what)
		}
	}
	var out []vmDocument
	r.mapping("spec", spec, map[string]field{
		"vms": func(path string, n *yaml.Node) {
			if n.Kind != yaml.SequenceNode {
				r.fail(n, "", "%s must be a list of VMs", path)
				return
			}
			r.each(path, n, func(path string, n *yaml.Node) { out = append(out, r.platformVM(path, n, platform.spec.Labels)) })
		},
		"functions": later("serverless functions"), "storage": later("storage pools and volumes"), "networks": later("virtual networks"),
	})
	return out
}

// platformVM reads one VM of a platform.
func (r *reader) platformVM(path string, n *yaml.Node, labels []blixard.Label) vmDocument {
	doc := newDocument(r.file, n.Line)
	before := len(r.errors)
	fields := r.specFields(&doc)
	fields["name"] = r.vmName(&doc)
	fields["storage"] = func(path string, n *yaml.Node) {
		r.fail(n, "leave it out; disk: 10G gives each instance a disk of its own", "%s: this build has no storage classes and volumes yet", path)
	}
	fields["placement"] = r.placement(&doc.spec)
	r.mapping(path, n, fields)
	for _, l := range labels {
		if !slices.ContainsFunc(doc.spec.Labels, func(have blixard.Label) bool { return have.Key == l.Key }) {
			doc.spec.Labels = append(doc.spec.Labels, l)
		}
	}
	if doc.name == "" && len(r.errors) == before {
		r.fail(n, "", "%s has no name", path)
	}
	if len(r.errors) == before {
		r.complete(n, path, &doc)
	}
	return doc
}

// placement reads where a platform's VM runs.
func (r *reader) placement(s *blixard.VMSpec) field {
	equal := func(n *yaml.Node, path string, l blixard.Label) blixard.Constraint {
		c := blixard.Constraint{Key: l.Key, Op: "=", Value: l.Value}
		if err := c.Check(); err != nil {
			r.failed(n, path, err)
		}
		return c
	}
	return func(path string, n *yaml.Node) {
		r.mapping(path, n, map[string]field{
			"nodeSelector": func(path string, n *yaml.Node) {
				var wanted []blixard.Label
				r.labels(&wanted, nil)(path, n)
				for _, l := range wanted {
					s.Constraints = append(s.Constraints, equal(n, path, l))
				}
			},
			"spreadAcross": r.spread(s),
			"nodeAffinity": func(path string, n *yaml.Node) {
				r.mapping(path, n, map[string]field{
					"required": func(path string, n *yaml.Node) {
						var wanted []blixard.Label
						r.labels(&wanted, nil)(path, n)
						for _, l := range wanted {
							s.Constraints = append(s.Constraints, equal(n, path, l))
						}
					},
					"preferred": func(path string, n *yaml.Node) {
						var wanted []blixard.Label
						r.labels(&wanted, nil)(path, n)
						for _, l := range wanted {
							s.Preferences = append(s.Preferences, blixard.Preference{Constraint: equal(n, path, l)})
						}
					},
				})
			},
		})
	}
}
