package state

import (
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/wire"
)

// SetFunction changes what holds for all versions of a function: each part that
// is set changes, all or none. Outcome.Version is the function's.
type SetFunction struct {
	Name          blixard.FunctionName
	ExpectVersion uint64 // 0: any

	Concurrency *ConcurrencyChange
	Limits      *LimitsChange
	URL         *URLChange
	DropURL     string // the URL's qualifier; "": none
	Trigger     *blixard.Trigger
	DropTrigger string                   // the trigger's ID; "": none
	Policy      *blixard.PolicyStatement // new: a statement of its ID and qualifier is refused with CodeExists
	DropPolicy  *PolicyRef
	Async       *blixard.AsyncConfig // makes or replaces that of its qualifier
	DropAsync   string               // qualifier; "": none
	SetTags     []blixard.Label
	DropTags    []string
}

// ConcurrencyChange sets how many executions of a function may be at once, or
// goes back to the default.
type ConcurrencyChange struct {
	Max   int
	Clear bool
}

// LimitsChange sets invocations per second; 0 is no limit.
type LimitsChange struct {
	RateLimit   int
	CallerLimit int
}

// URLChange makes or changes the URL of a qualifier. Its ID, which the proposer
// draws, is kept when there is one already.
type URLChange struct {
	URL blixard.FunctionURL
	Put Put
}

// PolicyRef names a statement.
type PolicyRef struct {
	ID        string
	Qualifier string
}

func (m *SetFunction) kind() uint8 { return 46 }

func (m *SetFunction) code(c *wire.Coder) {
	wire.String(c, &m.Name)
	wire.Uint(c, &m.ExpectVersion)
	wire.Optional(c, &m.Concurrency, func(c *wire.Coder, x *ConcurrencyChange) { wire.Int(c, &x.Max); wire.Bool(c, &x.Clear) })
	wire.Optional(c, &m.Limits, func(c *wire.Coder, x *LimitsChange) { wire.Int(c, &x.RateLimit); wire.Int(c, &x.CallerLimit) })
	wire.Optional(c, &m.URL, func(c *wire.Coder, x *URLChange) {
		c.Record(func(c *wire.Coder) { codeURL(c, &x.URL) })
		wire.String(c, &x.Put)
	})
	wire.String(c, &m.DropURL)
	wire.Optional(c, &m.Trigger, codeTrigger)
	wire.String(c, &m.DropTrigger)
	wire.Optional(c, &m.Policy, codePolicy)
	wire.Optional(c, &m.DropPolicy, func(c *wire.Coder, x *PolicyRef) { wire.String(c, &x.ID); wire.String(c, &x.Qualifier) })
	wire.Optional(c, &m.Async, codeAsyncConfig)
	wire.String(c, &m.DropAsync)
	wire.List(c, &m.SetTags, codeLabel)
	wire.Strings(c, &m.DropTags)
}

func (m *SetFunction) apply(tx *txn) (Outcome, *blixard.Error) {
	f, err := tx.findFunction(m.Name, m.ExpectVersion)
	if err != nil {
		return Outcome{}, err
	}
	row := *f
	for _, change := range []func(*txn, *blixard.Function) *blixard.Error{m.limits, m.url, m.trigger, m.policy, m.async, m.tags} {
		if err := change(tx, &row); err != nil {
			return Outcome{}, err
		}
	}
	if functionEqual(f, &row) {
		return Outcome{Version: f.Version, Noop: true}, nil
	}
	row.Version, row.UpdatedMS = tx.serial(), tx.nowMS
	tx.setFunction(&row)
	tx.event(Event{Kind: "FunctionSet", Function: m.Name, Message: m.words() + " changed by " + tx.who()})
	return Outcome{Version: row.Version}, nil
}

// words names the parts of the command.
func (m *SetFunction) words() string {
	var out []string
	for _, w := range []struct {
		is   bool
		word string
	}{
		{m.Concurrency != nil, "concurrency"},
		{m.Limits != nil, "rate limits"},
		{m.URL != nil || m.DropURL != "", "URL"},
		{m.Trigger != nil || m.DropTrigger != "", "triggers"},
		{m.Policy != nil || m.DropPolicy != nil, "policy"},
		{m.Async != nil || m.DropAsync != "", "asynchronous configuration"},
		{len(m.SetTags)+len(m.DropTags) > 0, "tags"},
	} {
		if w.is {
			out = append(out, w.word)
		}
	}
	return strings.Join(out, ", ")
}

