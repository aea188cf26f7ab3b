package gateway

import (
	"cmp"
	"net/url"
	"slices"
	"strings"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/state"
)

// routes finds the trigger for a request. It is made of one state of the
// functions and never changes.
//
// The longest match wins: a trigger for the request's host before one for any
// host; then, segment by segment, a path that says the segment before one that
// takes all below. Where paths are the same, a trigger for the method goes before
// one for any method, and of two for the same requests, which the state does not
// take, the older. A last segment "*" or "{name+}" takes the path itself and all
// below it; a slash at the end makes no difference.
type routes struct {
	index uint64 // state.View.FunctionsIndex
	hosts map[string]*pathNode
	any   *pathNode
}

// pathNode is a prefix of paths.
type pathNode struct {
	next map[string]*pathNode
	leaf []routeTarget // the path itself
	all  []routeTarget // all below
}

// routeTarget is a trigger. Equal paths are in the order in which they win.
type routeTarget struct {
	function *blixard.Function
	trigger  *blixard.Trigger
	name     string // of what "{name+}" takes
}

// route is what was found for a request.
type routeMatch struct {
	routeTarget
	rest string // what "{name+}" takes, escaped
}

func newRoutes(v *state.View) *routes {
	r := &routes{index: v.FunctionsIndex(), hosts: map[string]*pathNode{}, any: new(pathNode)}
	v.Triggers(func(f *blixard.Function, t *blixard.Trigger) bool {
		if t.Kind == "http" {
			r.add(f, t)
		}
		return true
	})
	for _, n := range r.hosts { //order:any each by itself
		n.sort()
	}
	r.any.sort()
	return r
}

func (r *routes) add(f *blixard.Function, t *blixard.Trigger) {
	n := r.any
	if t.Host != "" {
		host := strings.ToLower(t.Host)
		if n = r.hosts[host]; n == nil {
			n = new(pathNode)
			r.hosts[host] = n
		}
	}
	to := routeTarget{function: f, trigger: t}
	for rest := trimPath(t.Path); rest != ""; {
		segment, after, _ := strings.Cut(rest, "/")
		if after == "" && (segment == "*" || strings.HasPrefix(segment, "{") && strings.HasSuffix(segment, "+}")) {
			if to.name = "proxy"; segment != "*" {
				to.name = segment[1 : len(segment)-2]
			}
			n.all = append(n.all, to)
			return
		}
		if n.next == nil {
			n.next = map[string]*pathNode{}
		}
		if n.next[segment] == nil {
			n.next[segment] = new(pathNode)
		}
		n, rest = n.next[segment], after
	}
	n.leaf = append(n.leaf, to)
}

func (n *pathNode) sort() {
	order := func(a, b routeTarget) int {
		return cmp.Or(compareAny(a.trigger, b.trigger), cmp.Compare(a.trigger.CreatedMS, b.trigger.CreatedMS),
			cmp.Compare(a.function.Name, b.function.Name), cmp.Compare(a.trigger.ID, b.trigger.ID))
	}
	slices.SortFunc(n.leaf, order)
	slices.SortFunc(n.all, order)
	for _, below := range n.next { //order:any each by itself
		below.sort()
	}
}

// compareAny puts what takes any method last.
func compareAny(a, b *blixard.Trigger) int {
	x, y := len(a.Methods) == 0, len(b.Methods) == 0
	switch {
	case x == y:
		return 0
	case x:
		return 1
	default:
		return -1
	}
}

func trimPath(path string) string {
	return strings.TrimSuffix(strings.TrimPrefix(path, "/"), "/")
}

// find looks for the trigger of a request; path is escaped. If only the method
// is wrong, allow names those that are right.
func (r *routes) find(method, host, path string) (m routeMatch, allow []string, ok bool) {
	path = trimPath(path)
	if n := r.hosts[hostName(host)]; n != nil {
		if m, ok = n.find(method, path, &allow); ok {
			return m, nil, true
		}
	}
	if m, ok = r.any.find(method, path, &allow); ok {
		return m, nil, true
	}
	slices.Sort(allow)
	return m, slices.Compact(allow), false
}

func (n *pathNode) find(method, rest string, allow *[]string) (routeMatch, bool) {
	if rest == "" {
		if t, ok := pick(n.leaf, method, allow); ok {
			return routeMatch{routeTarget: t}, true
		}
	} else {
		segment, after, _ := strings.Cut(rest, "/")
		if below := n.next[unescape(segment)]; below != nil {
			if m, ok := below.find(method, after, allow); ok {
				return m, true
			}
		}
	}
	t, ok := pick(n.all, method, allow)
	return routeMatch{routeTarget: t, rest: rest}, ok
}

func unescape(segment string) string {
	if strings.IndexByte(segment, '%') < 0 {
		return segment
	}
	plain, err := url.PathUnescape(segment)
	if err != nil {
		return segment
	}
	return plain
}

func pick(targets []routeTarget, method string, allow *[]string) (routeTarget, bool) {
	for _, t := range targets {
		if len(t.trigger.Methods) == 0 || slices.Contains(t.trigger.Methods, method) {
			return t, true
		}
		*allow = append(*allow, t.trigger.Methods...)
	}
	return routeTarget{}, false
}

// hostName is a Host header's name in lower case, without port.
func hostName(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && strings.IndexByte(host[i:], ']') < 0 {
		host = host[:i]
	}
	for i := range len(host) {
		if c := host[i]; c >= 'A' && c <= 'Z' {
			return strings.ToLower(host)
		}
	}
	return host
}

// routesOf is what is current for a view.
func (g *Gateway) routesOf(v *state.View) *routes {
	r := g.routes.Load()
	if r == nil || r.index != v.FunctionsIndex() {
		r = newRoutes(v)
		g.routes.Store(r)
	}
	return r
}
