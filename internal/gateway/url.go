package gateway

import (
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/blixard/blixard"
)

// Verifier checks requests that are signed with an access key (SigV4).
type Verifier interface {
	// Verify checks the signature of a request, whose body is read already. The
	// error is a *blixard.Error of CodeDenied.
	Verify(r *http.Request, body []byte) (Identity, error)
}

// Identity is who signed a request.
type Identity struct {
	AccessKey string
	AccountID string
	CallerID  string
	UserARN   string
	UserID    string
}

// forbidden is what strangers are told; message is JSON.
func forbidden(message string) *Error {
	return refuse(http.StatusForbidden, reasonForbidden, blixard.CodeDenied, message, "access is denied")
}

// urlID is the ID of the function URL that a host names.
func (g *Gateway) urlID(host string) (string, bool) {
	name := hostName(host)
	id, ok := strings.CutSuffix(name, g.urlSuffix)
	return id, ok && id != "" && strings.IndexByte(id, '.') < 0
}

// OwnsHost tells whether a request's host is a function URL's: then all of its
// paths are the gateway's.
func (g *Gateway) OwnsHost(host string) bool {
	_, ok := g.urlID(host)
	return ok
}

// URLHost is the host name of a function URL.
func (g *Gateway) URLHost(id string) string { return id + g.urlSuffix }

// authorize turns away who certainly may not call this way, before anything of
// the body is read.
func (x *exchange) authorize() *Error {
	e := &x.entry
	switch {
	case e.url != nil && e.url.Auth != "NONE":
		if x.g.opt.Verify == nil || x.r.Header.Get("Authorization") == "" && !strings.Contains(x.r.URL.RawQuery, "X-Amz-Signature=") {
			return forbidden(`"Forbidden"`)
		}
	case e.named && x.g.opt.Authorize != nil:
		if err := x.g.opt.Authorize(x.r); err != nil {
			f := errorOf(err)
			if f.Status == http.StatusForbidden && x.r.Header.Get("Authorization") == "" {
				f.Status = http.StatusUnauthorized
			}
			return f
		}
	}
	return nil
}

// verify checks a signature, which covers the body.
func (x *exchange) verify() *Error {
	e := &x.entry
	if e.url == nil || e.url.Auth == "NONE" {
		return nil
	}
	id, err := x.g.opt.Verify.Verify(x.r, x.body)
	if err != nil {
		f := forbidden(`"Forbidden"`)
		f.cause = err
		return f
	}
	e.identity = &id
	return nil
}

// failURL answers with an error as function URLs do.
func (x *exchange) failURL(e *Error) {
	h := x.w.Header()
	kind, body := "InternalFailure", `{"Message":"Internal Server Error"}`
	switch e.Status {
	case http.StatusForbidden:
		message := e.Err.Hint
		if e.Reason != reasonForbidden {
			message = `"Forbidden"`
		}
		kind, body = "AccessDeniedException", `{"Message":`+message+`}`
	case http.StatusTooManyRequests:
		kind, body = "TooManyRequestsException", `{"Reason":"`+e.Reason+`","Type":"User","message":"Rate Exceeded."}`
	case http.StatusRequestEntityTooLarge:
		kind, body = "RequestTooLargeException", `{"Message":"Request must be smaller than `+strconv.FormatInt(x.g.limits.SyncBytes, 10)+` bytes for the InvokeFunction operation"}`
	case http.StatusNotFound:
		e.Status = http.StatusForbidden
		kind, body = "AccessDeniedException", `{"Message":null}`
	case http.StatusBadGateway, http.StatusGatewayTimeout, http.StatusServiceUnavailable, http.StatusBadRequest, http.StatusRequestTimeout:
		kind = "ServiceException"
		body = `{"Message":` + string(appendString(nil, http.StatusText(e.Status))) + `}`
	}
	h["X-Amzn-Errortype"] = []string{kind}
	x.write(e.Status, "application/json", []byte(body))
}

// cors says what browsers may do; it tells whether the request was a question
// about that (preflight), which it has answered then.
func (x *exchange) cors() bool {
	c, r := x.entry.url.CORS, x.r
	if c == nil {
		return false
	}
	h := x.w.Header()
	origin := r.Header.Get("Origin")
	preflight := r.Method == http.MethodOptions && origin != "" && r.Header.Get("Access-Control-Request-Method") != ""
	if allowed := allowedOrigin(c, origin); allowed != "" {
		h["Access-Control-Allow-Origin"] = []string{allowed}
		if allowed != "*" {
			h["Vary"] = []string{"Origin"}
		}
		if c.AllowCredentials {
			h["Access-Control-Allow-Credentials"] = []string{"true"}
		}
		if len(c.ExposeHeaders) > 0 {
			h["Access-Control-Expose-Headers"] = []string{strings.Join(c.ExposeHeaders, ",")}
		}
		if preflight {
			x.preflight(c, h)
		}
	}
	if preflight {
		x.write(http.StatusOK, "application/json", nil)
	}
	return preflight
}

// allowedOrigin is what Access-Control-Allow-Origin says, "" if nothing. It never
// makes an origin of "*", which no browser takes with credentials.
func allowedOrigin(c *blixard.CORS, origin string) string {
	if origin == "" {
		return ""
	}
	for _, o := range c.AllowOrigins {
		if o == "*" {
			return "*"
		}
		if strings.EqualFold(o, origin) || wildcard(o, origin) {
			return origin
		}
	}
	return ""
}

// wildcard matches "https://*.example.com".
func wildcard(pattern, origin string) bool {
	head, tail, ok := strings.Cut(pattern, "*")
	return ok && len(origin) > len(head)+len(tail) && strings.HasPrefix(origin, head) && strings.HasSuffix(origin, tail)
}

func (x *exchange) preflight(c *blixard.CORS, h http.Header) {
	methods := c.AllowMethods
	if slices.Contains(methods, "*") {
		methods = []string{x.r.Header.Get("Access-Control-Request-Method")}
	}
	if len(methods) > 0 {
		h["Access-Control-Allow-Methods"] = []string{strings.Join(methods, ",")}
	}
	headers := strings.Join(c.AllowHeaders, ",")
	if slices.Contains(c.AllowHeaders, "*") {
		headers = strings.Join(x.r.Header["Access-Control-Request-Headers"], ",")
	}
	if headers != "" {
		h["Access-Control-Allow-Headers"] = []string{headers}
	}
	if c.MaxAgeSeconds > 0 {
		h["Access-Control-Max-Age"] = []string{strconv.Itoa(c.MaxAgeSeconds)}
	}
}
