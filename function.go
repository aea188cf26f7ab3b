package blixard

// FunctionName names a function: 1 to 64 letters, digits, '-' and '_', as the
// Lambda API has it.
type FunctionName string

// Function is what the user wants of a function, and what the leader remembers
// of it. Its code and configuration are in versions; what is here holds for all
// of them.
type Function struct {
	Name FunctionName
	// UID is the version of the state it was created with: never reused.
	UID uint64

	// By the user.
	MaxConcurrent int  // executions at once in the whole cluster, of all versions together; 0: none may run
	Reserved      bool // MaxConcurrent was chosen by the user
	Aliases       []FunctionAlias
	Async         []AsyncConfig // by qualifier; none: the defaults
	URLs          []FunctionURL // by qualifier
	Triggers      []Trigger
	Policy        []PolicyStatement
	Tags          []Label
	RateLimit     int // invocations per second in the whole cluster; 0: no limit
	CallerLimit   int // invocations per second of one caller; 0: no limit

	// NextNumber is the number of the next version that is published; never reused.
	NextNumber int
	// Deleting: no call is taken any more; it goes when no slot is leased.
	Deleting  bool
	Version   uint64 // grows with each change
	CreatedMS int64
	UpdatedMS int64
}

// FunctionVersion is code with its configuration. Number 0 is $LATEST, which the
// user changes; a published one never changes.
type FunctionVersion struct {
	Function FunctionName
	Number   int
	Spec     FunctionSpec
	// CodeDigest is the SHA-256 of the code's zip, 64 hexadecimal digits.
	CodeDigest string
	CodeBytes  int64 // of the zip
	// Seq grows with each change of code or configuration, also in $LATEST: with
	// the function's UID it names what a template is made of.
	Seq        uint64
	RevisionID string // changes with each change; a UUID
	ModifiedMS int64

	// By the leader: the node that builds the first template, and its epoch.
	Builder      NodeName
	BuilderEpoch uint64
	// Observed by the builder.
	State       FunctionState
	StateReason string // why it failed, in words
	// StateCode is the machine's word for it: Creating, InvalidCode, InitError,
	// Timeout, OutOfMemory, Capacity, Internal.
	StateCode string
	// Active stays true when an update of $LATEST fails: the former code, kept
	// in Previous, answers calls until the new one is ready.
	Previous *FunctionVersion
}

// FunctionState is whether a version can be called.
type FunctionState string

// States of a version.
const (
	FunctionPending FunctionState = "Pending" // its template is being built
	FunctionActive  FunctionState = "Active"
	FunctionFailed  FunctionState = "Failed"
)

// FunctionSpec is the configuration of a version.
type FunctionSpec struct {
	Description string
	// Runtime is "nix", "bootstrap" (also "provided.al2023" and "provided.al2" of
	// the Lambda API), "http" or "wasm".
	Runtime      string
	Handler      string   // nix: file[.attribute]; bootstrap: passed as _HANDLER; http: the command; wasm: the module
	Architecture string   // "x86_64"
	Command      []string // http: what to start; empty: the executable of the code
	Port         int      // http: where the server listens; default 8080
	MemoryMiB    int64    // 64..10240
	VCPUs        int
	TimeoutMS    int64 // of one invocation, 1..900,000
	InitMS       int64 // what initialisation may take natively; 10,000 by default
	Env          []Label
	EphemeralMiB int64  // of /tmp
	Network      string // "user" (default), "none"

	TargetConcurrency int    // invocations at once in one instance; 1
	MinInstances      int    // kept warm in the whole cluster
	MaxInstances      int    // 0: as many as MaxConcurrent needs
	ScaleDownDelayMS  int64  // an idle instance is kept so long
	Burst             int    // instances that may be starting at once, in the whole cluster; 0: no limit
	RecycleCalls      int    // an instance ends after so many calls; 0: 10,000
	Snapshot          string // "on" (default): instances are clones of a template; "off": each boots
	Placement         FunctionPlacement

	// Role is what clients of the Lambda API gave as the execution role. They want
	// it back; nothing here reads it.
	Role string
}

// FunctionPlacement says where invocations run. Any node that fits may.
type FunctionPlacement struct {
	Strategies  []string // best-fit, data-locality, network-proximity, load-balanced; none: all four parts weighted
	Constraints []Constraint
	Preferences []Preference
	DataHints   []string // "ceph-pool:raw-data", "node:node2", "zone:a", "path:/data"
}

// FunctionAlias is a name for a version, and may send a share of the calls to
// another.
type FunctionAlias struct {
	Name        string
	Description string
	Number      int
	// Second gets SecondShare millionths of the calls; 0 shares: none.
	Second      int
	SecondShare int
	RevisionID  string
	Version     uint64
}

// AsyncConfig is what becomes of asynchronous invocations of a qualifier.
type AsyncConfig struct {
	Qualifier  string // "$LATEST", a number or an alias
	MaxRetries int    // after function errors: 0..2
	MaxAgeMS   int64  // 60,000..21,600,000
	OnSuccess  string // a function's name or ARN; "" for none
	OnFailure  string // the same; "dead-letters" keeps it for `function events`
	ModifiedMS int64
}

// FunctionURL is an address of its own for a function.
type FunctionURL struct {
	Qualifier  string
	ID         string // the first label of its host name
	Auth       string // NONE, AWS_IAM
	InvokeMode string // BUFFERED, RESPONSE_STREAM
	CORS       *CORS
	CreatedMS  int64
	ModifiedMS int64
}

// CORS is what browsers are told.
type CORS struct {
	AllowCredentials bool
	AllowHeaders     []string
	AllowMethods     []string
	AllowOrigins     []string
	ExposeHeaders    []string
	MaxAgeSeconds    int
}

// Trigger makes something call a function.
type Trigger struct {
	ID        string
	Kind      string // "http"
	Qualifier string
	Path      string   // "/api/process-image"; a last segment "{proxy+}" or "*" takes all below
	Methods   []string // none: all
	Host      string   // "": any
	CreatedMS int64
}

// PolicyStatement allows somebody to invoke.
type PolicyStatement struct {
	ID        string
	Qualifier string
	JSON      string // as the Lambda API has it
}

// FunctionSlots are the executions that a node may run at once, leased to it.
type FunctionSlots struct {
	Function  FunctionName
	Node      NodeName
	NodeEpoch uint64
	Count     int
	// Short is how many more the node asked for last and did not get, at ShortMS:
	// others give back what lies idle.
	Short   int
	ShortMS int64
}

// AsyncEvent is an asynchronous invocation that was accepted and has not ended.
type AsyncEvent struct {
	ID          string // the request ID, the same in all attempts
	Function    FunctionName
	Qualifier   string
	Payload     []byte
	Context     string   // client context, trace: opaque to the state
	Owner       NodeName // the node that makes the attempts
	OwnerEpoch  uint64
	Attempts    int // that ended in a function error
	Tries       int // of all kinds
	NotBeforeMS int64
	AcceptedMS  int64
	MaxRetries  int
	MaxAgeMS    int64
	// Hops is how many destinations led to it one after another; see MaxEventHops.
	Hops      int
	LastError string
	// Dead: it has failed for good and is kept for a look or a replay.
	Dead      bool
	Condition string // why: RetriesExhausted, EventAgeExceeded, ZeroReservedConcurrency
	DeadMS    int64
}

// AccessKey lets programs sign requests as AWS clients do.
type AccessKey struct {
	ID        string // "BLXA" and 16 letters or digits
	Name      string
	Role      string
	CreatedMS int64
	ExpiresMS int64 // 0: never
	RevokedMS int64
}
