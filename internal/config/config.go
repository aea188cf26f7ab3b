// Package config reads a server's configuration: /etc/blixard/config.toml, then
// the environment (BLIXARD_<SECTION>_<KEY>, such as BLIXARD_CLUSTER_NODE_ID),
// then flags, the later winning. An unknown key is an error that names the
// nearest known one; nothing is guessed.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/blixard/blixard"
)

// DefaultPath is where a server looks for its configuration.
const DefaultPath = "/etc/blixard/config.toml"

// Duration is a time.Duration written as "5s".
type Duration time.Duration

// UnmarshalText reads "5s", "300ms".
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 5s or 300ms", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Config is the whole configuration.
type Config struct {
	Cluster    Cluster    `toml:"cluster"`
	Discovery  Discovery  `toml:"discovery"`
	Consensus  Consensus  `toml:"consensus"`
	Liveness   Liveness   `toml:"liveness"`
	MicroVM    MicroVM    `toml:"microvm"`
	Functions  Functions  `toml:"functions"`
	Storage    Storage    `toml:"storage"`
	Network    Network    `toml:"network"`
	Monitoring Monitoring `toml:"monitoring"`
}

// Cluster is who this node is.
type Cluster struct {
	NodeID    string            `toml:"node_id"`
	Name      string            `toml:"name"` // of the cluster, used when it is founded
	DataDir   string            `toml:"data_dir"`
	LogLevel  string            `toml:"log_level"`
	LogFormat string            `toml:"log_format"` // json, text
	LogFile   string            `toml:"log_file"`   // empty: stderr
	Listen    string            `toml:"listen"`     // host:port of the one port
	Advertise string            `toml:"advertise"`  // host:port others use; default: listen
	Zone      string            `toml:"zone"`
	Labels    map[string]string `toml:"labels"`
	Roles     []string          `toml:"roles"`
	Witness   bool              `toml:"witness"`
	Join      []string          `toml:"join"`  // members to join at first start
	Token     string            `toml:"token"` // join token
}

// Discovery is how members find each other.
type Discovery struct {
	Method string `toml:"method"`
	Port   int    `toml:"port"`
}

// Consensus tunes raft.
type Consensus struct {
	ElectionTimeout   Duration `toml:"election_timeout"`
	HeartbeatInterval Duration `toml:"heartbeat_interval"`
	SnapshotThreshold uint64   `toml:"snapshot_threshold"`
	MaxVoters         int      `toml:"max_voters"`
}

// Liveness tunes how lost nodes are noticed.
type Liveness struct {
	HeartbeatInterval Duration `toml:"heartbeat_interval"`
	Lease             Duration `toml:"lease"`
	Margin            Duration `toml:"margin"`
}

// MicroVM is what this node offers to instances.
type MicroVM struct {
	DefaultHypervisor string   `toml:"default_hypervisor"` // of VMs that name none; empty: the node chooses
	DefaultMemoryMB   int64    `toml:"default_memory_mb"`
	DefaultVCPUs      int      `toml:"default_vcpus"`
	MaxVMsPerNode     int      `toml:"max_vms_per_node"`
	NixConfigDir      string   `toml:"nix_config_dir"`
	CapacityVCPUs     int      `toml:"capacity_vcpus"`     // 0: what the machine has
	CapacityMemoryMB  int64    `toml:"capacity_memory_mb"` // 0: what the machine has
	ReservedMemoryMB  int64    `toml:"reserved_memory_mb"` // -1: by the machine's size
	ReservedVCPUs     int      `toml:"reserved_vcpus"`
	ImageDir          string   `toml:"image_dir"` // empty: below data_dir
	ForceEmulation    bool     `toml:"force_emulation"`
	SimulatedNodes    int      `toml:"simulated"`    // >0: instances are pretended, for load tests
	StartLimit        int      `toml:"start_limit"`  // instances prepared and started at once; 0: 4, or one for each CPU
	StopTimeout       Duration `toml:"stop_timeout"` // a guest gets to shut down, of VMs that do not say
}

