package lambdaapi

import (
	"encoding/base64"
	"encoding/hex"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// timeForm is how the API writes times.
const timeForm = "2006-01-02T15:04:05.000+0000"

func writeTime(ms int64) string { return time.UnixMilli(ms).UTC().Format(timeForm) }

// The parts of a function's configuration.
type (
	environment      struct{ Variables map[string]string }
	ephemeralStorage struct{ Size int64 }
	snapStart        struct {
		ApplyOn            string
		OptimizationStatus string `json:",omitempty"`
	}
	tracingConfig struct{ Mode string }
	loggingConfig struct {
		LogFormat           string `json:",omitempty"`
		ApplicationLogLevel string `json:",omitempty"`
		SystemLogLevel      string `json:",omitempty"`
		LogGroup            string `json:",omitempty"`
	}
	vpcConfig struct {
		SubnetIds, SecurityGroupIds []string
		Ipv6AllowedForDualStack     bool
	}
)

// functionConfiguration is a version as the API shows it.
type functionConfiguration struct {
	FunctionName     string
	FunctionArn      string
	Runtime          string
	Role             string
	Handler          string
	CodeSize         int64
	Description      string
	Timeout          int64
	MemorySize       int64
	LastModified     string
	CodeSha256       string
	Version          string
	Environment      *environment `json:",omitempty"`
	TracingConfig    tracingConfig
	RevisionId       string
	PackageType      string
	Architectures    []string
	EphemeralStorage ephemeralStorage
	SnapStart        snapStart
	LoggingConfig    loggingConfig

	// Lists leave them out.
	State                      string `json:",omitempty"`
	StateReason                string `json:",omitempty"`
	StateReasonCode            string `json:",omitempty"`
	LastUpdateStatus           string `json:",omitempty"`
	LastUpdateStatusReason     string `json:",omitempty"`
	LastUpdateStatusReasonCode string `json:",omitempty"`
}

// configuration shows a version. qualifier is what its ARN ends with, "" for
// none.
func (s *Server) configuration(v *blixard.FunctionVersion, qualifier string) *functionConfiguration {
	spec := &v.Spec
	c := &functionConfiguration{
		FunctionName: string(v.Function), FunctionArn: s.arn(v.Function, qualifier), Runtime: spec.Runtime, Role: spec.Role, Handler: spec.Handler,
		CodeSize: v.CodeBytes, Description: spec.Description, Timeout: (spec.TimeoutMS + 999) / 1000, MemorySize: spec.MemoryMiB,
		LastModified: writeTime(v.ModifiedMS), CodeSha256: codeSHA256(v.CodeDigest), Version: blixard.VersionName(v.Number),
		TracingConfig: tracingConfig{Mode: "PassThrough"}, RevisionId: v.RevisionID, PackageType: "Zip", Architectures: []string{"x86_64"},
		EphemeralStorage: ephemeralStorage{Size: spec.EphemeralMiB}, SnapStart: snapStart{ApplyOn: "None", OptimizationStatus: "Off"},
		LoggingConfig: loggingConfig{LogFormat: "Text", LogGroup: logGroup(v.Function)},
	}
	if len(spec.Env) > 0 {
		c.Environment = &environment{Variables: make(map[string]string, len(spec.Env))}
		for _, e := range spec.Env {
			c.Environment.Variables[e.Key] = e.Value
		}
	}
	c.setState(v)
	return c
}

func logGroup(name blixard.FunctionName) string { return "/aws/lambda/" + string(name) }

// codeSHA256 is the digest as the API writes it.
func codeSHA256(digest string) string {
	raw, err := hex.DecodeString(digest)
	if err != nil {
		return ""
	}
	return base64.StdEncoding.EncodeToString(raw)
}

// setState says whether the version can be called, and what became of its last
// update: two things here, one state there.
func (c *functionConfiguration) setState(v *blixard.FunctionVersion) {
	switch {
	case v.State == blixard.FunctionActive:
		c.State, c.LastUpdateStatus = "Active", "Successful"
	case v.Previous != nil && v.State == blixard.FunctionPending:
		c.State, c.LastUpdateStatus = "Active", "InProgress"
		c.LastUpdateStatusReason, c.LastUpdateStatusReasonCode = "The function is being created.", "Creating"
	case v.Previous != nil:
		c.State, c.LastUpdateStatus = "Active", "Failed"
		c.LastUpdateStatusReason, c.LastUpdateStatusReasonCode = v.StateReason, reasonCode(v.StateCode)
	case v.State == blixard.FunctionPending:
		c.State, c.StateReason, c.StateReasonCode = "Pending", "The function is being created.", "Creating"
	default:
		c.State, c.StateReason, c.StateReasonCode = "Failed", v.StateReason, reasonCode(v.StateCode)
		c.LastUpdateStatus, c.LastUpdateStatusReason, c.LastUpdateStatusReasonCode = "Failed", v.StateReason, reasonCode(v.StateCode)
	}
}

// reasonCode puts our word for a failed build into one that SDKs know.
func reasonCode(code string) string {
	switch code {
	case "Timeout":
		return "FunctionError.InitTimeout"
	case "OutOfMemory":
		return "FunctionError.RuntimeInitError"
	case "InvalidCode":
		return "FunctionError.InvalidEntryPoint"
	case "InitError":
		return "FunctionError.RuntimeInitError"
	default:
		return "InternalError"
	}
}

// listed is how lists show a version.
func (c *functionConfiguration) listed() *functionConfiguration {
	c.State, c.StateReason, c.StateReasonCode = "", "", ""
	c.LastUpdateStatus, c.LastUpdateStatusReason, c.LastUpdateStatusReasonCode = "", "", ""
	return c
}

// settings are the members of CreateFunction and UpdateFunctionConfiguration
// that say how a version runs. nil is "not given".
type settings struct {
	Role             *string
	Runtime          *string
	Handler          *string
	Description      *string
	Timeout          *int64
	MemorySize       *int64
	Environment      *environment
	EphemeralStorage *ephemeralStorage
	TracingConfig    *tracingConfig
	LoggingConfig    *loggingConfig
	SnapStart        *snapStart
	VpcConfig        *vpcConfig

	Layers                 []string
	FileSystemConfigs      []any
	DeadLetterConfig       *struct{ TargetArn string }
	KMSKeyArn              string
	ImageConfig            any
	DurableConfig          any
	CapacityProviderConfig any
}

var envForm = regexp.MustCompile(`^[a-zA-Z]([a-zA-Z0-9_])+$`)

// runtimes are those of the API that we have, and ours.
func runtimes() []string {
	return append([]string{"provided.al2023", "provided.al2"}, blixard.Runtimes()...)
}

// check tells which constraints of the API's model are broken.
func (in *settings) check(v *violations) {
	if in.Role != nil && !roleForm.MatchString(*in.Role) {
		v.pattern("role", *in.Role, rolePattern)
	}
	if in.Environment != nil {
		for _, name := range slices.Sorted(maps.Keys(in.Environment.Variables)) {
			if !slices.Contains(reservedEnv, name) && !envForm.MatchString(name) {
				v.add("environment.variables", "'{"+name+"=…}'", "Map keys must satisfy constraint: [Member must satisfy regular expression pattern: [a-zA-Z]([a-zA-Z0-9_])+]")
			}
		}
	}
	if in.Handler != nil && (len(*in.Handler) > 128 || strings.ContainsAny(*in.Handler, " \t\r\n")) {
		v.pattern("handler", *in.Handler, `[^\s]+`)
	}
	if in.Description != nil && len(*in.Description) > 256 {
		v.length("description", *in.Description, 0, 256)
	}
	if in.MemorySize != nil {
		v.between("memorySize", *in.MemorySize, 128, 10240)
	}
	if in.Timeout != nil {
		v.between("timeout", *in.Timeout, 1, 900)
	}
	if in.EphemeralStorage != nil {
		v.between("ephemeralStorage.size", in.EphemeralStorage.Size, 512, 10240)
	}
	if in.TracingConfig != nil {
		v.oneOf("tracingConfig.mode", in.TracingConfig.Mode, "Active", "PassThrough")
	}
	if in.SnapStart != nil {
		v.oneOf("snapStart.applyOn", in.SnapStart.ApplyOn, "PublishedVersions", "None")
	}
	if in.LoggingConfig != nil {
		v.oneOf("loggingConfig.logFormat", in.LoggingConfig.LogFormat, "JSON", "Text")
	}
}

// refused tells of what was asked and is not there.
func (in *settings) refused(name blixard.FunctionName) error {
	unknown := func(what, instead string) error {
		return invalidParameter("Blixard does not know %s: %s", what, instead)
	}
	if in.Runtime != nil && !slices.Contains(runtimes(), *in.Runtime) {
		return invalidParameter("Value %.64s at 'runtime' failed to satisfy constraint: Member must satisfy enum value set: [%s] or be a valid ARN", *in.Runtime, strings.Join(runtimes(), ", "))
	}
	switch l := in.LoggingConfig; {
	case len(in.Layers) > 0:
		return unknown("layers", "put what the code needs into its zip")
	case in.VpcConfig != nil && len(in.VpcConfig.SubnetIds)+len(in.VpcConfig.SecurityGroupIds) > 0:
		return unknown("VPCs", "leave VpcConfig empty")
	case len(in.FileSystemConfigs) > 0:
		return unknown("file systems of functions", "leave FileSystemConfigs empty")
	case in.DeadLetterConfig != nil && in.DeadLetterConfig.TargetArn != "":
		return unknown("queues and topics as dead-letter targets", "name a function as the destination on failure with PutFunctionEventInvokeConfig")
	case in.KMSKeyArn != "":
		return unknown("KMS keys", "leave KMSKeyArn empty")
	case given(in.ImageConfig):
		return unknown("container images", "use a zip")
	case given(in.DurableConfig):
		return unknown("durable executions", "leave DurableConfig empty")
	case given(in.CapacityProviderConfig):
		return unknown("capacity providers", "leave CapacityProviderConfig empty")
	case in.TracingConfig != nil && in.TracingConfig.Mode == "Active":
		return unknown("X-Ray", "use the tracing mode PassThrough: trace headers are passed to the function")
	case in.SnapStart != nil && in.SnapStart.ApplyOn == "PublishedVersions":
		return unknown("SnapStart as a choice", "all functions start from snapshots")
	case l != nil && (l.LogFormat == "JSON" || l.ApplicationLogLevel != "" || l.SystemLogLevel != ""):
		return unknown("levels and formats of logs", "use the log format Text")
	case l != nil && l.LogGroup != "" && l.LogGroup != logGroup(name):
		return unknown("log groups", "leave LoggingConfig.LogGroup empty: `blixard function logs` shows a function's log")
	}
	return nil
}

// given tells whether a member that is not read was there with something in it.
func given(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case map[string]any:
		for _, inner := range v {
			if given(inner) {
				return true
			}
		}
		return false
	case []any:
		return len(v) > 0
	case string:
		return v != ""
	default:
		return true
	}
}

