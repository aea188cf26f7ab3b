package blixard

import (
	"slices"
	"strconv"
	"strings"
)

// Bounds of functions. What a cluster may hold of each is the state's to say.
const (
	MinFunctionMemoryMiB  = 64
	MaxFunctionMemoryMiB  = 10240
	MaxFunctionTimeoutMS  = 900_000
	MaxFunctionEnvBytes   = 4 << 10
	MaxFunctionConcurrent = 100_000
	MaxFunctionVersions   = 1000 // published ones kept of a function
	MaxFunctionAliases    = 100
	MaxFunctionTriggers   = 100
	MaxFunctionURLs       = 101 // one for $LATEST and one for each alias
	MaxFunctionPolicies   = 100
	MaxPolicyBytes        = 20 << 10 // of all statements of a function
	MaxFunctionTags       = 50
	maxFunctionName       = 64
	maxAliasName          = 128
	maxDescriptionBytes   = 256
)

// Defaults of functions.
const (
	DefaultMaxConcurrent    = 1000
	DefaultFunctionMemory   = 128
	DefaultFunctionTimeout  = 30_000
	DefaultInitMS           = 10_000
	DefaultFunctionPort     = 8080
	DefaultEphemeralMiB     = 512
	DefaultScaleDownDelayMS = 300_000
	DefaultRecycleCalls     = 10_000
	DefaultMaxRetries       = 2
	DefaultMaxEventAgeMS    = 21_600_000
)

// Latest is the qualifier of what the user changes.
const Latest = "$LATEST"

// MaxEventHops bounds functions that call each other through destinations.
const MaxEventHops = 16

// OnFailureDeadLetters keeps events that failed for good for `function events`.
// It is what happens when no function is named, too.
const OnFailureDeadLetters = "dead-letters"

// Runtimes are the runtimes that a function may have.
func Runtimes() []string { return []string{"nix", "bootstrap", "http", "wasm"} }

// runtimeAliases are other names of runtimes, as the Lambda API has them.
func runtimeAliases() []Label {
	return []Label{{"provided.al2023", "bootstrap"}, {"provided.al2", "bootstrap"}, {"provided", "bootstrap"}}
}

// RuntimeKind is what serves a runtime: "provided.al2023" is served by
// "bootstrap". An unknown runtime is its own kind.
func RuntimeKind(runtime string) string {
	for _, a := range runtimeAliases() {
		if a.Key == runtime {
			return a.Value
		}
	}
	return runtime
}

// PlacementStrategies are the strategies that functions may combine.
func PlacementStrategies() []string {
	return []string{"best-fit", "data-locality", "network-proximity", "load-balanced"}
}

// Defaults fills what the user left out. It is called where a command is made,
// so that what is stored is complete and never changes with a release.
func (s *FunctionSpec) Defaults() {
	text := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	number := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	count := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	text(&s.Runtime, "bootstrap")
	text(&s.Architecture, "x86_64")
	text(&s.Network, "user")
	text(&s.Snapshot, "on")
	if RuntimeKind(s.Runtime) == "bootstrap" {
		text(&s.Handler, "bootstrap")
	}
	if s.Runtime == "http" {
		count(&s.Port, DefaultFunctionPort)
	}
	number(&s.MemoryMiB, DefaultFunctionMemory)
	number(&s.TimeoutMS, DefaultFunctionTimeout)
	number(&s.InitMS, DefaultInitMS)
	number(&s.EphemeralMiB, DefaultEphemeralMiB)
	number(&s.ScaleDownDelayMS, DefaultScaleDownDelayMS)
	count(&s.VCPUs, int(max(1, min(6, (s.MemoryMiB+1768)/1769))))
	count(&s.TargetConcurrency, 1)
	count(&s.RecycleCalls, DefaultRecycleCalls)
	for i := range s.Placement.Preferences {
		count(&s.Placement.Preferences[i].Weight, 50)
	}
	slices.SortStableFunc(s.Env, func(a, b Label) int { return strings.Compare(a.Key, b.Key) })
}