// Functions is how this node runs functions and serves calls of them.
type Functions struct {
	GatewayListen  string `toml:"gateway_listen"`  // host:port for HTTP triggers and URLs alone; they are served on the one port, too
	Domain         string `toml:"domain"`          // of function URLs: <id>.lambda-url.<region>.<domain>
	Region         string `toml:"region"`          // in ARNs and signatures
	AccountID      string `toml:"account_id"`      // in ARNs
	MemoryPercent  int    `toml:"memory_percent"`  // of the memory that VMs leave free that functions may fill
	PoolSize       int    `toml:"pool_size"`       // hypervisors spawned ahead, at most
	MaxPayloadMB   int    `toml:"max_payload_mb"`  // of a synchronous call, and of its answer
	MaxAsyncKB     int    `toml:"max_async_kb"`    // of an asynchronous call
	MaxStreamMB    int    `toml:"max_stream_mb"`   // of an answer that is streamed
	CallerRate     int    `toml:"caller_rate"`     // calls per second of one caller through this node; 0: no limit
	TrustForwarded bool   `toml:"trust_forwarded"` // a proxy stands before this node and says where calls come from
	InsecureNoAuth bool   `toml:"insecure_no_auth"`
}

// Storage is read and kept for the storage capability.
type Storage struct {
	Ceph  Ceph            `toml:"ceph"`
	Pools map[string]Pool `toml:"pools"`
}

// Ceph names the Ceph cluster.
type Ceph struct {
	ConfigFile        string `toml:"config_file"`
	DefaultPool       string `toml:"default_pool"`
	ReplicationFactor int    `toml:"replication_factor"`
	PGNum             int    `toml:"pg_num"`
	MinSize           int    `toml:"min_size"`
}

// Pool is a storage pool.
type Pool struct {
	Type    string `toml:"type"`
	Size    int    `toml:"size"`
	MinSize int    `toml:"min_size"`
	K       int    `toml:"k"`
	M       int    `toml:"m"`
	Rule    string `toml:"rule"`
}

// Network is how guests are connected.
type Network struct {
	Mode           string `toml:"mode"`   // user, bridge: of VMs that name none
	Subnet         string `toml:"subnet"` // the nodes' guest subnets are taken from it
	VLANRange      string `toml:"vlan_range"`
	BridgeName     string `toml:"bridge_name"`
	DefaultGateway string `toml:"default_gateway"`
	DHCPPool       string `toml:"dhcp_pool"`
	PublishAddress string `toml:"publish_address"` // IP that published ports are bound to
}

// Monitoring is what the server tells about itself.
type Monitoring struct {
	MetricsEnabled bool   `toml:"metrics_enabled"`
	MetricsPort    int    `toml:"metrics_port"` // 0: on the one port only
	PprofAddress   string `toml:"pprof_address"`
	OTLPEndpoint   string `toml:"otlp_endpoint"` // OpenTelemetry collector, OTLP over HTTP; empty: no traces
	TracePercent   int    `toml:"trace_percent"` // of calls whose caller does not say
	CephDashboard  bool   `toml:"ceph_dashboard"`
	LogAggregation bool   `toml:"log_aggregation"`
	GrafanaEnabled bool   `toml:"grafana_enabled"`
}