// functionEqual compares by encoding, to which empty and absent lists are alike.
func functionEqual(a, b *blixard.Function) bool {
	x, y := wire.Writer(nil), wire.Writer(nil)
	codeFunction(x, a)
	codeFunction(y, b)
	return string(x.Bytes()) == string(y.Bytes())
}

func (m *SetFunction) limits(_ *txn, row *blixard.Function) *blixard.Error {
	if c := m.Concurrency; c != nil {
		row.MaxConcurrent, row.Reserved = c.Max, true
		if c.Clear {
			row.MaxConcurrent, row.Reserved = blixard.DefaultMaxConcurrent, false
		}
		if err := checkConcurrency(row.MaxConcurrent); err != nil {
			return err
		}
	}
	if l := m.Limits; l != nil {
		const most = 10_000_000
		if l.RateLimit < 0 || l.RateLimit > most || l.CallerLimit < 0 || l.CallerLimit > most {
			return blixard.Invalid("rateLimit", "0 is no limit", "a rate limit is not between 0 and %d invocations per second", most)
		}
		row.RateLimit, row.CallerLimit = l.RateLimit, l.CallerLimit
	}
	return nil
}

// qualifier refuses one that is not there, and gives it its one form.
func (tx *txn) qualifier(f *blixard.Function, q string) (string, *blixard.Error) {
	if err := blixard.CheckQualifier(q); err != nil {
		return "", asError(err)
	}
	n, isVersion := blixard.ParseVersion(q)
	switch {
	case isVersion && tx.t.version(f.Name, n) == nil:
		return "", noVersion(f, n)
	case isVersion:
		return blixard.VersionName(n), nil
	case f.Alias(q) == nil:
		return "", noAlias(f, q)
	}
	return q, nil
}

func (m *SetFunction) url(tx *txn, row *blixard.Function) *blixard.Error {
	if m.DropURL != "" {
		if row.URL(m.DropURL) == nil {
			return &blixard.Error{Code: blixard.CodeNotFound, Field: "url", Message: "the function " + string(row.Name) + " has no URL for " + clip(m.DropURL)}
		}
		row.URLs = tidyList(slices.DeleteFunc(slices.Clone(row.URLs), func(u blixard.FunctionURL) bool { return u.Qualifier == m.DropURL }))
	}
	if m.URL == nil {
		return nil
	}
	u := m.URL.URL
	q, err := tx.qualifier(row, u.Qualifier)
	if err != nil {
		return err
	}
	if n, ok := blixard.ParseVersion(q); ok && n != 0 {
		return blixard.Invalid("qualifier", "make an alias for it", "a URL belongs to $LATEST or to an alias, not to version %d", n)
	}
	u.Qualifier, u.CreatedMS, u.ModifiedMS = q, tx.nowMS, tx.nowMS
	old := row.URL(q)
	switch {
	case old != nil && m.URL.Put == PutNew:
		return &blixard.Error{Code: blixard.CodeExists, Field: "url", Version: row.Version, Message: "the function " + string(row.Name) + " has a URL for " + q + " already"}
	case old == nil && m.URL.Put == PutReplace:
		return &blixard.Error{Code: blixard.CodeNotFound, Field: "url", Message: "the function " + string(row.Name) + " has no URL for " + q}
	case old != nil:
		u.ID, u.CreatedMS = old.ID, old.CreatedMS
	}
	if err := checkURL(&u); err != nil {
		return err
	}
	if owner, taken := tx.t.urls.Get(u.ID); taken && (old == nil || owner != row.Name) {
		return blixard.Errorf(blixard.CodeExists, "the URL's ID %s is taken", u.ID)
	}
	row.URLs = slices.DeleteFunc(slices.Clone(row.URLs), func(x blixard.FunctionURL) bool { return x.Qualifier == q })
	if len(row.URLs) >= blixard.MaxFunctionURLs {
		return blixard.Errorf(blixard.CodeRefused, "the function %s has %d URLs, the most it may", row.Name, len(row.URLs))
	}
	row.URLs = append(row.URLs, u)
	slices.SortFunc(row.URLs, func(a, b blixard.FunctionURL) int { return strings.Compare(a.Qualifier, b.Qualifier) })
	return nil
}

