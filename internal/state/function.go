package state

import (
	"encoding/binary"
	"encoding/hex"
	"hash/fnv"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// Bounds of what a cluster holds.
const (
	MaxFunctions        = 10_000
	MaxVersionsInAll    = 100_000 // of all functions, $LATEST included
	maxStateReasonBytes = 4 << 10
)

// CreateFunction registers a function with its first code as $LATEST, which is
// Pending until a node has built its template. Outcome.Version is the function's
// version, Outcome.Value the number of the version that Publish made.
type CreateFunction struct {
	Name       blixard.FunctionName
	Spec       blixard.FunctionSpec // complete: after Defaults and CheckNew
	CodeDigest string               // 64 lower-case hexadecimal digits
	CodeBytes  int64
	// MaxConcurrent holds when Reserved; else it is blixard.DefaultMaxConcurrent.
	MaxConcurrent int
	Reserved      bool
	Tags          []blixard.Label
	Publish       bool
}

func (m *CreateFunction) kind() uint8 { return 40 }

func (m *CreateFunction) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	codeFunctionSpec(c, &m.Spec)
	wire.String(c, &m.CodeDigest)
	wire.Int(c, &m.CodeBytes)
	wire.Int(c, &m.MaxConcurrent)
	wire.Bool(c, &m.Reserved)
	wire.List(c, &m.Tags, codeLabel)
	wire.Bool(c, &m.Publish)
}

func (m *CreateFunction) apply(tx *txn) (Outcome, *blixard.Error) {
	if err := blixard.CheckFunctionName(string(m.Name)); err != nil {
		return Outcome{}, asError(err)
	}
	if err := checkCode(&m.Spec, m.CodeDigest, m.CodeBytes); err != nil {
		return Outcome{}, err
	}
	if old := tx.t.function(m.Name); old != nil {
		if old.Deleting {
			return Outcome{}, deletingFunction(old)
		}
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeExists, Version: old.Version, Message: "there is a function " + string(m.Name) + " already",
			Hint: "choose another name, or change it with `blixard function update " + string(m.Name) + "`",
		}
	}
	if n := tx.t.functions.Len(); n >= MaxFunctions {
		return Outcome{}, &blixard.Error{Code: blixard.CodeRefused, Message: "there are " + itoa(n) + " functions, the most a cluster holds", Hint: "delete some first"}
	}
	if err := tx.roomForVersions(); err != nil {
		return Outcome{}, err
	}
	f := &blixard.Function{
		Name: m.Name, UID: tx.serial(), Version: tx.serial(), MaxConcurrent: blixard.DefaultMaxConcurrent, Reserved: m.Reserved,
		NextNumber: 1, CreatedMS: tx.nowMS, UpdatedMS: tx.nowMS,
	}
	if m.Reserved {
		f.MaxConcurrent = m.MaxConcurrent
	}
	if err := checkConcurrency(f.MaxConcurrent); err != nil {
		return Outcome{}, err
	}
	if err := checkMinimum(&m.Spec, f); err != nil {
		return Outcome{}, err
	}
	var err *blixard.Error
	if f.Tags, err = checkTags(nil, m.Tags, nil); err != nil {
		return Outcome{}, err
	}
	latest := &blixard.FunctionVersion{
		Function: m.Name, Spec: m.Spec, CodeDigest: m.CodeDigest, CodeBytes: m.CodeBytes, Seq: tx.serial(), RevisionID: tx.revision(0),
		ModifiedMS: tx.nowMS, State: blixard.FunctionPending, StateCode: "Creating", StateReason: "the function is being built",
	}
	out := Outcome{Version: f.Version}
	tx.setVersion(latest)
	tx.event(Event{Kind: "FunctionCreated", Function: m.Name, Message: "created by " + tx.who()})
	if m.Publish {
		out.Value = uint64(tx.publish(f, latest, "").Number)
	}
	tx.setFunction(f)
	return out, nil
}

func checkCode(spec *blixard.FunctionSpec, digest string, bytes int64) *blixard.Error {
	if len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" {
		return blixard.Invalid("code", "", "the code's digest %.80q is not 64 hexadecimal digits", digest)
	}
	if bytes < 0 {
		return blixard.Invalid("code", "", "the code has %d bytes", bytes)
	}
	return asError(spec.Check())
}