// Check tells what is wrong with a complete spec, nil if nothing. Replicas of
// different releases must agree about it; what may become stricter is in
// CheckNew.
func (s *FunctionSpec) Check() error {
	between := func(field string, v, lo, hi int64, unit, hint string) error {
		if v < lo || v > hi {
			return Invalid(field, hint, "%s is %d%s; it must be between %d and %d", field, v, unit, lo, hi)
		}
		return nil
	}
	for _, err := range []error{
		between("memory", s.MemoryMiB, MinFunctionMemoryMiB, MaxFunctionMemoryMiB, " MiB", "write such as --memory 128M"),
		between("timeout", s.TimeoutMS, 1, MaxFunctionTimeoutMS, " ms", "write such as --timeout 30s; a call may take 15 minutes at most"),
		between("initTimeout", s.InitMS, 1, MaxFunctionTimeoutMS, " ms", ""),
		between("vcpus", int64(s.VCPUs), 1, 64, "", ""),
		between("port", int64(s.Port), 0, 65535, "", ""),
		between("ephemeralStorage", s.EphemeralMiB, 1, 10240, " MiB", ""),
		between("targetConcurrency", int64(s.TargetConcurrency), 1, 1000, "", "an instance answers so many calls at once"),
		between("minInstances", int64(s.MinInstances), 0, MaxFunctionConcurrent, "", ""),
		between("maxInstances", int64(s.MaxInstances), 0, MaxFunctionConcurrent, "", "0 is no limit"),
		between("scaleDownDelay", s.ScaleDownDelayMS, 0, 86_400_000, " ms", ""),
		between("burst", int64(s.Burst), 0, MaxFunctionConcurrent, "", "0 is no limit"),
		between("recycleCalls", int64(s.RecycleCalls), 1, 1_000_000_000, "", ""),
		oneOf("snapshot", s.Snapshot, "on", "off"),
		oneOf("network", s.Network, "user", "none"),
		s.checkTexts(),
		s.checkEnv(),
		s.Placement.check(),
	} {
		if err != nil {
			return err
		}
	}
	if s.MaxInstances != 0 && s.MinInstances > s.MaxInstances {
		return Invalid("minInstances", "", "minInstances is %d, more than maxInstances %d", s.MinInstances, s.MaxInstances)
	}
	if s.Runtime == "http" && s.Port == 0 {
		return Invalid("port", "write where the server listens, such as --port 8080", "an http function has no port")
	}
	return nil
}

func (s *FunctionSpec) checkTexts() error {
	if s.Runtime == "" || len(s.Runtime) > 64 {
		return Invalid("runtime", "known: "+strings.Join(Runtimes(), ", "), "the runtime's name has %d characters", len(s.Runtime))
	}
	for _, t := range []struct {
		field, text string
		most        int
	}{{"description", s.Description, maxDescriptionBytes}, {"handler", s.Handler, 128}, {"architecture", s.Architecture, 32}, {"role", s.Role, 256}} {
		if len(t.text) > t.most {
			return Invalid(t.field, "", "%s is %d bytes long; at most %d are allowed", t.field, len(t.text), t.most)
		}
		if strings.Contains(t.text, "\x00") {
			return Invalid(t.field, "", "%s holds a zero byte", t.field)
		}
	}
	if len(s.Command) > maxListed {
		return Invalid("command", "", "command has %d entries; at most %d are allowed", len(s.Command), maxListed)
	}
	size := 0
	for _, a := range s.Command {
		size += len(a)
		if strings.Contains(a, "\x00") {
			return Invalid("command", "", "an argument of the command holds a zero byte")
		}
	}
	if size > MaxFunctionEnvBytes {
		return Invalid("command", "", "the command is %d bytes; at most %d are allowed", size, MaxFunctionEnvBytes)
	}
	return nil
}

func (s *FunctionSpec) checkEnv() error {
	size := 0
	for i, e := range s.Env {
		size += len(e.Key) + len(e.Value)
		if e.Key == "" || strings.ContainsAny(e.Key, "=\x00") || strings.Contains(e.Value, "\x00") {
			return Invalid("env", "write NAME=value", "the environment variable %.40q is not usable", e.Key)
		}
		if i > 0 && s.Env[i-1].Key >= e.Key {
			return Invalid("env", "give each once", "the environment variable %.40q is given twice, or they are not sorted", e.Key)
		}
	}
	if size > MaxFunctionEnvBytes {
		return Invalid("env", "put large things into the code or fetch them", "the environment is %d bytes; at most %d are allowed", size, MaxFunctionEnvBytes)
	}
	return nil
}

