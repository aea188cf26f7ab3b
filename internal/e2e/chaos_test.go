package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// TestChaos kills servers at random while clients create, scale, delete and
// read VMs and real guests serve HTTP. Afterwards: every acknowledged operation
// is there and the history is linearizable, no incarnation ran twice, all
// replicas hold the same state, and deleting everything leaves nothing.
func TestChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("needs real guests and a minute")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	c := Start(t, 3)
	c.Must("vm", "create", "web", "--replicas", "2", "--memory", "128M", "--publish", "80", "--timeout", "3m")

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	history := &history{start: time.Now()}
	for i := range 4 {
		wg.Go(func() { churn(ctx, c, history, i, rand.New(rand.NewPCG(seed, uint64(i)+2))) })
	}
	probe := &prober{c: c, answered: map[string]int{}}
	wg.Go(func() { probe.run(ctx) })
	seen := &incarnations{c: c, at: map[string]string{}}
	wg.Go(func() { seen.run(ctx) })

	end := time.Now().Add(chaosFor())
	for time.Now().Before(end) {
		switch node := c.Nodes[rng.IntN(len(c.Nodes))]; rng.IntN(5) {
		case 0: // out for longer than its lease: its instances move
			c.Kill(node)
			wait(9 * time.Second)
			c.Restart(node)
		case 1: // a hypervisor dies
			if vms := c.hypervisors(); len(vms) > 0 {
				kill(t, vms[rng.IntN(len(vms))].Pid)
			}
		default: // back before anybody misses it
			c.Kill(node)
			wait(time.Duration(200+rng.IntN(1500)) * time.Millisecond)
			c.Restart(node)
		}
		wait(time.Duration(1000+rng.IntN(3000)) * time.Millisecond)
	}
	c.WaitReady(3)
	c.Eventually("both replicas run again", time.Minute, func() error {
		if out, _, _ := c.CLI("vm", "status", "web"); strings.Count(out, "Running") != 2 {
			return errors.New(out)
		}
		return nil
	})
	cancel()
	wg.Wait()

	t.Logf("%d operations, %d of them without an answer; guests answered %d times, longest gap %s; %d incarnations seen",
		len(history.ops), history.unknown.Load(), probe.total, probe.longest.Round(time.Millisecond), len(seen.at))
	for _, twice := range seen.twice {
		t.Errorf("an incarnation ran twice: %s", twice)
	}
	if probe.total == 0 {
		t.Error("no guest ever answered")
	}
	history.check(t, c)
	c.sameState(t)
	c.Must("vm", "delete", "web", "--timeout", "2m")
	c.nothingLeft(t)
}

func chaosFor() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("BLIXARD_CHAOS_FOR")); err == nil {
		return d
	}
	return 50 * time.Second
}

func kill(t *testing.T, pid int) {
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Error(err)
	}
}

func wait(d time.Duration) { <-time.After(d) }

// op is one operation of a client on one name.
type op struct {
	Kind     string // create, scale, delete, get
	Name     string
	Replicas int32
	// Answer.
	OK      bool
	Code    blixard.Code
	Seen    int32 // replicas read by get, -1: not there
	Unknown bool  // may or may not have happened
}

// history records operations with their times.
type history struct {
	mu      sync.Mutex
	start   time.Time
	ops     []porcupine.Operation
	unknown atomic.Int64
}

func (h *history) add(client int, o op, call, ret time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if o.Unknown {
		h.unknown.Add(1)
		ret = h.start.Add(24 * time.Hour) // it may take effect at any later time
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: o, Output: o, Call: call.Sub(h.start).Nanoseconds(), Return: ret.Sub(h.start).Nanoseconds()})
}