func checkConcurrency(n int) *blixard.Error {
	if n < 0 || n > blixard.MaxFunctionConcurrent {
		return blixard.Invalid("maxConcurrent", "0 lets none run", "maxConcurrent is %d; it must be between 0 and %d", n, blixard.MaxFunctionConcurrent)
	}
	return nil
}

// checkMinimum refuses to keep more instances warm than could ever run.
func checkMinimum(s *blixard.FunctionSpec, f *blixard.Function) *blixard.Error {
	if s.MinInstances > 0 && s.MinInstances*s.TargetConcurrency > f.MaxConcurrent {
		return blixard.Invalid("minInstances", "lower it, or raise --concurrent-executions", "minInstances is %d, of %d calls each, and the function may run %d at once", s.MinInstances, s.TargetConcurrency, f.MaxConcurrent)
	}
	return nil
}

func deletingFunction(f *blixard.Function) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeConflict, Field: "deleting", Version: f.Version, Message: "the function " + string(f.Name) + " is still being deleted",
		Hint: "wait until `blixard function list` no longer shows it",
	}
}

// revision is a UUID that no other change has: changes are numbered.
func (tx *txn) revision(part int) string {
	h := fnv.New128a()
	b := append([]byte(tx.t.cluster.ID), 0)
	b = binary.BigEndian.AppendUint64(b, tx.serial())
	h.Write(binary.BigEndian.AppendUint32(b, uint32(part))) // a hash never fails to write
	sum := h.Sum(nil)
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // version 8: of its own making
	s := hex.EncodeToString(sum)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// findFunction returns the function for a change, or the refusal.
func (tx *txn) findFunction(name blixard.FunctionName, expect uint64) (*blixard.Function, *blixard.Error) {
	f := tx.t.function(name)
	switch {
	case f == nil:
		return nil, tx.t.noFunction(name)
	case f.Deleting:
		return nil, deletingFunction(f)
	case expect != 0 && expect != f.Version:
		return nil, &blixard.Error{
			Code: blixard.CodeConflict, Field: "version", Version: f.Version, Message: "the function " + string(name) + " was changed since it was read",
			Hint: "read it again and repeat the change",
		}
	}
	return f, nil
}

func (t *functionTables) noFunction(name blixard.FunctionName) *blixard.Error {
	e := &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no function named " + clip(string(name)), Hint: "`blixard function list` shows them"}
	var names []string
	t.functions.Scan(func(n blixard.FunctionName, _ *blixard.Function) bool {
		names = append(names, string(n))
		return len(names) < maxHintNames
	})
	if near := blixard.Nearest(string(name), names); near != "" {
		e.Hint = "did you mean " + near + "?"
	}
	return e
}

func noVersion(f *blixard.Function, number int) *blixard.Error {
	return &blixard.Error{
		Code: blixard.CodeNotFound, Field: "version", Message: "the function " + string(f.Name) + " has no version " + itoa(number),
		Hint: "`blixard function versions " + string(f.Name) + "` shows them",
	}
}

func noAlias(f *blixard.Function, name string) *blixard.Error {
	e := &blixard.Error{
		Code: blixard.CodeNotFound, Field: "alias", Message: "the function " + string(f.Name) + " has no alias " + clip(name),
		Hint: "`blixard function alias list " + string(f.Name) + "` shows them",
	}
	var names []string
	for i := range f.Aliases {
		names = append(names, f.Aliases[i].Name)
	}
	if near := blixard.Nearest(name, names); near != "" {
		e.Hint = "did you mean " + near + "?"
	}
	return e
}

// checkRevision refuses a change of what changed since it was read; an empty
// want is any.
func checkRevision(want, have string, version uint64) *blixard.Error {
	if want == "" || want == have {
		return nil
	}
	return &blixard.Error{
		Code: blixard.CodeConflict, Field: "revision", Version: version,
		Message: "The Revision Id provided does not match the latest Revision Id. Call the GetFunction/GetAlias API to retrieve the latest Revision Id",
		Hint:    "read it again and repeat the change",
	}
}

// checkBuilt refuses to go on from a $LATEST whose template is being built.
func checkBuilt(latest *blixard.FunctionVersion) *blixard.Error {
	if latest.State != blixard.FunctionPending {
		return nil
	}
	return &blixard.Error{
		Code: blixard.CodeConflict, Field: "state", Message: "an update of the function " + string(latest.Function) + " is under way",
		Hint: "wait until `blixard function describe " + string(latest.Function) + "` shows it active",
	}
}

// UpdateFunction changes code, configuration or both of $LATEST. The former
// active code answers calls until the new template is built, and goes on when
// that fails. Outcome.Value is the number of the version that Publish made.
type UpdateFunction struct {
	Name       blixard.FunctionName
	Spec       *blixard.FunctionSpec // nil: unchanged
	CodeDigest string                // "": unchanged
	CodeBytes  int64
	Revision   string // of $LATEST; "": any
	Publish    bool
}

func (m *UpdateFunction) kind() uint8 { return 41 }

func (m *UpdateFunction) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Optional(c, &m.Spec, codeFunctionSpec)
	wire.String(c, &m.CodeDigest)
	wire.Int(c, &m.CodeBytes)
	wire.String(c, &m.Revision)
	wire.Bool(c, &m.Publish)
}

