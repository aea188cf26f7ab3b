package dispatch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/internal/route"
)

// templateState is how far a template is on this node.
type templateState string

const (
	templateNone     templateState = "none"
	templateFetching templateState = "fetching"
	templateBuilding templateState = "building"
	templateReady    templateState = "ready"
	templateFailed   templateState = "failed"
)

// templateSchema goes into each key; it changes with what this package makes of
// the parts that are in the key.
const templateSchema = "blixard template 1"

// template is the saved guest that instances of a revision are clones of.
type template struct {
	key string // 64 hexadecimal digits

	turn sync.Mutex // held by who makes it
	// Guarded by the templates' mu.
	state  templateState
	bytes  int64 // on the disk
	used   time.Time
	failed time.Time // when it could not be got the last time
	built  time.Time // when it was to be built the last time
	serial uint64    // counts what was made; a template that was made again is another one
	flight *flight   // of makeOnce; nil when none is under way
}

// flight is one attempt to get or make a template, for all who wait for it.
type flight struct {
	done chan struct{}
	err  error // once done is closed
}

// templates are the directories <dir>/<key> of complete templates. One is made
// under another name and renamed: what has a key for a name can be used.
type templates struct {
	dir string
	mu  sync.Mutex
	all map[string]*template // found by key
}

const unfinished = ".making-"

func (d *Dispatcher) openTemplates() error {
	t := &d.templates
	t.dir, t.all = filepath.Join(d.o.Dir, "templates"), map[string]*template{}
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return fmt.Errorf("creating the directory of templates: %w", err)
	}
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return fmt.Errorf("reading the directory of templates: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(t.dir, e.Name())
		if strings.HasPrefix(e.Name(), unfinished) {
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("removing an unfinished template: %w", err)
			}
			continue
		}
		t.all[e.Name()] = &template{key: e.Name(), state: templateReady, bytes: diskUse(path), used: time.Now()}
	}
	return nil
}

func (t *templates) path(key string) string { return filepath.Join(t.dir, key) }

// get is the template of a key, which may not be there.
func (t *templates) get(key string) *template {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := t.all[key]
	if one == nil {
		one = &template{key: key, state: templateNone}
		t.all[key] = one
	}
	return one
}

func (t *templates) state(one *template) templateState {
	t.mu.Lock()
	defer t.mu.Unlock()
	return one.state
}

func (t *templates) ready(one *template) bool { return t.state(one) == templateReady }

func (t *templates) set(one *template, s templateState) {
	t.mu.Lock()
	defer t.mu.Unlock()
	one.state = s
	switch s {
	case templateReady:
		one.serial++
		one.used, one.bytes = time.Now(), diskUse(t.path(one.key))
	case templateFailed, templateNone:
		one.failed = time.Now()
	case templateBuilding, templateFetching:
	}
}

// use is the directory of a template that is to be cloned, and its serial.
func (t *templates) use(one *template) (dir string, serial uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	one.used = time.Now()
	return t.path(one.key), one.serial
}

// fetchable tells whether a template that is not here is to be asked for now.
func (t *templates) fetchable(one *template) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return (one.state == templateNone || one.state == templateFailed) && time.Since(one.failed) >= fetchAgain
}

// tryAgain tells whether a template that is not here is to be built: not again
// and again when that fails.
func (t *templates) tryAgain(one *template) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one.state == templateReady || one.state == templateBuilding || time.Since(one.built) < buildRest {
		return false
	}
	one.built = time.Now()
	return true
}

// buildRest is the least time between two attempts to build a template for
// instances.
const buildRest = time.Minute

// errNoTemplate is of a template that could not be made a moment ago.
var errNoTemplate = errors.New("the template could not be made, which is not tried again yet")

