package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
)

var clones = flag.Int("clones", 40, "how many clones the test of clone safety makes")

// Clones share nothing by which they could be taken for one another, nor a random
// number, although all of them are copies of one machine.
func testClones(d *deployer) {
	d.laterFunction("clone")
	// An instance makes one call, so that each call has a clone of its own.
	d.ok("function", "create", "clone", "--config", d.probe(), "--timeout", "1m", "--recycle-calls", "1", "--scale-down-delay", "2s")
	d.trigger("clone", "/clone")
	var mu sync.Mutex
	var all []map[string]string
	starts := make(map[string]int)
	var group sync.WaitGroup
	turns := make(chan struct{}, 6)
	for i := range *clones {
		group.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			asked := time.Now()
			got, err := post(d.Context(), d.c.Nodes[i%len(d.c.Nodes)], "POST", "/clone", "", `{"op":"identity"}`)
			var id map[string]string
			if err == nil {
				err = json.Unmarshal([]byte(got.body), &id)
			}
			if err != nil {
				d.Errorf("call %d: %v: %d %.300s", i, err, got.status, got.body)
				return
			}
			clock, err := time.Parse(time.RFC3339Nano, id["clock"])
			if err != nil || clock.Before(asked.Add(-time.Second)) || clock.After(time.Now().Add(time.Second)) {
				d.Errorf("call %d: the clone's clock is at %s (%v), asked at %s", i, id["clock"], err, asked)
			}
			mu.Lock()
			defer mu.Unlock()
			id["ip"] += " of " + got.header.Get("X-Blixard-Node") // each guest has a network of its own, in a range of the node's
			all = append(all, id)
			starts[got.header.Get("X-Blixard-Start")]++
		})
	}
	group.Wait()
	d.Logf("%d clones, started as %v", len(all), starts)
	if starts["warm"] > 0 || starts["booted"] > 0 {
		d.Errorf("not all were clones: %v", starts)
	}
	for _, what := range []string{"random", "urandom", "machine-id", "boot_id", "hostname", "mac", "ip"} {
		seen := make(map[string]bool)
		for _, id := range all {
			v := id[what]
			if v == "" || strings.Contains(v, "none: ") || seen[v] {
				d.Errorf("%s: %q is empty, an error or another clone's", what, v)
			}
			seen[v] = true
		}
	}
}