// churn works on a few names through any node until ctx ends.
func churn(ctx context.Context, c *Cluster, h *history, id int, rng *rand.Rand) {
	for n := 0; ctx.Err() == nil; n++ {
		cl, err := client.New(client.Options{Addresses: []string{c.Nodes[rng.IntN(3)].Address}, Token: c.Token, RetryFor: -1})
		if err != nil {
			c.t.Error(err)
			return
		}
		for range 20 {
			if ctx.Err() != nil {
				break
			}
			// A name is used for a while and then left, so that the ambiguous
			// operations on one name stay few enough to check.
			o := op{Name: fmt.Sprintf("reg%d-%d", n/4, rng.IntN(4)), Replicas: int32(rng.IntN(1000))}
			o.Kind = []string{"create", "scale", "scale", "delete", "get", "get"}[rng.IntN(6)]
			call := time.Now()
			do(ctx, cl, &o)
			if ctx.Err() != nil && o.Kind == "get" {
				break
			}
			h.add(id, o, call, time.Now())
			if o.Unknown {
				wait(50 * time.Millisecond)
				break
			}
			wait(time.Duration(5+rng.IntN(10)) * time.Millisecond)
		}
		cl.Close()
	}
}

func do(ctx context.Context, cl *client.Client, o *op) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var err error
	switch o.Kind {
	case "create":
		no := false
		_, err = cl.CreateVM(ctx, &blixardv1.CreateVMRequest{Name: o.Name, Start: &no, Spec: &blixardv1.VMSpec{Replicas: &o.Replicas}})
	case "scale":
		_, err = cl.ScaleVM(ctx, &blixardv1.ScaleVMRequest{Name: o.Name, Replicas: &o.Replicas})
	case "delete":
		_, err = cl.DeleteVM(ctx, &blixardv1.DeleteVMRequest{Name: o.Name})
	case "get":
		var res *blixardv1.GetVMResponse
		res, err = cl.GetVM(ctx, &blixardv1.GetVMRequest{Name: o.Name})
		o.Seen = -1
		if err == nil {
			o.Seen = res.GetVm().GetSpec().GetReplicas()
		}
	}
	o.OK = err == nil
	o.Code = blixard.CodeOf(err)
	var known *blixard.Error
	o.Unknown = err != nil && (!errors.As(err, &known) || known.Code == blixard.CodeUnavailable || known.Code == blixard.CodeInternal || known.Code == blixard.CodeOverloaded)
}

// model is what the API promises of one name: -1 absent, else the replicas.
var model = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		by, order := map[string][]porcupine.Operation{}, []string{}
		for _, o := range all {
			name := o.Input.(op).Name
			if by[name] == nil {
				order = append(order, name)
			}
			by[name] = append(by[name], o)
		}
		out := make([][]porcupine.Operation, 0, len(order))
		for _, name := range order {
			out = append(out, by[name])
		}
		return out
	},
	Init: func() any { return int32(-1) },
	Step: func(s, in, _ any) (bool, any) {
		state, o := s.(int32), in.(op)
		absent := state < 0
		switch o.Kind {
		case "create":
			switch {
			case o.Unknown && absent, o.OK && absent:
				return true, o.Replicas
			case o.Unknown:
				return true, state
			}
			return !absent && o.Code == blixard.CodeExists, state
		case "scale":
			switch {
			case o.Unknown && !absent, o.OK && !absent:
				return true, o.Replicas
			case o.Unknown:
				return true, state
			}
			return absent && o.Code == blixard.CodeNotFound, state
		case "delete":
			switch {
			case o.Unknown, o.OK && !absent:
				return true, int32(-1)
			}
			return absent && o.Code == blixard.CodeNotFound, state
		default: // get
			if o.Unknown {
				return true, state
			}
			return o.Seen == state, state
		}
	},
	DescribeOperation: func(in, _ any) string { return fmt.Sprintf("%+v", in) },
}

// check adds what every name holds now as last reads, and asks whether one
// order explains everything. An unknown operation that never happened would
// break a model in which it must: it is put at the end of time, after the last
// reads, where it harms nobody.
func (h *history) check(t *testing.T, c *Cluster) {
	t.Helper()
	cl := c.Client()
	defer cl.Close()
	names := map[string]bool{}
	for _, o := range h.ops {
		names[o.Input.(op).Name] = true
	}
	for name := range names {
		o := op{Kind: "get", Name: name}
		call := time.Now()
		do(context.Background(), cl, &o)
		if o.Unknown {
			t.Fatalf("reading %s at the end: %s", name, o.Code)
		}
		h.add(99, o, call, time.Now())
	}
	result, _ := porcupine.CheckOperationsVerbose(model, h.ops, 2*time.Minute)
	if result != porcupine.Ok {
		t.Errorf("the history is not linearizable: %s", result)
	}
	if len(h.ops) < 200 {
		t.Errorf("only %d operations: the test shows little", len(h.ops))
	}
}