// makeOnce makes sure that a template is here, for all who ask at the same time
// by one attempt, which goes on when they have left: who comes next finds it.
func (d *Dispatcher) makeOnce(ctx context.Context, v *version, t *template) error {
	f, err := d.join(v, t)
	if f == nil {
		return err
	}
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// join is the attempt that is under way, or a new one; none when the template is
// ready or, with an error, cannot be made now.
func (d *Dispatcher) join(v *version, t *template) (*flight, error) {
	d.templates.mu.Lock()
	defer d.templates.mu.Unlock()
	switch {
	case t.state == templateReady:
		return nil, nil //nolint:nilnil // as it says
	case t.flight != nil:
		return t.flight, nil
	case t.state != templateBuilding && t.state != templateFetching: // else it is waited for
		if time.Since(t.built) < buildRest {
			return nil, errNoTemplate
		}
		t.built = time.Now()
	}
	f := &flight{done: make(chan struct{}), err: errNoTemplate}
	t.flight = f
	d.chores.do(func(ctx context.Context) {
		f.err = d.haveTemplate(ctx, v, t)
		if f.err != nil {
			d.log.Warn("making a function's template", "event", "template", "function", v.rev.String(), "error", f.err)
		}
		d.templates.mu.Lock()
		t.flight = nil
		d.templates.mu.Unlock()
		close(f.done)
	})
	return f, nil
}

// discard takes a template out of use that cannot be cloned; it is made again.
// One that was made after that serial stays.
func (t *templates) discard(one *template, serial uint64) {
	one.turn.Lock()
	defer one.turn.Unlock()
	if !t.withdraw(one, serial) {
		return
	}
	// What is left is removed by the next attempt to make it.
	if err := os.RemoveAll(t.path(one.key)); err != nil {
		t.set(one, templateFailed)
	}
}

func (t *templates) withdraw(one *template, serial uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one.serial != serial {
		return false
	}
	one.serial++
	one.state, one.failed = templateNone, time.Now()
	return true
}

// put makes a finished directory the template. Callers hold turn.
func (t *templates) put(one *template, made string) error {
	if err := os.RemoveAll(t.path(one.key)); err != nil {
		return fmt.Errorf("removing a former template: %w", err)
	}
	if err := os.Rename(made, t.path(one.key)); err != nil {
		return fmt.Errorf("keeping the template: %w", err)
	}
	t.set(one, templateReady)
	return nil
}

// sweep removes templates nobody wants, and those used longest ago when all
// together take more than the limit.
func (t *templates) sweep(wanted map[string]bool, limit int64) []string {
	t.mu.Lock()
	var old []*template
	total := int64(0)
	for _, one := range t.all { //order:any sorted below
		if one.state == templateReady {
			old = append(old, one)
			total += one.bytes
		} else if !wanted[one.key] && one.state != templateBuilding && one.state != templateFetching {
			delete(t.all, one.key)
		}
	}
	slices.SortFunc(old, func(a, b *template) int { return a.used.Compare(b.used) })
	var out []*template
	for _, one := range old {
		const grace = time.Minute // what was just built may be wanted in a moment
		if !wanted[one.key] && time.Since(one.used) > grace || total > limit {
			out = append(out, one)
			total -= one.bytes
		}
	}
	t.mu.Unlock()
	var keys []string
	for _, one := range out {
		_, serial := t.use(one)
		t.discard(one, serial)
		keys = append(keys, one.key)
	}
	return keys
}

// diskUse is what a directory's files take of the disk, in bytes.
func diskUse(dir string) (bytes int64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		var info fs.FileInfo
		if info, err = e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				bytes += st.Blocks * 512
			}
		}
	}
	return bytes
}

// wanted is the template that instances of a version are to be clones of, nil
// when they are booted or it is not known yet.
func (d *Dispatcher) wanted(v *version) *template {
	d.mu.Lock()
	defer d.mu.Unlock()
	return v.template
}

