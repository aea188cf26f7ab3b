package config

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/blixard/blixard"
)

func load(t *testing.T, text string, environ ...string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path, true, environ)
	if err == nil {
		err = c.Check()
	}
	return c, err
}

// planned is a configuration with every section of the outline.
const planned = `
[cluster]
node_id = "node1"
data_dir = "/var/lib/blixard"
log_level = "info"

[discovery]
method = "tailscale"
port = 7946

[consensus]
election_timeout = "5s"
heartbeat_interval = "1s"
snapshot_threshold = 1000

[microvm]
default_hypervisor = "firecracker"
default_memory_mb = 512
default_vcpus = 1
max_vms_per_node = 100
nix_config_dir = "/etc/blixard/vm-configs"

[storage.ceph]
config_file = "/etc/ceph/ceph.conf"
default_pool = "ssd-pool"
replication_factor = 3
pg_num = 128
min_size = 2

[storage.pools.ssd-pool]
type = "replicated"
size = 3
min_size = 2
rule = "ssd_rule"

[storage.pools.hdd-pool]
type = "erasure"
k = 4
m = 2
rule = "hdd_rule"

[network]
vlan_range = "100-200"
bridge_name = "blixard0"
default_gateway = "10.0.0.1"
dhcp_pool = "10.0.1.0/24"

[monitoring]
metrics_enabled = true
metrics_port = 9090
ceph_dashboard = true
log_aggregation = true
grafana_enabled = true
`

func TestTheWholeOutlineLoads(t *testing.T) {
	c, err := load(t, planned)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Unused(), " "); !strings.Contains(got, "discovery.method") || !strings.Contains(got, "storage") {
		t.Errorf("what has no effect is not told: %s", got)
	}
}

func TestWhatCannotBeRightIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		environ []string
		want    string // in the error with its hint
	}{
		"unknown key":       {text: "[cluster]\nnod_id = \"a\"", want: "did you mean cluster.node_id?"},
		"unknown section":   {text: "[consesus]\nelection_timeout = \"1s\"", want: "did you mean [consensus]?"},
		"bare duration":     {text: "[liveness]\nlease = 5", want: "liveness.lease: 5 has no unit"},
		"no duration":       {text: "[liveness]\nlease = \"5 parsecs\"", want: "is not a duration"},
		"wrong type":        {text: "[microvm]\ndefault_vcpus = \"one\"", want: "microvm.default_vcpus: a whole number is needed"},
		"no TOML":           {text: "\x89PNG", want: "config.toml:1:"},
		"unknown method":    {text: "[discovery]\nmethod = \"telepathy\"", want: "telepathy"},
		"unknown variable":  {environ: []string{"BLIXARD_CLUSTER_NODE_IDD=a"}, want: "did you mean BLIXARD_CLUSTER_NODE_ID?"},
		"foreign zone":      {text: "[cluster]\nzone = \"ü\"", want: "the zone"},
		"foreign label":     {text: "[cluster.labels]\na = \"b,c\"", want: "cluster.labels"},
		"unknown driver":    {text: "[microvm]\ndefault_hypervisor = \"qemuu\"", want: "did you mean qemu?"},
		"variable's number": {environ: []string{"BLIXARD_MICROVM_DEFAULT_VCPUS=x"}, want: "is not a whole number"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, c.text, c.environ...)
			if err == nil || !strings.Contains(err.Error(), c.want) || blixard.CodeOf(err) != blixard.CodeInvalid {
				t.Errorf("got %v (%s), want %q", err, blixard.CodeOf(err), c.want)
			}
		})
	}
}

func TestEnvironmentWinsOverTheFile(t *testing.T) {
	c, err := load(t, "[cluster]\nnode_id = \"a\"", "BLIXARD_CLUSTER_NODE_ID=b", "BLIXARD_ADDR=127.0.0.1:1", "BLIXARD_CLUSTER_LABELS=storage=nvme,gpu=no")
	if err != nil {
		t.Fatal(err)
	}
	if c.Cluster.NodeID != "b" || c.Cluster.Labels["gpu"] != "no" {
		t.Errorf("got %+v", c.Cluster)
	}
}

func TestAMissingFileIsAnErrorOnlyWhenNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.toml")
	if _, err := Load(path, false, nil); err != nil {
		t.Error(err)
	}
	if _, err := Load(path, true, nil); blixard.CodeOf(err) != blixard.CodeInvalid {
		t.Errorf("got %v", err)
	}
}

// TestOnlyFilesAreRead: what never ends, never begins or is no configuration by
// its size is refused at once.
func TestOnlyFilesAreRead(t *testing.T) {
	dir := t.TempDir()
	large, pipe := filepath.Join(dir, "large.toml"), filepath.Join(dir, "pipe")
	if err := os.WriteFile(large, bytes.Repeat([]byte("#\n"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/dev/zero": "no regular file", pipe: "no regular file", dir: "no regular file", large: "larger than 1 MiB"} {
		_, err := Load(path, true, nil)
		if blixard.CodeOf(err) != blixard.CodeInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", path, err, want)
		}
	}
}
