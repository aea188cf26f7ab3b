package lambdaapi

import (
	"net"
	"net/http"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
	"github.com/blixard/blixard/internal/state"
)

type corsConfig struct {
	AllowCredentials bool     `json:",omitempty"`
	AllowHeaders     []string `json:",omitempty"`
	AllowMethods     []string `json:",omitempty"`
	AllowOrigins     []string `json:",omitempty"`
	ExposeHeaders    []string `json:",omitempty"`
	MaxAge           int      `json:",omitempty"`
}

type urlConfig struct {
	FunctionUrl, FunctionArn, AuthType string
	Cors                               *corsConfig `json:",omitempty"`
	CreationTime                       string
	LastModifiedTime                   string `json:",omitempty"` // not told when it was just made
	InvokeMode                         string
}

func (c *call) urlConfig(f *blixard.Function, u *blixard.FunctionURL) *urlConfig {
	qualifier := u.Qualifier
	if qualifier == blixard.Latest {
		qualifier = ""
	}
	out := &urlConfig{
		FunctionUrl: c.scheme() + "://" + c.urlHost(u.ID) + "/", FunctionArn: c.s.arn(f.Name, qualifier), AuthType: u.Auth,
		CreationTime: writeTime(u.CreatedMS), LastModifiedTime: writeTime(u.ModifiedMS), InvokeMode: u.InvokeMode,
	}
	if x := u.CORS; x != nil {
		out.Cors = &corsConfig{
			AllowCredentials: x.AllowCredentials, AllowHeaders: x.AllowHeaders, AllowMethods: x.AllowMethods,
			AllowOrigins: x.AllowOrigins, ExposeHeaders: x.ExposeHeaders, MaxAge: x.MaxAgeSeconds,
		}
	}
	return out
}

func (c *call) scheme() string {
	if c.r.TLS != nil {
		return "https"
	}
	return "http"
}

// urlHost is the host of a function URL, with the port by which we were reached.
func (c *call) urlHost(id string) string {
	if c.s.opt.URLHost != nil {
		return c.s.opt.URLHost(id)
	}
	host := id + ".lambda-url." + c.s.opt.Region + ".localhost"
	if _, port, err := net.SplitHostPort(c.r.Host); err == nil && port != "" {
		host = net.JoinHostPort(host, port)
	}
	return host
}

type urlInput struct {
	AuthType   string
	InvokeMode string
	Cors       *corsConfig
}

func (in *urlInput) check(create bool) error {
	var v violations
	if create && in.AuthType == "" {
		v.missing("authType")
	}
	v.oneOf("authType", in.AuthType, "NONE", "AWS_IAM")
	v.oneOf("invokeMode", in.InvokeMode, "BUFFERED", "RESPONSE_STREAM")
	if in.Cors != nil {
		v.between("cors.maxAge", int64(in.Cors.MaxAge), 0, 86_400)
	}
	return v.err()
}

func (in *urlInput) apply(u *blixard.FunctionURL) {
	if in.AuthType != "" {
		u.Auth = in.AuthType
	}
	if in.InvokeMode != "" {
		u.InvokeMode = in.InvokeMode
	}
	if x := in.Cors; x != nil {
		u.CORS = &blixard.CORS{
			AllowCredentials: x.AllowCredentials, AllowHeaders: x.AllowHeaders, AllowMethods: x.AllowMethods,
			AllowOrigins: x.AllowOrigins, ExposeHeaders: x.ExposeHeaders, MaxAgeSeconds: x.MaxAge,
		}
	}
}

// urlTarget is a function and the qualifier of a URL: $LATEST or an alias.
func (c *call) urlTarget() (target, *blixard.Function, error) {
	t, f, _, err := c.found()
	if err != nil {
		return t, nil, err
	}
	if n, ok := blixard.ParseVersion(t.qualifier); ok && (n != 0 || t.qualifier != "") {
		var v violations
		v.pattern("qualifier", t.qualifier, `((?!^\d+$)^[0-9a-zA-Z-_]+$)`)
		return t, nil, v.err()
	}
	return t, f, nil
}

