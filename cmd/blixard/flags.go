package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/config"
)

// serverFlags are the flags of every command that works on this machine's own
// node: they win over the environment and the configuration file.
type serverFlags struct {
	path           string
	capacityMemory string
	set            []func(*config.Config) error
}

func (f *serverFlags) bind(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.path, "config", "", "configuration file (default "+config.DefaultPath+" if it exists)")
	str := func(name, usage string, to func(*config.Config) *string) {
		v := fl.String(name, "", usage)
		f.set = append(f.set, func(c *config.Config) error {
			if fl.Changed(name) {
				*to(c) = *v
			}
			return nil
		})
	}
	num := func(name, usage string, to func(*config.Config, int)) {
		v := fl.Int(name, 0, usage)
		f.set = append(f.set, func(c *config.Config) error {
			if fl.Changed(name) {
				if *v < 0 {
					return blixard.Invalid(name, "", "--%s is negative", name)
				}
				to(c, *v)
			}
			return nil
		})
	}
	duration := func(name, usage string, to func(*config.Config) *config.Duration) {
		v := fl.Duration(name, 0, usage)
		f.set = append(f.set, func(c *config.Config) error {
			if fl.Changed(name) {
				*to(c) = config.Duration(*v)
			}
			return nil
		})
	}
	str("data-dir", "directory of everything this node keeps", func(c *config.Config) *string { return &c.Cluster.DataDir })
	str("node-id", "name of this node (default: the host name)", func(c *config.Config) *string { return &c.Cluster.NodeID })
	str("cluster-name", "name of a new cluster", func(c *config.Config) *string { return &c.Cluster.Name })
	str("listen", "host:port to serve on", func(c *config.Config) *string { return &c.Cluster.Listen })
	str("advertise", "host:port where other nodes reach this one (default: --listen)", func(c *config.Config) *string { return &c.Cluster.Advertise })
	str("publish-address", "IP that published ports of instances are bound to (default: the host of --advertise)", func(c *config.Config) *string { return &c.Network.PublishAddress })
	str("zone", "availability zone of this node", func(c *config.Config) *string { return &c.Cluster.Zone })
	str("gateway-listen", "host:port for HTTP triggers and function URLs alone; --listen serves them, too", func(c *config.Config) *string { return &c.Functions.GatewayListen })
	str("log-level", "debug, info, warn or error", func(c *config.Config) *string { return &c.Cluster.LogLevel })
	str("log-format", "json or text", func(c *config.Config) *string { return &c.Cluster.LogFormat })
	str("log-file", "file to append the log to (default: stderr)", func(c *config.Config) *string { return &c.Cluster.LogFile })
	str("token", "join token", func(c *config.Config) *string { return &c.Cluster.Token })
	num("capacity-vcpus", "vCPUs offered to instances (default: what the machine has)", func(c *config.Config, n int) { c.MicroVM.CapacityVCPUs = n })
	num("max-voters", "most nodes that vote", func(c *config.Config, n int) { c.Consensus.MaxVoters = n })
	num("simulated", "pretend instances and offer the capacity of this many machines, for load tests", func(c *config.Config, n int) { c.MicroVM.SimulatedNodes = n })
	duration("election-timeout", "time without a leader before an election", func(c *config.Config) *config.Duration { return &c.Consensus.ElectionTimeout })
	duration("lease", "time a node may run exclusive instances without hearing from the leader", func(c *config.Config) *config.Duration { return &c.Liveness.Lease })

	join := fl.StringSlice("join", nil, "members of the cluster to join when this node belongs to none (host:port)")
	labels := fl.StringSlice("label", nil, "label of this node (key=value, repeatable)")
	roles := fl.StringSlice("roles", nil, "roles of this node (default: hypervisor)")
	noAuth := fl.Bool("insecure-no-auth", false, "let the Lambda API be used without signatures, on loopback only")
	witness := fl.Bool("witness", false, "vote, but run nothing")
	fl.StringVar(&f.capacityMemory, "capacity-memory", "", "memory offered to instances, such as 8G (default: what the machine has)")
	f.set = append(f.set, func(c *config.Config) error {
		if fl.Changed("join") {
			c.Cluster.Join = *join
		}
		if fl.Changed("roles") {
			c.Cluster.Roles = *roles
		}
		if fl.Changed("insecure-no-auth") {
			c.Functions.InsecureNoAuth = *noAuth
		}
		if fl.Changed("witness") {
			c.Cluster.Witness = *witness
		}
		for _, l := range *labels {
			k, v, ok := strings.Cut(l, "=")
			if !ok {
				return blixard.Invalid("label", "write --label key=value", "--label %q has no =", l)
			}
			if c.Cluster.Labels == nil {
				c.Cluster.Labels = map[string]string{}
			}
			c.Cluster.Labels[k] = v
		}
		if f.capacityMemory != "" {
			mib, err := blixard.ParseMemoryMiB(f.capacityMemory)
			if err != nil {
				return fmt.Errorf("--capacity-memory: %w", err)
			}
			c.MicroVM.CapacityMemoryMB = mib
		}
		return nil
	})
}

// load reads file, environment and flags, in that order.
func (f *serverFlags) load() (config.Config, error) {
	path, required := f.path, f.path != ""
	if !required {
		path = config.DefaultPath
	}
	c, err := config.Load(path, required, os.Environ())
	if err != nil {
		return c, err
	}
	for _, set := range f.set {
		if err := set(&c); err != nil {
			return c, err
		}
	}
	return c, c.Check()
}

func ms(d config.Duration) int64 { return time.Duration(d).Milliseconds() }