// Default is the configuration of a server that was told nothing.
func Default() Config {
	host, err := os.Hostname()
	if err != nil || blixard.CheckName(host) != nil {
		host = "node1"
	}
	return Config{
		Cluster:   Cluster{NodeID: host, Name: "blixard", DataDir: "/var/lib/blixard", LogLevel: "info", LogFormat: "json", Listen: "127.0.0.1:7400"},
		Discovery: Discovery{Method: "static", Port: 7946},
		Consensus: Consensus{ElectionTimeout: Duration(time.Second), HeartbeatInterval: Duration(100 * time.Millisecond), SnapshotThreshold: 10_000, MaxVoters: 5},
		Liveness:  Liveness{HeartbeatInterval: Duration(time.Second), Lease: Duration(5 * time.Second), Margin: Duration(time.Second)},
		MicroVM:   MicroVM{DefaultMemoryMB: 512, DefaultVCPUs: 1, MaxVMsPerNode: 100, ReservedMemoryMB: -1, NixConfigDir: "/etc/blixard/vm-configs", StopTimeout: Duration(10 * time.Second)},
		Functions: Functions{Domain: "blixard.local", Region: "us-east-1", AccountID: "000000000000", MemoryPercent: 150, PoolSize: 8, MaxPayloadMB: 6, MaxAsyncKB: 1024, MaxStreamMB: 200},
		Network:   Network{Mode: "user", Subnet: "10.88.0.0/16", BridgeName: "blixard0"},
		Monitoring: Monitoring{
			MetricsEnabled: true, TracePercent: 100,
		},
	}
}

// Load reads path over the defaults, then the environment. A missing file is an
// error only if required.
func Load(path string, required bool, environ []string) (Config, error) {
	c := Default()
	b, err := readFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !required:
	case errors.Is(err, fs.ErrNotExist):
		return c, blixard.Invalid("config", "--config names the file; docs/configuration.md has an example", "there is no configuration file %s", path)
	case err != nil && required:
		return c, blixard.Invalid("config", "--config names a TOML file that this user can read", "the configuration cannot be read: %v", err)
	case err != nil:
		return c, fmt.Errorf("reading the configuration: %w", err)
	default:
		if err := decode(path, b, &c); err != nil {
			return c, err
		}
	}
	if err := overlay(&c, environ); err != nil {
		return c, err
	}
	return c, nil
}

// maxFileBytes bounds the configuration file.
const maxFileBytes = 1 << 20

// readFile reads a regular file: another one might never end, or never begin.
func readFile(path string) (b []byte, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if b, err = io.ReadAll(io.LimitReader(f, maxFileBytes+1)); err == nil && len(b) > maxFileBytes {
		err = fmt.Errorf("%s is larger than %d MiB", path, maxFileBytes>>20)
	}
	return b, err
}

func decode(path string, b []byte, c *Config) error {
	d := toml.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	err := d.Decode(c)
	if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		e := strict.Errors[0]
		row, column := e.Position()
		key := strings.Join(e.Key(), ".")
		hint := "the keys are listed in docs/configuration.md"
		if near := nearestKey(key); near != "" {
			hint = "did you mean " + near + "?"
		}
		return &blixard.Error{Code: blixard.CodeInvalid, Field: key, Hint: hint, Message: fmt.Sprintf("%s:%d:%d: the key %s is not known", path, row, column, key)}
	}
	if decodeErr, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, column := decodeErr.Position()
		key, text := strings.Join(decodeErr.Key(), "."), strings.TrimPrefix(decodeErr.Error(), "toml: ")
		if strings.HasPrefix(text, "cannot decode TOML") { // the decoder speaks of Go's types
			text = "a " + kindOf(key) + " is needed"
		}
		if key != "" {
			text = key + ": " + text
		}
		return &blixard.Error{Code: blixard.CodeInvalid, Field: key, Message: fmt.Sprintf("%s:%d:%d: %s", path, row, column, text)}
	}
	if err != nil {
		return &blixard.Error{Code: blixard.CodeInvalid, Message: fmt.Sprintf("%s: %v", path, err)}
	}
	return bareDurations(path, b)
}

// bareDurations refuses durations written as bare numbers, which the decoder
// takes for nanoseconds.
func bareDurations(path string, b []byte) error {
	var raw map[string]any
	if err := toml.Unmarshal(b, &raw); err != nil {
		return &blixard.Error{Code: blixard.CodeInvalid, Message: fmt.Sprintf("%s: %v", path, err)}
	}
	var failed error
	walk(reflect.ValueOf(new(Config)).Elem(), "", func(key string, v reflect.Value) {
		section, name, _ := strings.Cut(key, ".")
		table, _ := raw[section].(map[string]any)
		value, given := table[name]
		if _, text := value.(string); v.Type() != reflect.TypeFor[Duration]() || !given || text || failed != nil {
			return
		}
		failed = blixard.Invalid(key, "write a duration such as 5s or 300ms, in quotes", "%s: %s: %v has no unit", path, key, value)
	})
	return failed
}

