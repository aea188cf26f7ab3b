package lambdaapi

import (
	"net/http"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// tagged is the function whose ARN stands in the path. Only functions have tags.
func (c *call) tagged() (target, *blixard.Function, error) {
	arn := c.args["arn"]
	var v violations
	if !strings.HasPrefix(arn, "arn:aws") || len(arn) > 256 {
		v.pattern("resource", arn, `arn:(aws[a-zA-Z-]*):lambda:[a-z]{2}((-gov)|(-iso([a-z]?)))?-[a-z]+-\d{1}:\d{12}:(function:[a-zA-Z0-9-_]+(:(\$LATEST|[a-zA-Z0-9-_]+))?|code-signing-config:csc-[a-z0-9]{17}|event-source-mapping:[a-f0-9-]{36})`)
		return target{}, nil, v.err()
	}
	if parts := strings.Split(arn, ":"); len(parts) > 5 && parts[5] != "function" {
		return target{}, nil, refuse("ResourceNotFoundException", "The resource you requested does not exist: %.200s", arn)
	}
	t, err := c.s.parseFunction(arn, "")
	if err != nil {
		return t, nil, err
	}
	if t.qualifier != "" {
		return t, nil, invalidParameter("Tags on function aliases and versions are not supported. Please specify a function ARN.")
	}
	view, err := c.view()
	if err != nil {
		return t, nil, err
	}
	f, _, err := c.s.find(view, t)
	return t, f, err
}

type tagsInput struct{ Tags map[string]string }

func (c *call) tagResource() error {
	t, _, err := c.tagged()
	if err != nil {
		return err
	}
	var in tagsInput
	if err := c.decode(&in); err != nil {
		return err
	}
	if len(in.Tags) == 0 {
		return invalidParameter("An error occurred and the request cannot be processed: no tags were given.")
	}
	set, err := labels(in.Tags)
	if err != nil {
		return err
	}
	if _, err := c.propose("tag", &state.SetFunction{Name: t.name, SetTags: set}); err != nil {
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) untagResource() error {
	t, _, err := c.tagged()
	if err != nil {
		return err
	}
	keys := slices.Clone(c.query["tagKeys"])
	if len(keys) == 0 {
		var v violations
		v.missing("tagKeys")
		return v.err()
	}
	slices.Sort(keys)
	if _, err := c.propose("untag", &state.SetFunction{Name: t.name, DropTags: slices.Compact(keys)}); err != nil {
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) listTags() error {
	_, f, err := c.tagged()
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, struct{ Tags map[string]string }{tagMap(f.Tags)})
}