func (m *UpdateFunction) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	old := tx.t.version(m.Name, 0)
	if err := checkRevision(m.Revision, old.RevisionID, f.Version); err != nil {
		return Outcome{}, err
	}
	if err := checkBuilt(old); err != nil {
		return Outcome{}, err
	}
	next := *old
	if m.Spec != nil {
		next.Spec = *m.Spec
	}
	if m.CodeDigest != "" {
		next.CodeDigest, next.CodeBytes = m.CodeDigest, m.CodeBytes
	}
	if err := checkCode(&next.Spec, next.CodeDigest, next.CodeBytes); err != nil {
		return Outcome{}, err
	}
	if err := checkMinimum(&next.Spec, f); err != nil {
		return Outcome{}, err
	}
	rebuild := old.State != blixard.FunctionActive || next.CodeDigest != old.CodeDigest || !next.Spec.SameTemplate(&old.Spec)
	if !rebuild && functionSpecEqual(&next.Spec, &old.Spec) {
		if m.Publish {
			return tx.publishLatest(f, old, "")
		}
		return Outcome{Version: f.Version, Noop: true}, nil
	}
	if m.Publish {
		if err := tx.roomToPublish(f); err != nil {
			return Outcome{}, err
		}
	}
	next.RevisionID, next.ModifiedMS = tx.revision(0), tx.nowMS
	if rebuild {
		next.Seq, next.State, next.StateCode, next.StateReason = tx.serial(), blixard.FunctionPending, "Creating", "the update is being built"
		next.Builder, next.BuilderEpoch = "", 0
		if old.State == blixard.FunctionActive {
			former := *old
			former.Previous = nil
			next.Previous = &former
		}
	}
	row := *f
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	out := Outcome{Version: row.Version}
	tx.setVersion(&next)
	tx.event(Event{Kind: "FunctionUpdated", Function: m.Name, Message: "updated by " + tx.who()})
	if m.Publish {
		out.Value = uint64(tx.publish(&row, &next, "").Number)
	}
	tx.setFunction(&row)
	return out, nil
}

// functionSpecEqual compares by encoding, to which empty and absent lists are
// alike.
func functionSpecEqual(a, b *blixard.FunctionSpec) bool {
	x, y := wire.Writer(nil), wire.Writer(nil)
	codeFunctionSpec(x, a)
	codeFunctionSpec(y, b)
	return string(x.Bytes()) == string(y.Bytes())
}

// DeleteFunction deletes a whole function, or one published version of it. A
// function goes when no node has slots of it leased any more; until then it is
// Deleting and takes no calls. Its events go at once.
type DeleteFunction struct {
	Name          blixard.FunctionName
	Number        int    // of a version; 0: the whole function
	ExpectVersion uint64 // 0: any
}

func (m *DeleteFunction) kind() uint8 { return 45 }

func (m *DeleteFunction) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Int(c, &m.Number)
	wire.Uint(c, &m.ExpectVersion)
}