// A thousand calls at once of a function that may run ten at once: ten run, the
// others are told so, and afterwards all is as before.
func testLimit(d *deployer) {
	const limit, callers = 10, 1000
	l := d.ledger()
	d.laterFunction("ten")
	d.ok("function", "create", "ten", "--config", d.probe(), "--timeout", "1m", "--max-concurrent", fmt.Sprint(limit))
	d.trigger("ten", "/ten")
	var mu sync.Mutex
	statuses := make(map[string]int)
	var group sync.WaitGroup
	for i := range callers {
		group.Go(func() {
			got, err := post(d.Context(), d.c.Nodes[i%len(d.c.Nodes)], "POST", "/ten", "", l.order(fmt.Sprint(i)))
			what := fmt.Sprint(got.status, " ", got.problem())
			if err != nil {
				what = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[what]++
		})
	}
	d.until("as many run as may", 90*time.Second, func() error {
		mu.Lock()
		defer mu.Unlock()
		now, _ := l.count()
		answered := 0
		for _, n := range statuses {
			answered += n
		}
		if now != limit || answered != callers-limit {
			return fmt.Errorf("%d run, of %d calls were answered: %v", now, callers, statuses)
		}
		return nil
	})
	l.open()
	group.Wait()
	if _, most := l.count(); most != limit {
		d.Errorf("%d ran at once", most)
	}
	want := map[string]int{"200 ": limit, "429 ReservedFunctionConcurrentInvocationLimitExceeded": callers - limit}
	if !maps.Equal(statuses, want) {
		d.Errorf("the answers: %v, want %v", statuses, want)
	}
	d.answers("ten", `{}`, `"hello"`)
	d.settled("ten")
	if slots := d.slots("ten"); slots > limit {
		d.Errorf("%d slots are leased", slots)
	}
}

func (d *deployer) slots(name string) int {
	d.Helper()
	sum := 0
	for _, n := range d.function(name).Nodes {
		sum += n.Slots
	}
	return sum
}

// From nothing to ten and back: no process, no directory, no slot.
func testScaleToZero(d *deployer) {
	l := d.ledger()
	d.laterFunction("wave")
	d.ok("function", "create", "wave", "--config", d.probe(), "--timeout", "1m", "--scale-down-delay", "1s")
	d.atZero("wave", 10*time.Second)
	var waits []func() (string, string, int)
	for i := range 10 {
		waits = append(waits, d.start("function", "invoke", "wave", "--data", l.order(fmt.Sprint(i))))
	}
	d.inOrder(l, 10, 60*time.Second)
	if n := d.sum("wave"); n != 10 {
		d.Errorf("%d instances run 10 calls", n)
	}
	l.open()
	for i, wait := range waits {
		if out, words, code := wait(); code != 0 || strings.TrimSpace(out) != `"held"` {
			d.Errorf("call %d: exit code %d\n%s%s", i, code, out, words)
		}
	}
	d.atZero("wave", 30*time.Second)
	d.says("wave (0 instances running, 0 warm)", "function", "list")
	d.ok("function", "delete", "wave")
	d.nothingOfFunctions()
}

func (d *deployer) sum(name string) int {
	d.Helper()
	sum := 0
	for _, n := range d.function(name).Nodes {
		sum += n.Instances
	}
	return sum
}

// The same limit while the leader is killed: the instances that it leaves behind
// count until they have ended for certain.
func testLimitLeaderKilled(d *deployer) {
	const limit = 10
	l := d.ledger()
	d.laterFunction("ten")
	d.ok("function", "create", "ten", "--config", d.probe(), "--timeout", "1m", "--max-concurrent", fmt.Sprint(limit), "--scale-down-delay", "2s")
	d.trigger("ten", "/ten")
	leader := d.c.Leader()
	living := slices.DeleteFunc(slices.Clone(d.c.Nodes), func(n *Node) bool { return n == leader })
	ctx, cancel := context.WithCancel(d.Context())
	defer cancel()
	var mu sync.Mutex
	statuses := make(map[string]int)
	var group sync.WaitGroup
	for i := range 60 { // callers that do not give up
		group.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				node := d.c.Nodes[(i+n)%len(d.c.Nodes)]
				got, err := post(ctx, node, "POST", "/ten", "", l.order(fmt.Sprint(i)))
				what := fmt.Sprint(got.status, " ", got.problem())
				if err != nil {
					what = "no answer"
				}
				mu.Lock()
				statuses[what]++
				mu.Unlock()
				select {
				case <-time.After(100 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	d.inOrder(l, limit, 60*time.Second)
	d.c.Kill(leader)
	// The calls that the dead node held are lost, and others take their place.
	cl := d.c.Client(living...)
	defer cl.Close()
	d.until("another leads", 30*time.Second, func() error {
		st, err := cl.GetStatus(ctx, &blixardv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		if st.GetLeader() == "" || st.GetLeader() == leader.Name {
			return fmt.Errorf("the leader is %q", st.GetLeader())
		}
		return nil
	})
	l.open()
	d.until("calls are answered by the others", 60*time.Second, func() error {
		got, err := post(ctx, living[1], "POST", "/ten", "", "")
		if err != nil || got.status != 200 {
			return fmt.Errorf("%d %.200s %v", got.status, got.body, err) //nolint:errorlint // nil, as a rule
		}
		return nil
	})
	l.shut()
	d.inOrder(l, limit, 60*time.Second)
	l.open()
	cancel()
	group.Wait()
	if _, most := l.count(); most != limit {
		d.Errorf("%d ran at once", most)
	}
	mu.Lock()
	d.Logf("the answers: %v", statuses)
	mu.Unlock()
	d.c.Restart(leader)
	d.c.WaitReady(3)
	d.atZero("ten", 60*time.Second)
	d.answers("ten", `{}`, `"hello"`)
}
