package call

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/blixard/blixard"
)

// Payloads are fields in a fixed order: numbers as varints, texts and bytes with
// their length before them, lists with their count. New fields come last, and
// readers leave what they do not know.

// Bounds of what is read, besides the frame's size.
const (
	maxList = 4096
	maxText = 64 << 10
)

type writer struct{ b []byte }

func (w *writer) uint(v uint64)            { w.b = binary.AppendUvarint(w.b, v) }
func (w *writer) int(v int64)              { w.b = binary.AppendVarint(w.b, v) }
func (w *writer) text(s string)            { w.uint(uint64(len(s))); w.b = append(w.b, s...) }
func (w *writer) bytes(p []byte)           { w.uint(uint64(len(p))); w.b = append(w.b, p...) }
func (w *writer) duration(d time.Duration) { w.int(int64(d)) }
func (w *writer) flag(set bool)            { w.b = append(w.b, boolByte(set)) }
func (w *writer) texts(list []string)      { w.uint(uint64(len(list))); each(list, w.text) }
func (w *writer) pairs(list [][2]string)   { w.uint(uint64(len(list))); each(list, w.pair) }
func (w *writer) pair(p [2]string)         { w.text(p[0]); w.text(p[1]) }
func (w *writer) label(l blixard.Label)    { w.text(l.Key); w.text(l.Value) }
func (w *writer) labels(l []blixard.Label) { w.uint(uint64(len(l))); each(l, w.label) }
func each[T any](list []T, write func(T)) {
	for _, item := range list {
		write(item)
	}
}

func boolByte(set bool) byte {
	if set {
		return 1
	}
	return 0
}

// reader reads what writer writes. After the first error everything reads as zero.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(what string) {
	if r.err == nil {
		r.err = fmt.Errorf("%s in a payload: %w", what, ErrHostile)
	}
	r.b = nil
}

func (r *reader) uint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail("a number is missing")
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) int() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail("a number is missing")
		return 0
	}
	r.b = r.b[n:]
	return v
}