// templateKey names everything that a template of a version is made of.
func (d *Dispatcher) templateKey(ctx context.Context, v *version) (string, error) {
	machine, err := d.cloner.TemplateKey(ctx)
	if err != nil {
		return "", fmt.Errorf("asking the hypervisor what templates depend on: %w", err)
	}
	bundle, err := d.o.Images.Function(ctx)
	if err != nil {
		return "", err
	}
	runtime, err := d.o.Images.Runtime(ctx, blixard.RuntimeKind(v.spec.Runtime))
	if err != nil {
		return "", fmt.Errorf("finding the runtime: %w", err)
	}
	spec := v.spec
	// What does not reach the guest before it is saved.
	spec.Description, spec.Placement, spec.Snapshot = "", blixard.FunctionPlacement{}, ""
	spec.MinInstances, spec.MaxInstances, spec.ScaleDownDelayMS, spec.Burst, spec.RecycleCalls = 0, 0, 0, 0, 0
	text, err := json.Marshal(struct {
		Schema, Machine, Image, Runtime, Code, ARN, Version string
		UID                                                 uint64
		Spec                                                blixard.FunctionSpec
	}{templateSchema, machine, bundle.Digest, runtime.Digest, v.code, v.arn, blixard.VersionName(v.rev.Number), v.rev.UID, spec})
	if err != nil {
		return "", fmt.Errorf("naming the template: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// haveTemplate makes sure that a template is here: from a peer, or built.
func (d *Dispatcher) haveTemplate(ctx context.Context, v *version, t *template) error {
	if d.templates.ready(t) || d.fetchTemplate(ctx, v, t) {
		return nil
	}
	return d.buildTemplate(ctx, v, t)
}

// buildTemplate boots a guest, has it initialise the function and saves it.
func (d *Dispatcher) buildTemplate(ctx context.Context, v *version, t *template) (err error) {
	t.turn.Lock()
	defer t.turn.Unlock()
	if d.templates.ready(t) {
		return nil
	}
	leave, err := d.bootRoom(ctx)
	if err != nil {
		return err
	}
	defer leave()
	d.templates.set(t, templateBuilding)
	began := time.Now()
	defer func() {
		if err != nil {
			d.templates.set(t, templateFailed)
		}
	}()
	in := &instance{v: v}
	in.ctx, in.cancel = context.WithTimeout(ctx, 2*bootLimit+d.initLimit(ctx, v))
	defer in.cancel()
	d.mu.Lock()
	d.nameInstance(in)
	d.mu.Unlock()
	defer d.leavePlace(in)
	in.turn.Lock()
	defer in.turn.Unlock()
	made := filepath.Join(d.templates.dir, unfinished+in.name)
	defer func() {
		err = errors.Join(err, d.remove(in))
		if err != nil {
			err = errors.Join(err, os.RemoveAll(made))
		}
	}()
	spec, err := d.spec(in.ctx, in)
	if err != nil {
		return err
	}
	if spec.Template, err = filepath.Abs(made); err != nil {
		return fmt.Errorf("naming the template's directory: %w", err)
	}
	// Every clone gets a network of its own when it is told who it is.
	if _, err := d.boot(in.ctx, in, spec); err != nil {
		return err
	}
	if err := d.cloner.Snapshot(in.ctx, in.ref); err != nil {
		return fmt.Errorf("saving the guest: %w", err)
	}
	if err := d.templates.put(t, made); err != nil {
		return err
	}
	d.tell(v.rev, "template", in.name, fmt.Sprintf("built in %d ms", time.Since(began).Milliseconds()))
	poke(d.look)
	return nil
}

// probe boots a guest once, to see that the function starts.
func (d *Dispatcher) probe(ctx context.Context, v *version) (err error) {
	in := &instance{v: v}
	in.ctx, in.cancel = context.WithTimeout(ctx, bootLimit+d.initLimit(ctx, v))
	defer in.cancel()
	d.mu.Lock()
	d.nameInstance(in)
	d.mu.Unlock()
	defer d.leavePlace(in)
	in.turn.Lock()
	defer in.turn.Unlock()
	defer func() { err = errors.Join(err, d.remove(in)) }()
	return d.bootUp(in)
}

// tell records something for those who watch a function.
func (d *Dispatcher) tell(rev route.Revision, kind, instance, text string) {
	d.events.add(Event{TimeMS: time.Now().UnixMilli(), Function: rev.Function, Number: rev.Number, Node: d.o.Node, Kind: kind, Instance: instance, Text: text})
}
