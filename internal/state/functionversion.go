package state

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// PublishVersion makes a version of $LATEST that never changes. It is built
// anew, since it tells its code its own number. When neither code nor
// configuration changed since the newest version, that one is the answer
// (Outcome.Noop). Outcome.Value is the number.
type PublishVersion struct {
	Name        blixard.FunctionName
	Description string // "": that of $LATEST
	CodeDigest  string // refuses unless $LATEST has it; "": any
	Revision    string // of $LATEST; "": any
}

func (m *PublishVersion) kind() uint8 { return 42 }

func (m *PublishVersion) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.String(c, &m.Description)
	wire.String(c, &m.CodeDigest)
	wire.String(c, &m.Revision)
}

func (m *PublishVersion) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Name, 0)
	if err != nil {
		return Outcome{}, err
	}
	latest := tx.t.version(m.Name, 0)
	if err := checkRevision(m.Revision, latest.RevisionID, f.Version); err != nil {
		return Outcome{}, err
	}
	if m.CodeDigest != "" && m.CodeDigest != latest.CodeDigest {
		return Outcome{}, blixard.Invalid("code", "read it again", "the code of %s has the SHA-256 %s, not %.64s", m.Name, latest.CodeDigest, m.CodeDigest)
	}
	if err := checkBuilt(latest); err != nil {
		return Outcome{}, err
	}
	if latest.State == blixard.FunctionFailed {
		return Outcome{}, &blixard.Error{
			Code: blixard.CodeConflict, Field: "state", Version: f.Version, Message: "the last update of " + string(m.Name) + " failed: " + latest.StateReason,
			Hint: "update the function with code that works first",
		}
	}
	return tx.publishLatest(f, latest, m.Description)
}

// publishLatest publishes unless nothing changed since the newest version.
func (tx *txn) publishLatest(f *blixard.Function, latest *blixard.FunctionVersion, description string) (Outcome, *blixard.Error) {
	if newest := tx.t.newestVersion(f.Name); newest != nil && newest.State != blixard.FunctionFailed && newest.CodeDigest == latest.CodeDigest {
		a, b := newest.Spec, latest.Spec
		if a.Description, b.Description = "", ""; functionSpecEqual(&a, &b) {
			return Outcome{Version: f.Version, Value: uint64(newest.Number), Noop: true}, nil
		}
	}
	if err := tx.roomToPublish(f); err != nil {
		return Outcome{}, err
	}
	row := *f
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	v := tx.publish(&row, latest, description)
	tx.setFunction(&row)
	return Outcome{Version: row.Version, Value: uint64(v.Number)}, nil
}

func (tx *txn) roomToPublish(f *blixard.Function) *blixard.Error {
	n := 0
	under(tx.t.versions, string(f.Name)+"\x00", func(*blixard.FunctionVersion) bool { n++; return n <= blixard.MaxFunctionVersions })
	if n > blixard.MaxFunctionVersions {
		return &blixard.Error{
			Code: blixard.CodeRefused, Version: f.Version, Message: "the function " + string(f.Name) + " has " + itoa(blixard.MaxFunctionVersions) + " versions, the most it may",
			Hint: "delete some with `blixard function delete " + string(f.Name) + " --version NUMBER`",
		}
	}
	return tx.roomForVersions()
}

func (tx *txn) roomForVersions() *blixard.Error {
	if n := tx.t.versions.Len(); n+2 > MaxVersionsInAll {
		return &blixard.Error{Code: blixard.CodeRefused, Message: "the cluster holds " + itoa(n) + " versions of functions, the most it may", Hint: "delete some first"}
	}
	return nil
}

// publish stores a version made of $LATEST and counts in the row that the caller
// stores. What it was made of must have left its event already: two changes must
// not have one number.
func (tx *txn) publish(row *blixard.Function, latest *blixard.FunctionVersion, description string) *blixard.FunctionVersion {
	v := *latest
	v.Number, v.Previous, v.Builder, v.BuilderEpoch = row.NextNumber, nil, "", 0
	v.Seq, v.RevisionID, v.ModifiedMS = tx.serial(), tx.revision(row.NextNumber), tx.nowMS
	v.State, v.StateCode, v.StateReason = blixard.FunctionPending, "Creating", "the version is being built"
	if description != "" {
		v.Spec.Description = description
	}
	row.NextNumber++
	tx.setVersion(&v)
	tx.event(Event{Kind: "FunctionPublished", Function: row.Name, Message: "version " + itoa(v.Number) + " published by " + tx.who()})
	return &v
}

// Put says what a change expects to find.
type Put string

// What a change may expect to find.
const (
	PutAny     Put = ""        // makes or replaces
	PutNew     Put = "new"     // refuses with CodeExists if it is there
	PutReplace Put = "replace" // refuses with CodeNotFound if it is not
)

// SetAlias makes an alias or points it elsewhere. Outcome.Version is the
// alias's.
type SetAlias struct {
	Function blixard.FunctionName
	// Alias is what it is to be; its RevisionID and Version are not looked at.
	Alias    blixard.FunctionAlias
	Put      Put
	Revision string // of the alias; "": any
}

func (m *SetAlias) kind() uint8 { return 43 }

func (m *SetAlias) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	c.Record(func(c *wire.Coder) { codeAlias(c, &m.Alias) })
	wire.String(c, &m.Put)
	wire.String(c, &m.Revision)
}