// reservedEnv are the variables that the runtime sets itself.
var reservedEnv = []string{
	"_HANDLER", "_X_AMZN_TRACE_ID", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_EXECUTION_ENV", "AWS_LAMBDA_FUNCTION_NAME", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
	"AWS_LAMBDA_FUNCTION_VERSION", "AWS_LAMBDA_INITIALIZATION_TYPE", "AWS_LAMBDA_LOG_GROUP_NAME", "AWS_LAMBDA_LOG_STREAM_NAME", "AWS_ACCESS_KEY",
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_LAMBDA_RUNTIME_API", "LAMBDA_TASK_ROOT", "LAMBDA_RUNTIME_DIR",
}

// apply puts what was given into a spec.
func (in *settings) apply(spec *blixard.FunctionSpec) error {
	text := func(to *string, from *string) {
		if from != nil {
			*to = *from
		}
	}
	text(&spec.Role, in.Role)
	text(&spec.Runtime, in.Runtime)
	text(&spec.Handler, in.Handler)
	text(&spec.Description, in.Description)
	if in.Timeout != nil {
		spec.TimeoutMS = *in.Timeout * 1000
	}
	if in.MemorySize != nil && *in.MemorySize != spec.MemoryMiB {
		spec.MemoryMiB, spec.VCPUs = *in.MemorySize, 0 // vCPUs follow memory
	}
	if in.EphemeralStorage != nil {
		spec.EphemeralMiB = in.EphemeralStorage.Size
	}
	if in.Environment != nil {
		spec.Env = nil
		size := 0
		for name, value := range in.Environment.Variables {
			if slices.Contains(reservedEnv, name) {
				return invalidParameter("Lambda was unable to configure your environment variables because the environment variables you have provided contains reserved keys that are currently not supported for modification. Reserved keys used in this request: %s", name)
			}
			size += len(name) + len(value)
			spec.Env = append(spec.Env, blixard.Label{Key: name, Value: value})
		}
		if size > blixard.MaxFunctionEnvBytes {
			return invalidParameter("Lambda was unable to configure your environment variables because the environment variables you have provided exceeded the 4KB limit.")
		}
		slices.SortFunc(spec.Env, func(a, b blixard.Label) int { return strings.Compare(a.Key, b.Key) })
	}
	spec.Defaults()
	if err := spec.CheckNew(); err != nil {
		return err
	}
	return nil
}

// find returns a function with the version that a target means; aliases mean
// their first version. What is being deleted is not there any more.
func (s *Server) find(v *state.View, t target) (*blixard.Function, *blixard.FunctionVersion, error) {
	f := v.Function(t.name)
	if f == nil || f.Deleting {
		return nil, nil, s.notFound(t)
	}
	number, ok := blixard.ParseVersion(t.qualifier)
	if !ok {
		a := f.Alias(t.qualifier)
		if a == nil {
			return nil, nil, s.notFound(t)
		}
		number = a.Number
	}
	fv := v.FunctionVersion(t.name, number)
	if fv == nil {
		return nil, nil, s.notFound(t)
	}
	return f, fv, nil
}
