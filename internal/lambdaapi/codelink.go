package lambdaapi

import (
	"crypto/hmac"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/accesskey"
)

// GetFunction tells where the code can be fetched without a signature of one's
// own for a while: here, by a link that only who has the cluster's secret can
// make.
const (
	codePath   = "/2015-03-31/blixard-code/"
	codeExpiry = 10 * time.Minute
)

func (c *call) codeLink(digest string) string {
	expires := strconv.FormatInt(c.now.Add(codeExpiry).Unix(), 10)
	return c.scheme() + "://" + c.r.Host + codePath + digest + "?Expires=" + expires + "&Signature=" + c.linkSignature(digest, expires)
}

func (c *call) linkSignature(digest, expires string) string {
	return accesskey.Seal(c.s.secret(), "code "+digest+" until "+expires)
}

func (c *call) isCodeLink() bool {
	return c.r.Method == http.MethodGet && strings.HasPrefix(c.r.URL.Path, codePath)
}

// serveCode answers a link.
func (c *call) serveCode() error {
	digest := strings.TrimPrefix(c.r.URL.Path, codePath)
	expires := c.query.Get("Expires")
	until, err := strconv.ParseInt(expires, 10, 64)
	if err != nil || c.s.secret() == "" || c.now.Unix() > until || !hmac.Equal([]byte(c.query.Get("Signature")), []byte(c.linkSignature(digest, expires))) {
		return refuse("AccessDeniedException", "The link to the code is not valid, or has expired: ask GetFunction for a new one")
	}
	code, size, err := c.s.opt.Code.Open(digest)
	if err != nil {
		if blixard.CodeOf(err) == blixard.CodeNotFound {
			return refuse("ResourceNotFoundException", "The code %s is not on this node", digest)
		}
		return err
	}
	defer code.Close()
	c.w.Header().Set("Content-Type", "application/zip")
	c.w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	c.w.WriteHeader(http.StatusOK)
	if _, err := io.Copy(c.w, code); err != nil {
		c.s.opt.Log.Debug("sending code failed", "digest", digest, "error", err)
	}
	return nil
}
