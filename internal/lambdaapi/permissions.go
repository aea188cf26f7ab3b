package lambdaapi

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// statement is one of a policy, in the order in which AWS writes its members.
// Blixard keeps and shows policies; who may call is decided by access keys.
type statement struct {
	Sid       string
	Effect    string
	Principal any
	Action    string
	Resource  string
	Condition map[string]map[string]string `json:",omitempty"`
}

type permissionInput struct {
	StatementId, Action, Principal           *string
	SourceArn, SourceAccount, PrincipalOrgID string
	EventSourceToken, FunctionUrlAuthType    string
	InvokedViaFunctionUrl                    *bool
	RevisionId                               string
}

func (in *permissionInput) check() error {
	var v violations
	for _, m := range []struct {
		field string
		value *string
	}{{"statementId", in.StatementId}, {"action", in.Action}, {"principal", in.Principal}} {
		if m.value == nil {
			v.missing(m.field)
		}
	}
	if in.StatementId != nil {
		checkSid(&v, *in.StatementId)
	}
	if in.Action != nil && !validAction(*in.Action) {
		v.pattern("action", *in.Action, `(lambda:[*]|lambda:[a-zA-Z]+|[*])`)
	}
	v.oneOf("functionUrlAuthType", in.FunctionUrlAuthType, "NONE", "AWS_IAM")
	return v.err()
}

func checkSid(v *violations, sid string) {
	if sid == "" || len(sid) > 100 {
		v.length("statementId", sid, 1, 100)
	} else if !usable(sid, nameLetters) {
		v.pattern("statementId", sid, sidPattern)
	}
}

func validAction(action string) bool {
	rest, ok := strings.CutPrefix(action, "lambda:")
	return action == "*" || ok && (rest == "*" || usable(rest, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
}

// statement makes the statement for a resource.
func (in *permissionInput) statement(resource string) *statement {
	out := &statement{Sid: *in.StatementId, Effect: "Allow", Action: *in.Action, Resource: resource}
	switch p := *in.Principal; {
	case p == "*":
		out.Principal = "*"
	case len(p) == 12 && usable(p, "0123456789"):
		out.Principal = map[string]string{"AWS": "arn:aws:iam::" + p + ":root"}
	case strings.HasPrefix(p, "arn:"):
		out.Principal = map[string]string{"AWS": p}
	default:
		out.Principal = map[string]string{"Service": p}
	}
	condition := func(kind, key, value string) {
		if value == "" {
			return
		}
		if out.Condition == nil {
			out.Condition = map[string]map[string]string{}
		}
		if out.Condition[kind] == nil {
			out.Condition[kind] = map[string]string{}
		}
		out.Condition[kind][key] = value
	}
	condition("StringEquals", "AWS:SourceAccount", in.SourceAccount)
	condition("ArnLike", "AWS:SourceArn", in.SourceArn)
	condition("StringEquals", "aws:PrincipalOrgID", in.PrincipalOrgID)
	condition("StringEquals", "lambda:EventSourceToken", in.EventSourceToken)
	condition("StringEquals", "lambda:FunctionUrlAuthType", in.FunctionUrlAuthType)
	if in.InvokedViaFunctionUrl != nil && *in.InvokedViaFunctionUrl {
		condition("Bool", "lambda:InvokedViaFunctionUrl", "true")
	}
	return out
}

// policyOf writes the policy of a qualifier; ok is false when there is none. The
// revision follows from the text.
func policyOf(f *blixard.Function, qualifier string) (text, revision string, ok bool) {
	var all []json.RawMessage
	for i := range f.Policy {
		if f.Policy[i].Qualifier == named(qualifier) {
			all = append(all, json.RawMessage(f.Policy[i].JSON))
		}
	}
	document := struct {
		Version, Id string
		Statement   []json.RawMessage
	}{"2012-10-17", "default", all}
	data, err := encodeJSON(document)
	if err != nil || len(all) == 0 {
		return "", "", false
	}
	sum := sha256.Sum256(append(data, f.Name...))
	h := hex.EncodeToString(sum[:16])
	return string(data), h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:], true
}

// named is the form of a qualifier in the state.
func named(qualifier string) string {
	if qualifier == "" {
		return blixard.Latest
	}
	return qualifier
}

// checkPolicyRevision refuses a change of a policy that changed since it was
// read. It returns the version that the change is made of, 0 for any.
func checkPolicyRevision(f *blixard.Function, qualifier, revision string) (uint64, error) {
	if revision == "" {
		return 0, nil
	}
	if _, have, _ := policyOf(f, qualifier); have != revision {
		return 0, refuse("PreconditionFailedException", "The Revision Id provided does not match the latest Revision Id. Call the GetPolicy API to retrieve the latest Revision Id")
	}
	return f.Version, nil
}

func (c *call) addPermission() error {
	var in permissionInput
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := in.check(); err != nil {
		return err
	}
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	if t.qualifier == blixard.Latest {
		return invalidParameter("We currently do not support adding policies for $LATEST.")
	}
	expect, err := checkPolicyRevision(f, t.qualifier, in.RevisionId)
	if err != nil {
		return err
	}
	data, err := encodeJSON(in.statement(c.s.arn(t.name, t.qualifier)))
	if err != nil {
		return err
	}
	p := &blixard.PolicyStatement{ID: *in.StatementId, Qualifier: named(t.qualifier), JSON: string(data)}
	if _, err := c.propose(partAt("policy", expect), &state.SetFunction{Name: t.name, ExpectVersion: expect, Policy: p}); err != nil {
		switch {
		case blixard.CodeOf(err) == blixard.CodeExists:
			return refuse("ResourceConflictException", "The statement id (%s) provided already exists. Please provide a new statement id, or remove the existing statement.", p.ID)
		case fieldOf(err) == "policy":
			return refuse("PolicyLengthExceededException", "The final policy size is bigger than the limit (%d).", blixard.MaxPolicyBytes)
		}
		return c.functionError(err, t)
	}
	return c.answer(http.StatusCreated, struct{ Statement string }{string(data)})
}

func (c *call) getPolicy() error {
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	text, revision, ok := policyOf(f, t.qualifier)
	if !ok {
		return refuse("ResourceNotFoundException", "The resource you requested does not exist.")
	}
	return c.answer(http.StatusOK, struct{ Policy, RevisionId string }{text, revision})
}

func (c *call) removePermission() error {
	var v violations
	checkSid(&v, c.args["s"])
	if err := v.err(); err != nil {
		return err
	}
	t, f, _, err := c.found()
	if err != nil {
		return err
	}
	expect, err := checkPolicyRevision(f, t.qualifier, c.query.Get("RevisionId"))
	if err != nil {
		return err
	}
	drop := &state.PolicyRef{ID: c.args["s"], Qualifier: named(t.qualifier)}
	if _, err := c.propose(partAt("unpolicy", expect), &state.SetFunction{Name: t.name, ExpectVersion: expect, DropPolicy: drop}); err != nil {
		if blixard.CodeOf(err) == blixard.CodeNotFound && fieldOf(err) == "policy" {
			return refuse("ResourceNotFoundException", "Statement %s is not found in resource policy.", drop.ID)
		}
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}
