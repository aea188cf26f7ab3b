package lambdaapi

import (
	"encoding/base64"
	"encoding/hex"
	"net/http"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

type publishInput struct {
	CodeSha256, Description, RevisionId, PublishTo string
}

func (c *call) publishVersion() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	var in publishInput
	if err := c.decode(&in); err != nil {
		return err
	}
	var v violations
	if len(in.Description) > 256 {
		v.length("description", in.Description, 0, 256)
	}
	if err := v.err(); err != nil {
		return err
	}
	if in.PublishTo != "" {
		return invalidParameter("Blixard does not know PublishTo")
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	_, latest, err := c.s.find(view, target{name: t.name})
	if err != nil {
		return err
	}
	digest := ""
	if in.CodeSha256 != "" {
		raw, err := base64.StdEncoding.DecodeString(in.CodeSha256)
		if digest = hex.EncodeToString(raw); err != nil || digest != latest.CodeDigest {
			return invalidParameter("CodeSHA256 (%.64s) is different from current CodeSHA256 in $LATEST (%s). Please try again with the CodeSHA256 in $LATEST.", in.CodeSha256, codeSHA256(latest.CodeDigest))
		}
	}
	out, err := c.propose("publish", &state.PublishVersion{Name: t.name, Description: in.Description, CodeDigest: digest, Revision: in.RevisionId})
	if err != nil {
		return c.functionError(err, t)
	}
	return c.answerVersion(http.StatusCreated, t.name, int(out.Value), true)
}

func (c *call) listVersions() error {
	t, err := c.bareTarget()
	if err != nil {
		return err
	}
	page, err := c.page(10_000)
	if err != nil {
		return err
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	if _, _, err := c.s.find(view, target{name: t.name}); err != nil {
		return err
	}
	var out struct {
		Versions   []*functionConfiguration
		NextMarker string `json:",omitempty"`
	}
	out.Versions = []*functionConfiguration{}
	view.FunctionVersions(t.name, func(fv *blixard.FunctionVersion) bool {
		return page.add(sortable(fv.Number), func() {
			out.Versions = append(out.Versions, c.s.configuration(fv, blixard.VersionName(fv.Number)).listed())
		})
	})
	out.NextMarker = page.next()
	return c.answer(http.StatusOK, out)
}