func (m *SetAlias) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Function, 0)
	if err != nil {
		return Outcome{}, err
	}
	a := m.Alias
	if err := tx.checkAlias(f, &a); err != nil {
		return Outcome{}, err
	}
	old := f.Alias(a.Name)
	switch {
	case old != nil && m.Put == PutNew:
		return Outcome{}, &blixard.Error{Code: blixard.CodeExists, Field: "alias", Version: old.Version, Message: "the function " + string(f.Name) + " has an alias " + a.Name + " already"}
	case old == nil && m.Put == PutReplace, old == nil && m.Revision != "":
		return Outcome{}, noAlias(f, a.Name)
	case old == nil && len(f.Aliases) >= blixard.MaxFunctionAliases:
		return Outcome{}, &blixard.Error{Code: blixard.CodeRefused, Field: "alias", Message: "the function " + string(f.Name) + " has " + itoa(len(f.Aliases)) + " aliases, the most it may"}
	}
	if old != nil {
		if err := checkRevision(m.Revision, old.RevisionID, old.Version); err != nil {
			return Outcome{}, err
		}
		a.RevisionID, a.Version = old.RevisionID, old.Version
		if a == *old {
			return Outcome{Version: old.Version, Noop: true}, nil
		}
	}
	a.RevisionID, a.Version = tx.revision(0), tx.serial()
	row := *f
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	row.Aliases = slices.DeleteFunc(slices.Clone(f.Aliases), func(x blixard.FunctionAlias) bool { return x.Name == a.Name })
	row.Aliases = append(row.Aliases, a)
	slices.SortFunc(row.Aliases, func(a, b blixard.FunctionAlias) int { return strings.Compare(a.Name, b.Name) })
	tx.setFunction(&row)
	to := "to " + blixard.VersionName(a.Number)
	if a.SecondShare > 0 {
		to += ", " + percent(a.SecondShare) + " to " + blixard.VersionName(a.Second)
	}
	tx.event(Event{Kind: "FunctionAlias", Function: f.Name, Message: a.Name + " points " + to + ", by " + tx.who()})
	return Outcome{Version: a.Version}, nil
}

// percent writes millionths.
func percent(millionths int) string {
	text := itoa(millionths / 10_000)
	if rest := millionths % 10_000; rest != 0 {
		text += "." + strings.TrimRight(itoa(10_000 + rest)[1:], "0")
	}
	return text + "%"
}

// checkAlias refuses an alias that points to what is not there, and tidies it.
func (tx *txn) checkAlias(f *blixard.Function, a *blixard.FunctionAlias) *blixard.Error {
	if err := blixard.CheckAliasName(a.Name); err != nil {
		return asError(err)
	}
	if len(a.Description) > 256 {
		return blixard.Invalid("description", "", "the alias's description is %d bytes long; at most 256 are allowed", len(a.Description))
	}
	if a.SecondShare < 0 || a.SecondShare > 1_000_000 {
		return blixard.Invalid("weight", "write a share between 0 and 1, such as 3=0.1", "the share %d is not between 0 and 1,000,000 millionths", a.SecondShare)
	}
	if a.SecondShare == 0 {
		a.Second = 0
	} else if a.Number == 0 || a.Second == 0 || a.Number == a.Second {
		return blixard.Invalid("weight", "publish what is new first with `blixard function publish`", "an alias with weights points to two different published versions")
	}
	for _, n := range []int{a.Number, a.Second} {
		if n < 0 || tx.t.version(f.Name, n) == nil {
			return noVersion(f, n)
		}
	}
	return nil
}

// DeleteAlias deletes an alias, with its URL, policy and asynchronous
// configuration. A trigger that uses it is refused.
type DeleteAlias struct {
	Function blixard.FunctionName
	Name     string
	Revision string // "": any
}

func (m *DeleteAlias) kind() uint8 { return 44 }

func (m *DeleteAlias) code(c *wire.Coder) {
	wire.String(c, &m.Function)
	wire.String(c, &m.Name)
	wire.String(c, &m.Revision)
}

func (m *DeleteAlias) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Function, 0)
	if err != nil {
		return Outcome{}, err
	}
	old := f.Alias(m.Name)
	if old == nil {
		return Outcome{}, noAlias(f, m.Name)
	}
	if err := checkRevision(m.Revision, old.RevisionID, old.Version); err != nil {
		return Outcome{}, err
	}
	for i := range f.Triggers {
		if f.Triggers[i].Qualifier == m.Name {
			return Outcome{}, &blixard.Error{
				Code: blixard.CodeConflict, Field: "alias", Version: old.Version, Message: "the trigger " + f.Triggers[i].ID + " of " + string(f.Name) + " uses the alias " + m.Name,
				Hint: "delete that trigger first",
			}
		}
	}
	row := *f
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	row.Aliases = tidyList(slices.DeleteFunc(slices.Clone(f.Aliases), func(x blixard.FunctionAlias) bool { return x.Name == m.Name }))
	dropQualifier(&row, m.Name)
	tx.setFunction(&row)
	tx.event(Event{Kind: "FunctionAlias", Function: f.Name, Message: m.Name + " deleted by " + tx.who()})
	return Outcome{Version: row.Version}, nil
}

// dropQualifier takes what a row says of a qualifier that goes.
func dropQualifier(row *blixard.Function, q string) {
	row.URLs = tidyList(slices.DeleteFunc(slices.Clone(row.URLs), func(u blixard.FunctionURL) bool { return u.Qualifier == q }))
	row.Async = tidyList(slices.DeleteFunc(slices.Clone(row.Async), func(a blixard.AsyncConfig) bool { return a.Qualifier == q }))
	row.Policy = tidyList(slices.DeleteFunc(slices.Clone(row.Policy), func(p blixard.PolicyStatement) bool { return p.Qualifier == q }))
}

// tidyList gives an empty list the form it has after a snapshot was restored.
func tidyList[T any](list []T) []T {
	if len(list) == 0 {
		return nil
	}
	return list
}