func (m *DeleteFunction) apply(tx *txn) (Outcome, *blixard.Error) {
	if f := tx.t.function(m.Name); f != nil && f.Deleting && m.Number == 0 {
		return Outcome{Version: f.Version, Noop: true}, nil
	}
	f, err := tx.findFunction(m.Name, m.ExpectVersion)
	if err != nil {
		return Outcome{}, err
	}
	if m.Number != 0 {
		return m.version(tx, f)
	}
	row := *f
	row.Deleting, row.Version, row.UpdatedMS = true, tx.serial(), tx.nowMS
	tx.setFunction(&row)
	var events []*blixard.AsyncEvent
	under(tx.t.asyncsOf, string(m.Name)+"\x00", func(e *blixard.AsyncEvent) bool { events = append(events, e); return true })
	for _, e := range events {
		tx.dropAsync(e)
	}
	tx.event(Event{Kind: "FunctionDeleted", Function: m.Name, Message: "deleted by " + tx.who()})
	tx.settleDeleted(m.Name)
	return Outcome{Version: row.Version}, nil
}

// version deletes one published version that nothing points to.
func (m *DeleteFunction) version(tx *txn, f *blixard.Function) (Outcome, *blixard.Error) {
	v := tx.t.version(m.Name, m.Number)
	if v == nil || m.Number < 0 {
		return Outcome{}, noVersion(f, m.Number)
	}
	used := ""
	for i := range f.Aliases {
		if a := &f.Aliases[i]; a.Number == m.Number || a.SecondShare > 0 && a.Second == m.Number {
			used = "the alias " + a.Name
		}
	}
	for i := range f.Triggers {
		if f.Triggers[i].Qualifier == blixard.VersionName(m.Number) {
			used = "the trigger " + f.Triggers[i].ID
		}
	}
	if used != "" {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeConflict, Field: "version", Version: f.Version, Message: "version " + itoa(m.Number) + " of " + string(m.Name) + " is used by " + used,
			Hint: "point that to another version first",
		}
	}
	tx.dropVersion(v)
	row := *f
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	dropQualifier(&row, blixard.VersionName(m.Number))
	tx.setFunction(&row)
	tx.event(Event{Kind: "FunctionVersionDeleted", Function: m.Name, Message: "version " + itoa(m.Number) + " deleted by " + tx.who()})
	return Outcome{Version: row.Version}, nil
}

// settleDeleted forgets a function that is being deleted once no node has slots
// of it.
func (tx *txn) settleDeleted(name blixard.FunctionName) {
	f := tx.t.function(name)
	if f == nil || !f.Deleting {
		return
	}
	if n, _ := tx.t.leased.Get(name); n > 0 {
		return
	}
	var slots []*blixard.FunctionSlots
	under(tx.t.slots, string(name)+"\x00", func(s *blixard.FunctionSlots) bool { slots = append(slots, s); return true })
	for _, s := range slots {
		gone := *s
		gone.Short, gone.ShortMS = 0, 0
		tx.setSlots(&gone)
	}
	var versions []*blixard.FunctionVersion
	under(tx.t.versions, string(name)+"\x00", func(v *blixard.FunctionVersion) bool { versions = append(versions, v); return true })
	for _, v := range versions {
		tx.dropVersion(v)
	}
	tx.t.dropFunction(f, tx.index)
	tx.changed(ChangeFunction, f, true)
}

func (tx *txn) setFunction(f *blixard.Function) {
	tx.t.putFunction(f, tx.index)
	tx.changed(ChangeFunction, f, false)
}

func (tx *txn) setVersion(v *blixard.FunctionVersion) {
	tx.t.putVersion(v)
	tx.changed(ChangeFunctionVersion, v, false)
}

func (tx *txn) dropVersion(v *blixard.FunctionVersion) {
	tx.t.dropVersion(v)
	tx.changed(ChangeFunctionVersion, v, true)
}

func (tx *txn) setSlots(s *blixard.FunctionSlots) {
	tx.t.putSlots(s)
	tx.changed(ChangeSlots, s, s.Count == 0 && s.Short == 0)
}

// divergeFunctions leaves out the numbers of versions that may have been given
// away; see Diverge.
func (tx *txn) divergeFunctions() {
	var raised []*blixard.Function
	tx.t.functions.Scan(func(_ blixard.FunctionName, old *blixard.Function) bool {
		f := *old
		f.NextNumber += DivergeBy
		raised = append(raised, &f)
		return true
	})
	for _, f := range raised {
		tx.setFunction(f)
	}
}