// kindOf says what the value of a key is, "value of another kind" when there is
// no such key.
func kindOf(key string) string {
	kind := "value of another kind"
	walk(reflect.ValueOf(new(Config)).Elem(), "", func(k string, v reflect.Value) {
		if k != key {
			return
		}
		switch {
		case v.Type() == reflect.TypeFor[Duration]():
			kind = `duration such as "5s"`
		case v.Kind() == reflect.String:
			kind = "text in quotes"
		case v.Kind() == reflect.Bool:
			kind = "true or false"
		case v.Kind() == reflect.Slice:
			kind = `list such as ["a", "b"]`
		case v.Kind() == reflect.Map:
			kind = "table"
		case v.CanInt() || v.CanUint():
			kind = "whole number"
		}
	})
	return kind
}

// Keys lists every key, such as "cluster.node_id", sorted.
func Keys() []string {
	var out []string
	walk(reflect.ValueOf(new(Config)).Elem(), "", func(key string, _ reflect.Value) { out = append(out, key) })
	slices.Sort(out)
	return out
}

// nearestKey prefers a key of the same section.
func nearestKey(key string) string {
	section := key[:strings.LastIndexByte(key, '.')+1]
	var same []string
	for _, k := range Keys() {
		if section != "" && strings.HasPrefix(k, section) {
			same = append(same, k)
		}
	}
	if near := blixard.Nearest(key, same); near != "" {
		return near
	}
	if section == "" {
		if near := blixard.Nearest(key, sections()); near != "" {
			return "[" + near + "]"
		}
	}
	return blixard.Nearest(key, Keys())
}

// sections are the tables of the file.
func sections() []string {
	var out []string
	for _, k := range Keys() {
		if at := strings.LastIndexByte(k, '.'); !slices.Contains(out, k[:at]) {
			out = append(out, k[:at])
		}
	}
	return out
}

func walk(v reflect.Value, prefix string, leaf func(key string, v reflect.Value)) {
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("toml")
		f := v.Field(i)
		if f.Kind() == reflect.Struct {
			walk(f, prefix+name+".", leaf)
			continue
		}
		leaf(prefix+name, f)
	}
}

// overlay sets what the environment names.
func overlay(c *Config, environ []string) error {
	env := map[string]string{}
	for _, e := range environ {
		if k, v, ok := strings.Cut(e, "="); ok {
			env[k] = v
		}
	}
	if err := unknownVariable(env); err != nil {
		return err
	}
	var failed error
	walk(reflect.ValueOf(c).Elem(), "", func(key string, v reflect.Value) {
		name := variable(key)
		text, ok := env[name]
		if !ok || failed != nil {
			return
		}
		if err := set(v, text); err != nil {
			failed = &blixard.Error{Code: blixard.CodeInvalid, Field: key, Message: fmt.Sprintf("the environment variable %s: %v", name, err)}
		}
	})
	return failed
}