func checkURL(u *blixard.FunctionURL) *blixard.Error {
	if u.ID == "" || len(u.ID) > 63 || strings.Trim(u.ID, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return blixard.Invalid("url", "", "the URL's ID %.70q is not 1 to 63 lower-case letters and digits", u.ID)
	}
	if u.Auth != "NONE" && u.Auth != "AWS_IAM" {
		return blixard.Invalid("authType", "known: NONE, AWS_IAM", "the URL's authentication %.40q is not known", u.Auth)
	}
	if u.InvokeMode != "BUFFERED" && u.InvokeMode != "RESPONSE_STREAM" {
		return blixard.Invalid("invokeMode", "known: BUFFERED, RESPONSE_STREAM", "the URL's invoke mode %.40q is not known", u.InvokeMode)
	}
	if x := u.CORS; x != nil {
		if x.MaxAgeSeconds < 0 || x.MaxAgeSeconds > 86_400 {
			return blixard.Invalid("cors", "", "the CORS maximum age is %d s; it must be between 0 and 86,400", x.MaxAgeSeconds)
		}
		for _, list := range [][]string{x.AllowHeaders, x.AllowMethods, x.AllowOrigins, x.ExposeHeaders} {
			if len(list) > 100 || slices.ContainsFunc(list, func(s string) bool { return len(s) > 1024 || strings.ContainsAny(s, "\r\n\x00") }) {
				return blixard.Invalid("cors", "", "a list of the CORS configuration is too long or holds what no header may")
			}
		}
	}
	return nil
}

func (m *SetFunction) trigger(tx *txn, row *blixard.Function) *blixard.Error {
	drop := func(id string) bool {
		n := len(row.Triggers)
		row.Triggers = tidyList(slices.DeleteFunc(slices.Clone(row.Triggers), func(t blixard.Trigger) bool { return t.ID == id }))
		return len(row.Triggers) < n
	}
	if m.DropTrigger != "" && !drop(m.DropTrigger) {
		return &blixard.Error{
			Code: blixard.CodeNotFound, Field: "trigger", Message: "the function " + string(row.Name) + " has no trigger " + clip(m.DropTrigger),
			Hint: "`blixard function describe " + string(row.Name) + "` shows them",
		}
	}
	if m.Trigger == nil {
		return nil
	}
	t := *m.Trigger
	var err *blixard.Error
	if t.Qualifier, err = tx.qualifier(row, t.Qualifier); err != nil {
		return err
	}
	if err := checkTrigger(&t); err != nil {
		return err
	}
	t.CreatedMS = tx.nowMS
	if at := slices.IndexFunc(row.Triggers, func(x blixard.Trigger) bool { return x.ID == t.ID }); at >= 0 {
		t.CreatedMS = row.Triggers[at].CreatedMS
	}
	drop(t.ID)
	if len(row.Triggers) >= blixard.MaxFunctionTriggers {
		return blixard.Errorf(blixard.CodeRefused, "the function %s has %d triggers, the most it may", row.Name, len(row.Triggers))
	}
	if err := tx.checkRoute(row, &t); err != nil {
		return err
	}
	row.Triggers = append(row.Triggers, t)
	slices.SortFunc(row.Triggers, func(a, b blixard.Trigger) int { return strings.Compare(a.ID, b.ID) })
	return nil
}

