package gateway

import (
	"container/list"
	"sync"
	"time"

	"github.com/blixard/blixard"
)

// bucket is a token bucket: rate tokens come back each second, up to burst.
type bucket struct {
	mu          sync.Mutex
	rate, burst float64
	tokens      float64
	at          time.Time
}

func newBucket(rate, burst float64) *bucket { return &bucket{rate: rate, burst: burst, tokens: burst} }

// take takes a token; share is the part of the rate that is this node's.
func (b *bucket) take(now time.Time, share float64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at.IsZero() {
		b.at = now
	}
	burst := max(1, b.burst*share)
	if d := now.Sub(b.at).Seconds(); d > 0 {
		b.tokens, b.at = b.tokens+d*b.rate*share, now
	}
	b.tokens = min(b.tokens, burst)
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// wait is how long until there is a token.
func (b *bucket) wait(share float64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rate*share <= 0 || b.tokens >= 1 {
		return 0
	}
	return time.Duration((1 - b.tokens) / (b.rate * share) * float64(time.Second))
}

// rates are the rate limits of functions and callers.
//
// A function's limit is the cluster's. Nodes tell each other how many calls a
// second they see of each limited function (demand, in the announcements), and
// each lets in its part of the limit: what it sees, of what all see. So the
// whole limit is there for the one node that all calls come to, and for calls
// spread over nodes the sum is the limit, give or take what changes between two
// announcements. The limit of a caller, of a function or in all, is counted by
// each node for itself: callers keep to one connection, as a rule.
type rates struct {
	mu        sync.RWMutex
	functions map[blixard.FunctionName]*functionRate
	callers   callerBuckets
	all       float64 // calls per second of one caller to all functions; 0: no limit
}

func newRates(all float64) *rates {
	return &rates{functions: map[blixard.FunctionName]*functionRate{}, all: all, callers: newCallerBuckets()}
}

// functionRate is what is let in of one function on this node.
type functionRate struct {
	uid    uint64
	limit  int
	bucket *bucket

	mu     sync.Mutex
	seen   float64 // calls since at
	at     time.Time
	demand float64 // calls per second, smoothed
}

// take lets a call in, or says why not.
func (r *rates) take(f *blixard.Function, caller string, t *table, now time.Time) error {
	if r.all > 0 && caller != "" {
		if b := r.callers.bucket(caller, r.all, now); !b.take(now, 1) {
			return throttle(ReasonCallerRate, b.wait(1), "the caller makes more than %g calls per second", r.all)
		}
	}
	if f.CallerLimit > 0 && caller != "" {
		if b := r.callers.bucket(string(f.Name)+"\x00"+caller, float64(f.CallerLimit), now); !b.take(now, 1) {
			return throttle(ReasonCallerRate, b.wait(1), "the caller makes more than %d calls of %s per second", f.CallerLimit, f.Name)
		}
	}
	if f.RateLimit <= 0 {
		return nil
	}
	fr := r.function(f)
	own := fr.note(now, 1)
	share := 1.0
	if others := t.demand(f.Name, now); others > 0 {
		share = own / (own + others)
	}
	if !fr.bucket.take(now, share) {
		return throttle(ReasonRate, fr.bucket.wait(share), "the function %s is called more than %d times per second", f.Name, f.RateLimit)
	}
	return nil
}

func (r *rates) function(f *blixard.Function) *functionRate {
	r.mu.RLock()
	fr := r.functions[f.Name]
	r.mu.RUnlock()
	if fr != nil && fr.uid == f.UID && fr.limit == f.RateLimit {
		return fr
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if fr = r.functions[f.Name]; fr != nil && fr.uid == f.UID && fr.limit == f.RateLimit {
		return fr
	}
	fr = &functionRate{uid: f.UID, limit: f.RateLimit, bucket: newBucket(float64(f.RateLimit), float64(f.RateLimit))}
	r.functions[f.Name] = fr
	return fr
}

// demandWindow is what demand is smoothed over.
const demandWindow = time.Second

// note counts n calls and returns the demand, 1 per window at least.
func (f *functionRate) note(now time.Time, n float64) float64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.at.IsZero() {
		f.at = now
	}
	f.seen += n
	if d := now.Sub(f.at); d >= demandWindow/4 {
		rate := f.seen / d.Seconds()
		keep := max(0, 1-d.Seconds()/demandWindow.Seconds())
		f.demand = f.demand*keep + rate*(1-keep)
		f.seen, f.at = 0, now
	}
	return max(f.demand, f.seen, 1)
}

// demands are the calls per second of limited functions here, in thousandths,
// and forgets those that are called no more.
func (r *rates) demands(now time.Time) []Demand {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []Demand
	for name, f := range r.functions { //order:any sorted where it is encoded
		f.mu.Lock()
		idle := f.demand < 0.01 && f.seen == 0 && now.Sub(f.at) > time.Minute
		f.mu.Unlock()
		if idle {
			delete(r.functions, name)
			continue
		}
		f.note(now, 0)
		f.mu.Lock()
		milli := int64(f.demand * 1000)
		f.mu.Unlock()
		if milli > 0 {
			out = append(out, Demand{Function: name, Milli: milli})
		}
	}
	return out
}

// maxCallers bounds the callers that are remembered; who was not seen longest
// goes, with a full bucket when it comes back.
const maxCallers = 20_000

type callerBuckets struct {
	mu    *sync.Mutex
	by    map[string]*list.Element
	order *list.List // newest first
}

type callerBucket struct {
	key string
	*bucket
}

func newCallerBuckets() callerBuckets {
	return callerBuckets{mu: new(sync.Mutex), by: map[string]*list.Element{}, order: list.New()}
}

func (c *callerBuckets) bucket(key string, rate float64, _ time.Time) *bucket {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.by[key]; e != nil {
		if b, ok := e.Value.(callerBucket); ok && b.rate == rate {
			c.order.MoveToFront(e)
			return b.bucket
		}
		c.order.Remove(e)
	}
	b := newBucket(rate, max(1, rate))
	c.by[key] = c.order.PushFront(callerBucket{key, b})
	if c.order.Len() > maxCallers {
		last := c.order.Back()
		if old, ok := c.order.Remove(last).(callerBucket); ok {
			delete(c.by, old.key)
		}
	}
	return b
}