func (c *call) noURL() error {
	return refuse("ResourceNotFoundException", "The resource you requested does not exist.")
}

func (c *call) createURL() error {
	var in urlInput
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := in.check(true); err != nil {
		return err
	}
	t, _, err := c.urlTarget()
	if err != nil {
		return err
	}
	u := blixard.FunctionURL{Qualifier: named(t.qualifier), ID: c.newURLID(), InvokeMode: "BUFFERED"}
	in.apply(&u)
	return c.setURL(http.StatusCreated, t, u, state.PutNew, 0)
}

// newURLID draws an ID that nobody guesses; the repeat of a request draws the
// same.
func (c *call) newURLID() string {
	seed := c.key
	if seed == "" {
		seed = c.requestID
	}
	return accesskey.URLID(c.s.secret(), seed)
}

func (c *call) updateURL() error {
	var in urlInput
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := in.check(false); err != nil {
		return err
	}
	t, f, err := c.urlTarget()
	if err != nil {
		return err
	}
	old := f.URL(named(t.qualifier))
	if old == nil {
		return c.noURL()
	}
	u := *old
	in.apply(&u)
	return c.setURL(http.StatusOK, t, u, state.PutReplace, f.Version)
}

func (c *call) setURL(status int, t target, u blixard.FunctionURL, put state.Put, expect uint64) error {
	if _, err := c.propose(partAt("url", expect), &state.SetFunction{Name: t.name, ExpectVersion: expect, URL: &state.URLChange{URL: u, Put: put}}); err != nil {
		switch {
		case blixard.CodeOf(err) == blixard.CodeExists:
			return refuse("ResourceConflictException", "Failed to create function url config for [functionArn = %s]. Error message:  FunctionUrlConfig exists for this Lambda function", c.s.arn(t.name, t.qualifier))
		case blixard.CodeOf(err) == blixard.CodeNotFound && fieldOf(err) == "url":
			return c.noURL()
		}
		return c.functionError(err, t)
	}
	view, err := c.view()
	if err != nil {
		return err
	}
	f, _, err := c.s.find(view, t)
	if err != nil {
		return err
	}
	made := f.URL(named(t.qualifier))
	if made == nil {
		return c.noURL()
	}
	out := c.urlConfig(f, made)
	if put == state.PutNew {
		out.LastModifiedTime = ""
	}
	return c.answer(status, out)
}

func (c *call) getURL() error {
	t, f, err := c.urlTarget()
	if err != nil {
		return err
	}
	u := f.URL(named(t.qualifier))
	if u == nil {
		return c.noURL()
	}
	return c.answer(http.StatusOK, c.urlConfig(f, u))
}

func (c *call) deleteURL() error {
	t, _, err := c.urlTarget()
	if err != nil {
		return err
	}
	if _, err := c.propose("unurl", &state.SetFunction{Name: t.name, DropURL: named(t.qualifier)}); err != nil {
		if fieldOf(err) == "url" {
			return c.noURL()
		}
		return c.functionError(err, t)
	}
	return c.answer(http.StatusNoContent, nil)
}

func (c *call) listURLs() error {
	page, err := c.page(50)
	if err != nil {
		return err
	}
	_, f, _, err := c.found()
	if err != nil {
		return err
	}
	var out struct {
		FunctionUrlConfigs []*urlConfig
		NextMarker         string `json:",omitempty"`
	}
	out.FunctionUrlConfigs = []*urlConfig{}
	for i := range f.URLs {
		u := &f.URLs[i]
		if !page.add(u.Qualifier, func() { out.FunctionUrlConfigs = append(out.FunctionUrlConfigs, c.urlConfig(f, u)) }) {
			break
		}
	}
	out.NextMarker = page.next()
	return c.answer(http.StatusOK, out)
}