// view is bytes that stay the payload's.
func (r *reader) view() []byte {
	n := r.uint()
	if n > uint64(len(r.b)) {
		r.fail("bytes are missing")
		return nil
	}
	p := r.b[:n:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) bytes() []byte {
	if p := r.view(); len(p) > 0 {
		return append([]byte(nil), p...)
	}
	return nil
}

func (r *reader) text() string            { return string(r.view()) }
func (r *reader) duration() time.Duration { return time.Duration(max(0, r.int())) }

func (r *reader) flag() bool {
	if len(r.b) == 0 {
		r.fail("a flag is missing")
		return false
	}
	set := r.b[0] != 0
	r.b = r.b[1:]
	return set
}

// count is of a list whose items take at least one byte each.
func (r *reader) count() int {
	n := r.uint()
	if n > maxList || n > uint64(len(r.b)) {
		r.fail("a list is too long")
		return 0
	}
	return int(n)
}

func list[T any](r *reader, read func() T) []T {
	n := r.count()
	if n == 0 {
		return nil
	}
	items := make([]T, 0, n)
	for range n {
		items = append(items, read())
	}
	return items
}

func (r *reader) texts() []string         { return list(r, r.text) }
func (r *reader) pair() [2]string         { return [2]string{r.text(), r.text()} }
func (r *reader) pairs() [][2]string      { return list(r, r.pair) }
func (r *reader) label() blixard.Label    { return blixard.Label{Key: r.text(), Value: r.text()} }
func (r *reader) labels() []blixard.Label { return list(r, r.label) }

// version reads the protocol's version, which begins INIT and RESTORE.
func (r *reader) version() {
	if v := r.uint(); r.err == nil && v != Version {
		r.err = fmt.Errorf("the host speaks version %d of the call protocol, this guest version %d", v, Version)
		r.b = nil
	}
}

func (w *writer) init(i *Init) {
	w.uint(Version)
	for _, s := range []string{i.Function, i.Version, i.ARN, i.Region, i.Runtime, i.Handler} {
		w.text(s)
	}
	w.texts(i.Command)
	w.int(int64(i.Port))
	w.labels(i.Env)
	for _, n := range []int64{i.MemoryMiB, i.EphemeralMiB, i.TimeoutMS, i.InitMS, int64(i.Concurrency), i.MaxPayload, i.MaxResponse, i.MaxStream} {
		w.int(n)
	}
	for _, s := range []string{i.LogGroup, i.LogStream, i.InitializationType, i.CodeDevice, i.RuntimeDevice} {
		w.text(s)
	}
	w.int(i.UnixNano)
	w.bytes(i.Entropy)
	for _, s := range []string{i.Hostname, i.Address, i.Gateway} {
		w.text(s)
	}
	w.texts(i.DNS)
	w.int(int64(i.MTU))
}

func (r *reader) init() (i Init) {
	r.version()
	for _, s := range []*string{&i.Function, &i.Version, &i.ARN, &i.Region, &i.Runtime, &i.Handler} {
		*s = r.text()
	}
	i.Command = r.texts()
	i.Port = int(r.int())
	i.Env = r.labels()
	for _, n := range []*int64{&i.MemoryMiB, &i.EphemeralMiB, &i.TimeoutMS, &i.InitMS} {
		*n = r.int()
	}
	i.Concurrency = int(r.int())
	for _, n := range []*int64{&i.MaxPayload, &i.MaxResponse, &i.MaxStream} {
		*n = r.int()
	}
	for _, s := range []*string{&i.LogGroup, &i.LogStream, &i.InitializationType, &i.CodeDevice, &i.RuntimeDevice} {
		*s = r.text()
	}
	i.UnixNano = r.int()
	i.Entropy = r.bytes()
	for _, s := range []*string{&i.Hostname, &i.Address, &i.Gateway} {
		*s = r.text()
	}
	i.DNS = r.texts()
	i.MTU = int(r.int())
	return i
}

func (w *writer) identity(i *Identity) {
	w.uint(Version)
	w.uint(i.Epoch)
	w.int(i.UnixNano)
	w.bytes(i.Entropy)
	for _, s := range []string{i.MachineID, i.BootID, i.Hostname, i.Instance, i.Node, i.MAC, i.Address, i.Gateway} {
		w.text(s)
	}
	w.texts(i.DNS)
	w.int(int64(i.MTU))
	w.text(i.LogStream)
	w.text(i.InitType)
	w.int(i.RestoreMS)
	w.flag(i.CheckClone)
}

func (r *reader) identity() (i Identity) {
	r.version()
	i.Epoch = r.uint()
	i.UnixNano = r.int()
	i.Entropy = r.bytes()
	for _, s := range []*string{&i.MachineID, &i.BootID, &i.Hostname, &i.Instance, &i.Node, &i.MAC, &i.Address, &i.Gateway} {
		*s = r.text()
	}
	i.DNS = r.texts()
	i.MTU = int(r.int())
	i.LogStream = r.text()
	i.InitType = r.text()
	i.RestoreMS = r.int()
	i.CheckClone = r.flag()
	return i
}

func (w *writer) ready(v *Ready) {
	w.duration(v.Init)
	w.duration(v.Boot)
	w.int(v.UsedMiB)
}

func (r *reader) ready() (v Ready) {
	v.Init = r.duration()
	v.Boot = r.duration()
	v.UsedMiB = r.int()
	return v
}

// failure is the payload of FAIL. Without a type it is not the function's.
type failure struct {
	errorType, message string
	body               []byte
}

func (w *writer) failure(f failure) {
	w.text(f.errorType)
	w.text(f.message)
	w.bytes(f.body)
}

func (r *reader) failure() (f failure) {
	f.errorType = r.text()
	f.message = r.text()
	f.body = r.bytes()
	return f
}

func (w *writer) ack(a *Ack) {
	w.duration(a.Took)
	w.duration(a.Hook)
	w.texts(a.Seen)
}

func (r *reader) ack() (a Ack) {
	a.Took = r.duration()
	a.Hook = r.duration()
	a.Seen = r.texts()
	return a
}

func (w *writer) stat(s *Stat) {
	w.int(s.UsedMiB)
	w.int(s.PeakMiB)
	w.duration(s.CPU)
	w.int(int64(s.Processes))
	w.int(int64(s.Open))
	w.flag(s.Busy)
	w.flag(s.RuntimeUp)
	w.uint(s.Invocations)
}

func (r *reader) stat() (s Stat) {
	s.UsedMiB = r.int()
	s.PeakMiB = r.int()
	s.CPU = r.duration()
	s.Processes = int(r.int())
	s.Open = int(r.int())
	s.Busy = r.flag()
	s.RuntimeUp = r.flag()
	s.Invocations = r.uint()
	return s
}

// request is everything but the payload, whose size is in the head and whose
// first part follows.
func (w *writer) request(q *Request) {
	for _, s := range []string{q.RequestID, q.ARN, q.TraceID, q.ClientContext, q.Tenant} {
		w.text(s)
	}
	w.int(q.DeadlineMS)
	w.int(q.RemainingMS)
	w.flag(q.Stream)
	w.flag(q.HTTP != nil)
	if h := q.HTTP; h != nil {
		w.text(h.Method)
		w.text(h.Target)
		w.text(h.Host)
		w.pairs(h.Headers)
	}
	w.uint(uint64(len(q.Payload)))
}

func (r *reader) request(q *Request) (payloadBytes uint64) {
	for _, s := range []*string{&q.RequestID, &q.ARN, &q.TraceID, &q.ClientContext, &q.Tenant} {
		*s = r.text()
	}
	q.DeadlineMS = r.int()
	q.RemainingMS = r.int()
	q.Stream = r.flag()
	if r.flag() {
		q.HTTP = &blixard.HTTPRequest{Method: r.text(), Target: r.text(), Host: r.text(), Headers: r.pairs()}
	}
	return r.uint()
}

func (w *writer) head(h blixard.ResponseHead) {
	w.int(int64(h.Status))
	w.pairs(h.Headers)
	w.text(h.ContentType)
	w.flag(h.Streaming)
}

func (r *reader) head() (h blixard.ResponseHead) {
	h.Status = int(r.int())
	h.Headers = r.pairs()
	h.ContentType = r.text()
	h.Streaming = r.flag()
	return h
}

// outcome is everything of RESULT but a head and a body that may follow.
func (w *writer) outcome(o *Outcome) {
	w.flag(o.Error != nil)
	if o.Error != nil {
		w.text(o.Error.Kind)
		w.text(o.Error.Type)
	}
	w.text(o.Detail)
	w.duration(o.Handler)
	w.duration(o.Init)
	w.int(o.UsedMiB)
	w.int(o.Dropped)
	w.flag(o.Broken)
}

func (r *reader) outcome() (o Outcome) {
	if r.flag() {
		o.Error = &blixard.FunctionError{Kind: r.text(), Type: r.text()}
	}
	o.Detail = r.text()
	o.Handler = r.duration()
	o.Init = r.duration()
	o.UsedMiB = r.int()
	o.Dropped = r.int()
	o.Broken = r.flag()
	return o
}