// checkRoute refuses a trigger whose requests another one takes.
func (tx *txn) checkRoute(row *blixard.Function, t *blixard.Trigger) *blixard.Error {
	clash := func(f *blixard.Function) *blixard.Error {
		for i := range f.Triggers {
			x := &f.Triggers[i]
			if x.Path != t.Path || !strings.EqualFold(x.Host, t.Host) {
				continue
			}
			if len(x.Methods) == 0 || len(t.Methods) == 0 || slices.ContainsFunc(x.Methods, func(m string) bool { return slices.Contains(t.Methods, m) }) {
				return &blixard.Error{
					Code: blixard.CodeExists, Field: "trigger", Message: "the path " + t.Path + " is taken by the trigger " + x.ID + " of " + string(f.Name),
					Hint: "choose another path, host or method, or delete that trigger",
				}
			}
		}
		return nil
	}
	err := clash(row)
	tx.t.functions.Scan(func(_ blixard.FunctionName, f *blixard.Function) bool {
		if err == nil && f.Name != row.Name && !f.Deleting {
			err = clash(f)
		}
		return err == nil
	})
	return err
}

// triggerMethods are the methods that a trigger may name.
func triggerMethods() []string {
	return []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
}

func checkTrigger(t *blixard.Trigger) *blixard.Error {
	if t.ID == "" || len(t.ID) > 64 || blixard.CheckLabelKey(t.ID) != nil {
		return blixard.Invalid("trigger", "", "the trigger's ID %.70q is not usable", t.ID)
	}
	if t.Kind != "http" {
		return blixard.Invalid("trigger", "known: http", "the kind of trigger %.40q is not known", t.Kind)
	}
	const hint = `write such as --path /api/process or --path "/api/*"`
	if !strings.HasPrefix(t.Path, "/") || len(t.Path) > 512 {
		return blixard.Invalid("path", hint, "the path %.60q does not begin with /, or is too long", t.Path)
	}
	segments := strings.Split(t.Path[1:], "/")
	for i, s := range segments {
		last := i == len(segments)-1
		if s == "" && !last || s == "." || s == ".." || strings.ContainsAny(s, "?#\\\x00 \t\r\n") {
			return blixard.Invalid("path", hint, "the path %.60q has the segment %.40q", t.Path, s)
		}
		all := s == "*" || strings.HasPrefix(s, "{") && strings.HasSuffix(s, "+}")
		if strings.ContainsAny(s, "*{}") && (!all || !last) {
			return blixard.Invalid("path", `only a last segment "*" or "{proxy+}" takes all below`, "the path %.60q has the segment %.40q", t.Path, s)
		}
	}
	for i, m := range t.Methods {
		if !slices.Contains(triggerMethods(), m) || slices.Contains(t.Methods[:i], m) {
			return blixard.Invalid("methods", "known, each once: "+strings.Join(triggerMethods(), ", "), "the method %.20q is not usable", m)
		}
	}
	if len(t.Host) > 253 || strings.ContainsAny(t.Host, "/:?#@ \x00\r\n") {
		return blixard.Invalid("host", "write a host name without port", "the host %.60q is not usable", t.Host)
	}
	return nil
}

func (m *SetFunction) policy(tx *txn, row *blixard.Function) *blixard.Error {
	if d := m.DropPolicy; d != nil {
		q := d.Qualifier
		if q == "" {
			q = blixard.Latest
		}
		n := len(row.Policy)
		row.Policy = tidyList(slices.DeleteFunc(slices.Clone(row.Policy), func(p blixard.PolicyStatement) bool { return p.ID == d.ID && p.Qualifier == q }))
		if len(row.Policy) == n {
			return &blixard.Error{Code: blixard.CodeNotFound, Field: "policy", Message: "the function " + string(row.Name) + " has no statement " + clip(d.ID) + " for " + clip(q)}
		}
	}
	if m.Policy == nil {
		return nil
	}
	p := *m.Policy
	var err *blixard.Error
	if p.Qualifier, err = tx.qualifier(row, p.Qualifier); err != nil {
		return err
	}
	if p.ID == "" || len(p.ID) > 100 || strings.ContainsAny(p.ID, "\x00\r\n") {
		return blixard.Invalid("statementId", "", "the statement's ID %.40q is not usable", p.ID)
	}
	size := len(p.JSON)
	for i := range row.Policy {
		if row.Policy[i].ID == p.ID && row.Policy[i].Qualifier == p.Qualifier {
			return &blixard.Error{Code: blixard.CodeExists, Field: "policy", Version: row.Version, Message: "The statement id (" + p.ID + ") provided already exists. Please provide a new statement id, or remove the existing statement."}
		}
		size += len(row.Policy[i].JSON)
	}
	if len(row.Policy) >= blixard.MaxFunctionPolicies || size > blixard.MaxPolicyBytes {
		return blixard.Invalid("policy", "remove statements first", "the policy of %s would be larger than %d statements and %d bytes", row.Name, blixard.MaxFunctionPolicies, blixard.MaxPolicyBytes)
	}
	row.Policy = append(slices.Clone(row.Policy), p)
	slices.SortStableFunc(row.Policy, func(a, b blixard.PolicyStatement) int { return strings.Compare(a.ID, b.ID) })
	return nil
}