func (p *FunctionPlacement) check() error {
	for _, l := range []struct {
		field string
		n     int
	}{{"placement.strategies", len(p.Strategies)}, {"placement.constraints", len(p.Constraints)}, {"placement.preferences", len(p.Preferences)}, {"placement.dataHints", len(p.DataHints)}} {
		if l.n > maxListed {
			return Invalid(l.field, "", "%s has %d entries; at most %d are allowed", l.field, l.n, maxListed)
		}
	}
	for i, s := range p.Strategies {
		if err := oneOf("placement.strategies", s, PlacementStrategies()...); err != nil {
			return err
		}
		if slices.Contains(p.Strategies[:i], s) {
			return Invalid("placement.strategies", "", "the strategy %s is given twice", s)
		}
	}
	for _, c := range p.Constraints {
		if err := c.Check(); err != nil {
			return err
		}
	}
	for _, c := range p.Preferences {
		if err := c.Check(); err != nil {
			return err
		}
		if c.Weight < 1 || c.Weight > 100 {
			return Invalid("placement.preferences", "", "the weight of preference %s is %d; it must be between 1 and 100", c.Constraint, c.Weight)
		}
	}
	for _, h := range p.DataHints {
		if len(h) > 1024 || strings.ContainsAny(h, "\x00\n") {
			return Invalid("placement.dataHints", dataHintHint, "the data hint %.40q is not usable", h)
		}
	}
	return nil
}

const dataHintHint = `write KIND:VALUE, such as "ceph-pool:raw-data", "node:node2", "zone:a", "label:disk=nvme" or "path:/data"`

// DataHintKinds are the words that may stand before the colon of a data hint.
func DataHintKinds() []string { return []string{"ceph-pool", "node", "zone", "label", "path"} }

// ParseDataHint takes a data hint apart; ok is false when it has no such form.
func ParseDataHint(hint string) (kind, value string, ok bool) {
	kind, value, ok = strings.Cut(hint, ":")
	return kind, value, ok && kind != "" && value != ""
}

// CheckNew is Check for those who make commands of what a user writes, with
// rules that replicas of different releases need not agree about.
func (s *FunctionSpec) CheckNew() error {
	if err := CheckRuntime(s.Runtime); err != nil {
		return err
	}
	if err := s.Check(); err != nil {
		return err
	}
	if err := oneOf("architecture", s.Architecture, "x86_64"); err != nil {
		return err
	}
	for _, e := range s.Env {
		if err := CheckEnvName(e.Key); err != nil {
			return err
		}
	}
	for _, c := range s.Placement.Constraints {
		if err := c.checkNew("constraint"); err != nil {
			return err
		}
	}
	for _, p := range s.Placement.Preferences {
		if err := p.checkNew("preferences"); err != nil {
			return err
		}
	}
	for _, h := range s.Placement.DataHints {
		kind, _, ok := ParseDataHint(h)
		if !ok {
			return Invalid("placement.dataHints", dataHintHint, "the data hint %.60q has no kind and value", h)
		}
		if !slices.Contains(DataHintKinds(), kind) {
			hint := dataHintHint
			if near := Nearest(kind, DataHintKinds()); near != "" {
				hint = "did you mean " + near + "? " + hint
			}
			return Invalid("placement.dataHints", hint, "the kind %.40q of a data hint is not known", kind)
		}
	}
	return nil
}

// CheckRuntime tells why there is no such runtime.
func CheckRuntime(runtime string) error {
	known := Runtimes()
	for _, a := range runtimeAliases() {
		known = append(known, a.Key)
	}
	if slices.Contains(known, runtime) {
		return nil
	}
	hint := "known: " + strings.Join(known, ", ")
	if near := Nearest(runtime, known); near != "" {
		hint = "did you mean " + near + "? " + hint
	} else {
		for _, lang := range []string{"python", "node", "java", "ruby", "dotnet", "go"} {
			if strings.HasPrefix(runtime, lang) {
				hint = "bring its program as bootstrap (it speaks the Lambda Runtime API) or as an http server; " + hint
			}
		}
	}
	return Invalid("runtime", hint, "the runtime %.64q is not known", runtime)
}