// variable is the environment variable of a key.
func variable(key string) string {
	return "BLIXARD_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// unknownVariable refuses variables that are named like a section's key and are
// none.
func unknownVariable(env map[string]string) error {
	var known []string
	for _, k := range Keys() {
		known = append(known, variable(k))
	}
	for _, name := range slices.Sorted(maps.Keys(env)) {
		ours := slices.ContainsFunc(sections(), func(s string) bool { return strings.HasPrefix(name, variable(s)+"_") })
		if !ours || slices.Contains(known, name) {
			continue
		}
		hint := "the keys are listed in docs/configuration.md"
		if near := blixard.Nearest(name, known); near != "" {
			hint = "did you mean " + near + "?"
		}
		return blixard.Invalid(name, hint, "the environment variable %s is no setting", name)
	}
	return nil
}

func set(v reflect.Value, text string) error {
	if u, ok := reflect.TypeAssert[interface{ UnmarshalText([]byte) error }](v.Addr()); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int64:
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		v.SetInt(n)
	case reflect.Uint64:
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		v.SetUint(n)
	case reflect.Slice:
		v.Set(reflect.ValueOf(strings.Split(text, ",")))
	case reflect.Map:
		m := map[string]string{}
		for part := range strings.SplitSeq(text, ",") {
			k, val, ok := strings.Cut(part, "=")
			if !ok {
				return fmt.Errorf("%q is not key=value", part)
			}
			m[k] = val
		}
		v.Set(reflect.ValueOf(m))
	default:
		return fmt.Errorf("it cannot be set from the environment")
	}
	return nil
}

// Check tells what is wrong with a configuration, nil if nothing.
func (c *Config) Check() error {
	invalid := func(field, hint, format string, args ...any) error {
		return blixard.Invalid(field, hint, format, args...)
	}
	if err := blixard.CheckName(c.Cluster.NodeID); err != nil {
		return invalid("cluster.node_id", "set it with --node-id", "cluster.node_id: %v", err)
	}
	if c.Cluster.DataDir == "" {
		return invalid("cluster.data_dir", "", "cluster.data_dir is empty")
	}
	if _, _, err := net.SplitHostPort(c.Cluster.Listen); err != nil {
		return invalid("cluster.listen", "write host:port, such as 0.0.0.0:7400", "cluster.listen %q: %v", c.Cluster.Listen, err)
	}
	if c.Cluster.Advertise != "" {
		if _, _, err := net.SplitHostPort(c.Cluster.Advertise); err != nil {
			return invalid("cluster.advertise", "write host:port", "cluster.advertise %q: %v", c.Cluster.Advertise, err)
		}
	}
	if c.Network.PublishAddress != "" && net.ParseIP(c.Network.PublishAddress) == nil {
		return invalid("network.publish_address", "give an IP address of this machine", "network.publish_address %q is not an IP address", c.Network.PublishAddress)
	}
	if !slices.Contains([]string{"user", "bridge"}, c.Network.Mode) {
		return invalid("network.mode", "user or bridge", "network.mode %q is not known", c.Network.Mode)
	}
	if p, err := netip.ParsePrefix(c.Network.Subnet); err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 30 {
		return invalid("network.subnet", "write an IPv4 network such as 10.88.0.0/16, between /8 and /30", "network.subnet %q is no network that guests could have", c.Network.Subnet)
	}
	if !bridgeName.MatchString(c.Network.BridgeName) {
		return invalid("network.bridge_name", "at most 10 letters, digits, '-' and '_'", "network.bridge_name %q is no name for a bridge", c.Network.BridgeName)
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Cluster.LogLevel) {
		return invalid("cluster.log_level", "debug, info, warn or error", "cluster.log_level %q is not known", c.Cluster.LogLevel)
	}
	if !slices.Contains([]string{"json", "text"}, c.Cluster.LogFormat) {
		return invalid("cluster.log_format", "json or text", "cluster.log_format %q is not known", c.Cluster.LogFormat)
	}
	if !slices.Contains([]string{"static", "tailscale"}, c.Discovery.Method) {
		return invalid("discovery.method", "static, or tailscale for a later release", "discovery.method %q is not known", c.Discovery.Method)
	}
	hb, el := time.Duration(c.Consensus.HeartbeatInterval), time.Duration(c.Consensus.ElectionTimeout)
	if hb < 5*time.Millisecond || hb > 10*time.Second {
		return invalid("consensus.heartbeat_interval", "", "consensus.heartbeat_interval is %s; it must be between 5ms and 10s", hb)
	}
	if el < 3*hb || el > time.Minute {
		return invalid("consensus.election_timeout", "", "consensus.election_timeout is %s; it must be at least three heartbeat intervals (%s) and at most 1m", el, 3*hb)
	}
	if c.Consensus.SnapshotThreshold < 10 {
		return invalid("consensus.snapshot_threshold", "", "consensus.snapshot_threshold is %d; it must be at least 10", c.Consensus.SnapshotThreshold)
	}
	if c.Consensus.MaxVoters < 1 || c.Consensus.MaxVoters > 9 {
		return invalid("consensus.max_voters", "3, 5 or 7 are usual", "consensus.max_voters is %d; it must be between 1 and 9", c.Consensus.MaxVoters)
	}
	beat, lease, margin := time.Duration(c.Liveness.HeartbeatInterval), time.Duration(c.Liveness.Lease), time.Duration(c.Liveness.Margin)
	if beat < 20*time.Millisecond || lease < 3*beat || margin < lease/20 || lease+margin > 10*time.Minute {
		return invalid("liveness", "the defaults are 1s, 5s and 1s", "liveness: heartbeat_interval %s, lease %s and margin %s do not fit together: the lease must span three heartbeats, the margin a twentieth of the lease, both together at most 10m", beat, lease, margin)
	}
	// What is left out of a VM comes from here, so it is held to a VM's bounds.
	spec := c.MicroVM.SpecDefaults()
	if c.MicroVM.DefaultMemoryMB < 0 || c.MicroVM.DefaultVCPUs < 0 || c.MicroVM.StopTimeout < 0 || c.MicroVM.StartLimit < 0 {
		return invalid("microvm", "leave it out, or set it to 0 for the built-in default", "microvm: default_memory_mb, default_vcpus, start_limit and stop_timeout must not be negative")
	}
	if c.MicroVM.ReservedMemoryMB < -1 {
		return invalid("microvm.reserved_memory_mb", "-1 reserves by the machine's size, 0 reserves nothing", "microvm.reserved_memory_mb is %d", c.MicroVM.ReservedMemoryMB)
	}
	spec.Defaults()
	if err := spec.Check(); err != nil {
		return fmt.Errorf("microvm: the defaults for VMs: %w", err)
	}
	if err := blixard.CheckHypervisor(spec.Hypervisor); err != nil {
		return fmt.Errorf("microvm: default_hypervisor: %w", err)
	}
	for key, value := range c.Cluster.Labels {
		if err := errors.Join(blixard.CheckLabelKey(key), blixard.CheckLabelValue(value)); err != nil {
			return invalid("cluster.labels", "", "cluster.labels: %v", err)
		}
	}
	if err := blixard.CheckZone(c.Cluster.Zone); err != nil {
		return fmt.Errorf("cluster.zone: %w", err)
	}
	return c.checkFunctions()
}