// prober asks the guests by HTTP, again and again.
type prober struct {
	c        *Cluster
	answered map[string]int
	total    int
	longest  time.Duration
}

func (p *prober) run(ctx context.Context) {
	cl := p.c.Client()
	defer cl.Close()
	h := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	last := time.Now()
	for ctx.Err() == nil {
		short, cancel := context.WithTimeout(ctx, 3*time.Second)
		res, err := cl.GetVM(short, &blixardv1.GetVMRequest{Name: "web"})
		cancel()
		if err == nil {
			for _, i := range res.GetVm().GetInstances() {
				if i.GetState() != "Running" || i.GetAddress() == "" {
					continue
				}
				answer, err := h.Get("http://" + i.GetAddress() + "/")
				if err != nil {
					continue
				}
				body, err := io.ReadAll(io.LimitReader(answer.Body, 4096))
				answer.Body.Close()
				if err == nil && strings.Contains(string(body), i.GetId()) {
					p.total++
					p.answered[i.GetId()]++
					p.longest = max(p.longest, time.Since(last))
					last = time.Now()
				}
			}
		}
		wait(200 * time.Millisecond)
	}
}

// incarnations watches the hypervisor processes: one incarnation is one process,
// ever.
type incarnations struct {
	c     *Cluster
	at    map[string]string // incarnation -> pid and start time
	twice []string
}

func (s *incarnations) run(ctx context.Context) {
	for ctx.Err() == nil {
		for _, p := range s.c.hypervisors() {
			name := ""
			for i, a := range p.Args {
				if a == "-name" && i+1 < len(p.Args) {
					name, _, _ = strings.Cut(p.Args[i+1], ",")
				}
			}
			if name == "" {
				continue
			}
			who := fmt.Sprintf("%d@%s", p.Pid, p.Start)
			if was, ok := s.at[name]; ok && was != who {
				s.twice = append(s.twice, fmt.Sprintf("%s as %s and as %s", name, was, who))
			}
			s.at[name] = who
		}
		wait(100 * time.Millisecond)
	}
}

// sameState waits until all nodes have applied the same, and compares.
func (c *Cluster) sameState(t *testing.T) {
	t.Helper()
	c.Eventually("equal states on all nodes", 30*time.Second, func() error {
		var first []byte
		for _, n := range c.Nodes {
			cl, err := client.New(client.Options{Addresses: []string{n.Address}, Token: c.Token})
			if err != nil {
				return err
			}
			var b strings.Builder
			err = cl.DownloadSnapshot(context.Background(), &b)
			cl.Close()
			if err != nil {
				return err
			}
			if first == nil {
				first = []byte(b.String())
			} else if string(first) != b.String() {
				return fmt.Errorf("%s differs from %s", n.Name, c.Nodes[0].Name)
			}
		}
		return nil
	})
}

// nothingLeft checks that no hypervisor, socket or directory of an instance is
// left.
func (c *Cluster) nothingLeft(t *testing.T) {
	t.Helper()
	c.Eventually("nothing left behind", 60*time.Second, func() error {
		if left := c.hypervisors(); len(left) > 0 {
			return fmt.Errorf("%d hypervisors: %v", len(left), left[0].Args)
		}
		for _, n := range c.Nodes {
			var found []string
			err := filepath.WalkDir(filepath.Join(n.Dir, "vms"), func(path string, d os.DirEntry, err error) error {
				if err == nil && strings.Contains(filepath.Base(path), "web-") {
					found = append(found, path)
				}
				return nil
			})
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if len(found) > 0 {
				return fmt.Errorf("%s keeps %v", n.Name, found)
			}
		}
		return nil
	})
}