// SameTemplate tells whether two specs make the same template from the same
// code: what differs is only how instances are placed and counted.
func (s *FunctionSpec) SameTemplate(o *FunctionSpec) bool {
	same := s.Runtime == o.Runtime && s.Handler == o.Handler && s.Architecture == o.Architecture && slices.Equal(s.Command, o.Command) && s.Port == o.Port
	same = same && s.MemoryMiB == o.MemoryMiB && s.VCPUs == o.VCPUs && s.TimeoutMS == o.TimeoutMS && s.InitMS == o.InitMS && slices.Equal(s.Env, o.Env)
	return same && s.EphemeralMiB == o.EphemeralMiB && s.Network == o.Network && s.TargetConcurrency == o.TargetConcurrency && s.Snapshot == o.Snapshot
}

// CheckFunctionName tells why name cannot name a function.
func CheckFunctionName(name string) error {
	const hint = "use 1 to 64 letters, digits, '-' and '_'"
	if name == "" {
		return Invalid("name", hint, "the function's name is empty")
	}
	if len(name) > maxFunctionName {
		return Invalid("name", hint, "the function's name %.20q… is %d characters long", name, len(name))
	}
	if i := strings.IndexFunc(name, notInName); i >= 0 {
		return Invalid("name", hint, "the function's name %q has %q at position %d", name, string([]rune(name[i:])[0]), i+1)
	}
	return nil
}

func notInName(c rune) bool {
	return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_'
}

// CheckAliasName tells why name cannot name an alias.
func CheckAliasName(name string) error {
	const hint = "use 1 to 128 letters, digits, '-' and '_', not digits alone"
	if name == "" || len(name) > maxAliasName || strings.ContainsFunc(name, notInName) {
		return Invalid("alias", hint, "the alias %.40q is not usable", name)
	}
	if strings.Trim(name, "0123456789") == "" {
		return Invalid("alias", hint, "the alias %.40q would be taken for a version", name)
	}
	return nil
}

// ParseVersion reads a qualifier that names a version: "$LATEST" (and "") is 0,
// digits are a number. ok is false for an alias.
func ParseVersion(qualifier string) (number int, ok bool) {
	if qualifier == "" || qualifier == Latest {
		return 0, true
	}
	if qualifier[0] == '0' || strings.Trim(qualifier, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(qualifier)
	return n, err == nil
}

// VersionName is the qualifier of a version: "$LATEST" or its number.
func VersionName(number int) string {
	if number == 0 {
		return Latest
	}
	return strconv.Itoa(number)
}

// CheckQualifier tells why a text cannot be a qualifier; "" stands for $LATEST.
func CheckQualifier(q string) error {
	if _, ok := ParseVersion(q); ok {
		return nil
	}
	if err := CheckAliasName(q); err != nil {
		return Invalid("qualifier", "write $LATEST, a version's number or an alias", "the qualifier %.40q is not usable", q)
	}
	return nil
}

// Callable is what answers calls of a version: itself when it is active, the
// former code while an update of it is not, nil when nothing can be called.
func (v *FunctionVersion) Callable() *FunctionVersion {
	if v.State == FunctionActive {
		return v
	}
	return v.Previous
}

// Alias returns the function's alias of that name, nil if there is none.
func (f *Function) Alias(name string) *FunctionAlias {
	for i := range f.Aliases {
		if f.Aliases[i].Name == name {
			return &f.Aliases[i]
		}
	}
	return nil
}

// URL returns the function's URL for a qualifier ("$LATEST" or an alias), nil if
// there is none.
func (f *Function) URL(qualifier string) *FunctionURL {
	for i := range f.URLs {
		if f.URLs[i].Qualifier == qualifier {
			return &f.URLs[i]
		}
	}
	return nil
}

// AsyncFor is what holds for asynchronous invocations of a qualifier: its own
// configuration, or the defaults.
func (f *Function) AsyncFor(qualifier string) AsyncConfig {
	if qualifier == "" {
		qualifier = Latest
	}
	for i := range f.Async {
		if f.Async[i].Qualifier == qualifier {
			return f.Async[i]
		}
	}
	return AsyncConfig{Qualifier: qualifier, MaxRetries: DefaultMaxRetries, MaxAgeMS: DefaultMaxEventAgeMS}
}