var (
	domainName  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,200}[a-z0-9])?$`)
	accountName = regexp.MustCompile(`^[0-9]{12}$`)
)

func (c *Config) checkFunctions() error {
	f := c.Functions
	if f.GatewayListen != "" {
		if _, _, err := net.SplitHostPort(f.GatewayListen); err != nil {
			return blixard.Invalid("functions.gateway_listen", "write host:port, such as 0.0.0.0:80", "functions.gateway_listen %q: %v", f.GatewayListen, err)
		}
	}
	switch {
	case !domainName.MatchString(f.Domain):
		return blixard.Invalid("functions.domain", "write a domain such as functions.example.org", "functions.domain %q is no domain", f.Domain)
	case !domainName.MatchString(f.Region) || strings.Contains(f.Region, "."):
		return blixard.Invalid("functions.region", "write a word such as us-east-1", "functions.region %q is no region", f.Region)
	case !accountName.MatchString(f.AccountID):
		return blixard.Invalid("functions.account_id", "write twelve digits", "functions.account_id %q is no account", f.AccountID)
	case f.MemoryPercent < 1 || f.MemoryPercent > 1000:
		return blixard.Invalid("functions.memory_percent", "100 lets functions fill exactly what VMs leave free", "functions.memory_percent is %d; it must be between 1 and 1000", f.MemoryPercent)
	case f.PoolSize < 0 || f.PoolSize > 1000:
		return blixard.Invalid("functions.pool_size", "0 spawns none ahead", "functions.pool_size is %d; it must be between 0 and 1000", f.PoolSize)
	case f.MaxPayloadMB < 1 || f.MaxPayloadMB > 1024 || f.MaxStreamMB < 1 || f.MaxStreamMB > 1<<20:
		return blixard.Invalid("functions.max_payload_mb", "", "functions.max_payload_mb is %d and functions.max_stream_mb %d; they must be between 1 and 1,024 and 1,048,576", f.MaxPayloadMB, f.MaxStreamMB)
	case f.MaxAsyncKB < 1 || f.MaxAsyncKB > 2048:
		return blixard.Invalid("functions.max_async_kb", "every replica keeps the payloads that wait", "functions.max_async_kb is %d; it must be between 1 and 2,048", f.MaxAsyncKB)
	case f.CallerRate < 0:
		return blixard.Invalid("functions.caller_rate", "0 is no limit", "functions.caller_rate is %d; it must not be negative", f.CallerRate)
	case c.Monitoring.TracePercent < 0 || c.Monitoring.TracePercent > 100:
		return blixard.Invalid("monitoring.trace_percent", "", "monitoring.trace_percent is %d; it must be between 0 and 100", c.Monitoring.TracePercent)
	case c.Monitoring.OTLPEndpoint != "" && !strings.HasPrefix(c.Monitoring.OTLPEndpoint, "http://") && !strings.HasPrefix(c.Monitoring.OTLPEndpoint, "https://"):
		return blixard.Invalid("monitoring.otlp_endpoint", "write such as http://127.0.0.1:4318", "monitoring.otlp_endpoint %q is no URL", c.Monitoring.OTLPEndpoint)
	case f.InsecureNoAuth && !onLoopback(c.Cluster.Listen):
		return blixard.Invalid("functions.insecure_no_auth", "listen on 127.0.0.1, or make keys with `blixard auth create-key`", "functions.insecure_no_auth would let anybody who reaches %s change and call functions", c.Cluster.Listen)
	}
	return nil
}

// onLoopback tells whether only this machine reaches an address.
func onLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip, parseErr := netip.ParseAddr(host)
	return err == nil && (host == "localhost" || parseErr == nil && ip.IsLoopback())
}

// bridgeName leaves room in a device name for the label of the node's address.
var bridgeName = regexp.MustCompile(`^[a-zA-Z0-9][-a-zA-Z0-9_]{0,9}$`)

// SpecDefaults are the parts of a VM's spec that this configuration gives when
// a request leaves them out. Only those are set.
func (m *MicroVM) SpecDefaults() blixard.VMSpec {
	return blixard.VMSpec{
		Hypervisor: m.DefaultHypervisor, VCPUs: m.DefaultVCPUs, MemoryMiB: m.DefaultMemoryMB, StopGraceMS: time.Duration(m.StopTimeout).Milliseconds(),
	}
}

// Unused names settings that are set but have no effect in this release, so
// that the server can say so instead of pretending.
func (c *Config) Unused() []string {
	d, out := Default(), []string(nil)
	if c.Discovery.Method != d.Discovery.Method { // nodes are found at the addresses they join at
		out = append(out, "discovery.method")
	}
	if c.Storage.Ceph != d.Storage.Ceph || len(c.Storage.Pools) > 0 {
		out = append(out, "storage")
	}
	if c.Network.VLANRange != "" || c.Network.DefaultGateway != "" || c.Network.DHCPPool != "" {
		out = append(out, "network.vlan_range", "network.default_gateway", "network.dhcp_pool")
	}
	if c.Monitoring.CephDashboard || c.Monitoring.LogAggregation || c.Monitoring.GrafanaEnabled {
		out = append(out, "monitoring.ceph_dashboard", "monitoring.log_aggregation", "monitoring.grafana_enabled")
	}
	return out
}