func (m *SetFunction) async(tx *txn, row *blixard.Function) *blixard.Error {
	without := func(q string) []blixard.AsyncConfig {
		return tidyList(slices.DeleteFunc(slices.Clone(row.Async), func(a blixard.AsyncConfig) bool { return a.Qualifier == q }))
	}
	if m.DropAsync != "" {
		n := len(row.Async)
		if row.Async = without(m.DropAsync); len(row.Async) == n {
			return &blixard.Error{Code: blixard.CodeNotFound, Field: "async", Message: "the function " + string(row.Name) + " has no asynchronous configuration for " + clip(m.DropAsync)}
		}
	}
	if m.Async == nil {
		return nil
	}
	a := *m.Async
	var err *blixard.Error
	if a.Qualifier, err = tx.qualifier(row, a.Qualifier); err != nil {
		return err
	}
	switch {
	case a.MaxRetries < 0 || a.MaxRetries > 2:
		return blixard.Invalid("maxRetries", "", "maxRetries is %d; it must be between 0 and 2", a.MaxRetries)
	case a.MaxAgeMS < 60_000 || a.MaxAgeMS > 21_600_000:
		return blixard.Invalid("maxEventAge", "", "maxEventAge is %d ms; it must be between 60,000 and 21,600,000", a.MaxAgeMS)
	case len(a.OnSuccess) > 350 || len(a.OnFailure) > 350:
		return blixard.Invalid("destination", "name a function", "a destination is too long")
	case len(row.Async) >= blixard.MaxFunctionURLs+blixard.MaxFunctionVersions:
		return blixard.Errorf(blixard.CodeRefused, "the function %s has %d asynchronous configurations, the most it may", row.Name, len(row.Async))
	}
	a.ModifiedMS = tx.nowMS
	row.Async = append(without(a.Qualifier), a)
	slices.SortFunc(row.Async, func(a, b blixard.AsyncConfig) int { return strings.Compare(a.Qualifier, b.Qualifier) })
	return nil
}

func (m *SetFunction) tags(_ *txn, row *blixard.Function) *blixard.Error {
	if len(m.SetTags)+len(m.DropTags) == 0 {
		return nil
	}
	tags, err := checkTags(row.Tags, m.SetTags, m.DropTags)
	if err == nil {
		row.Tags = tags
	}
	return err
}

// checkTags is old with some set and some dropped, sorted by key.
func checkTags(old, set []blixard.Label, drop []string) ([]blixard.Label, *blixard.Error) {
	for _, t := range set {
		if t.Key == "" || len(t.Key) > 128 || len(t.Value) > 256 || strings.ContainsAny(t.Key+t.Value, "\x00\r\n") {
			return nil, blixard.Invalid("tags", "keys have 1 to 128 bytes, values at most 256", "the tag %.40q is not usable", t.Key)
		}
	}
	var out []blixard.Label
	for _, list := range [][]blixard.Label{old, set} {
		for _, t := range list {
			out = slices.DeleteFunc(out, func(x blixard.Label) bool { return x.Key == t.Key })
			out = append(out, t)
		}
	}
	out = slices.DeleteFunc(out, func(x blixard.Label) bool { return slices.Contains(drop, x.Key) })
	if len(out) > blixard.MaxFunctionTags {
		return nil, blixard.Invalid("tags", "", "%d tags; at most %d are allowed", len(out), blixard.MaxFunctionTags)
	}
	slices.SortFunc(out, func(a, b blixard.Label) int { return strings.Compare(a.Key, b.Key) })
	return tidyList(out), nil
}
