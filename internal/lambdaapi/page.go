package lambdaapi

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
)

// pager cuts a list, which comes in the order of its keys, into pages. A marker
// is the key of the last item that was shown: what comes or goes in between
// pages repeats and hides nothing else.
type pager struct {
	after string // the marker's key; "" at the beginning
	limit int
	shown int
	last  string
	more  bool
}

// page reads Marker and MaxItems; most is the largest MaxItems that is taken.
func (c *call) page(most int) (*pager, error) {
	p := &pager{limit: c.s.opt.Limits.DefaultPage}
	if text := c.query.Get("MaxItems"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, refuse("SerializationException", "'%.40s' can not be converted to an Integer", text)
		}
		var v violations
		v.between("maxItems", int64(n), 1, int64(most))
		if err := v.err(); err != nil {
			return nil, err
		}
		p.limit = min(n, p.limit)
	}
	marker := c.query.Get("Marker")
	raw, err := base64.RawURLEncoding.DecodeString(marker)
	if err != nil || len(raw) > 512 {
		return nil, invalidParameter("The marker is not one that a former page ended with")
	}
	p.after = string(raw)
	return p, nil
}

// firstPart is the part of the marker before ":", where the list may begin.
func (p *pager) firstPart() string {
	first, _, _ := strings.Cut(p.after, ":")
	return first
}

// add shows an item unless a former page did; it tells whether to go on. Keys
// grow and are never "".
func (p *pager) add(key string, show func()) bool {
	if p.after != "" && key <= p.after {
		return true
	}
	if p.shown == p.limit {
		p.more = true
		return false
	}
	show()
	p.shown++
	p.last = key
	return true
}

// next is the marker of the next page, "" if there is none.
func (p *pager) next() string {
	if !p.more {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString([]byte(p.last))
}

// sortable writes a version's number so that texts sort as numbers do.
func sortable(number int) string { return fmt.Sprintf("%010d", number) }
