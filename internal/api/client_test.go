package api_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
	"github.com/blixard/blixard/internal/api/apitest"
	"github.com/blixard/blixard/internal/record"
	"github.com/blixard/blixard/internal/state"
)

func TestClientGoesOnToAnotherNode(t *testing.T) {
	s := newSite(t, 2)
	c := s.client("node1", "node2")
	if _, err := c.GetVersion(short(t), &blixardv1.GetVersionRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := s.servers["node1"].Close(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	v, err := c.GetVersion(short(t), &blixardv1.GetVersionRequest{})
	if err != nil || v.Node != "node2" || time.Since(start) > time.Second {
		t.Errorf("%v, %v after %s", v, err, time.Since(start))
	}
}

func TestClientRepeatsSafely(t *testing.T) {
	s := newSite(t, 1)
	c := s.client()
	var keys []string
	s.cluster.LoseWith(func(e state.Envelope) error {
		keys = append(keys, e.Key)
		if len(keys) <= 3 {
			return blixard.Errorf(blixard.CodeUnavailable, "the answer is lost")
		}
		return nil
	})
	change, err := c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) != 4 || keys[0] == "" || keys[0] != keys[3] || change.Version != s.cluster.View().VM("web").Version {
		t.Errorf("keys %v, change %v", keys, change)
	}
	s.cluster.LoseWith(nil)
	// The next call is another one.
	_, err = c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "web"})
	if e := wantCode(t, err, blixard.CodeExists); e.Version != change.Version || e.Hint == "" {
		t.Errorf("%+v", e)
	}
	// Who gives a key gets the first answer over calls, too.
	for range 2 {
		again, err := c.ScaleVM(short(t), &blixardv1.ScaleVMRequest{Name: "web", Replicas: new(int32(7)), IdempotencyKey: "mine"})
		if err != nil || again.Noop {
			t.Errorf("%v, %v", again, err)
		}
	}
}

func TestApplyRepeatsSafely(t *testing.T) {
	s := newSite(t, 1)
	lost := 0
	s.cluster.LoseWith(func(state.Envelope) error {
		if lost++; lost == 1 {
			return blixard.Errorf(blixard.CodeUnavailable, "the answer is lost")
		}
		return nil
	})
	req := &blixardv1.ApplyVMsRequest{}
	for i := range 100 {
		req.Vms = append(req.Vms, &blixardv1.VMDocument{Name: fmt.Sprintf("vm%d", i), Spec: &blixardv1.VMSpec{Env: map[string]string{"A": "1", "B": "2", "C": "3"}}})
	}
	answer, err := s.client().ApplyVMs(short(t), req)
	if err != nil || answer.Change.Noop || lost != 2 {
		t.Fatalf("%v after %d tries", err, lost)
	}
	if s.cluster.View().VMCount() != 100 {
		t.Errorf("%d VMs", s.cluster.View().VMCount())
	}
	answer, err = s.client().ApplyVMs(short(t), req)
	if err != nil || !answer.Change.Noop || answer.Results[99].Action != "unchanged" {
		t.Errorf("again: %v, %v", answer.GetChange(), err)
	}
	names := &blixardv1.DeleteVMsRequest{Names: []string{"vm1", "vm2", "vm-none"}, IgnoreMissing: true, IdempotencyKey: "gone"}
	for range 2 {
		if change, err := s.client().DeleteVMs(short(t), names); err != nil || change.Noop {
			t.Errorf("%v, %v", change, err)
		}
	}
}

func TestClientGivesUp(t *testing.T) {
	s := newSite(t, 1)
	tries := 0
	s.cluster.FailWith(func(state.Envelope) error {
		tries++
		return blixard.Errorf(blixard.CodeOverloaded, "the queue is full")
	})
	c, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}, Token: token, RetryFor: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	_, err = c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "web"})
	wantCode(t, err, blixard.CodeOverloaded)
	if tries < 2 || time.Since(start) > 2*time.Second {
		t.Errorf("%d tries in %s", tries, time.Since(start))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err = s.client().CreateVM(ctx, &blixardv1.CreateVMRequest{Name: "web"})
	if wantCode(t, err, blixard.CodeOverloaded); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	nobody, err := client.New(client.Options{Addresses: []string{"127.0.0.1:1"}, RetryFor: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	_, err = nobody.ListVMs(short(t), &blixardv1.ListVMsRequest{})
	if e := wantCode(t, err, blixard.CodeUnavailable); !strings.Contains(e.Message, "127.0.0.1:1") || !strings.Contains(e.Hint, "blixard server") {
		t.Errorf("%+v", e)
	}
	if client.ExitCode(err) != 7 {
		t.Errorf("exit code %d", client.ExitCode(err))
	}
	for _, bad := range []string{"", "host", "ftp://h:1", "h:1/path", "http://user@h:1", "a b:1"} {
		if _, err := client.New(client.Options{Addresses: []string{bad}}); blixard.CodeOf(err) != blixard.CodeInvalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestReadsWithoutALeader(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	s.cluster.FailReads(blixard.Errorf(blixard.CodeUnavailable, "there is no leader"))
	c, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}, Token: token, RetryFor: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.GetVM(short(t), &blixardv1.GetVMRequest{Name: "web"})
	wantCode(t, err, blixard.CodeUnavailable)
	if _, err := c.GetVM(short(t), &blixardv1.GetVMRequest{Name: "web", Consistency: blixardv1.Consistency_CONSISTENCY_STALE}); err != nil {
		t.Error(err)
	}
	if _, err := c.GetStatus(short(t), &blixardv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	index, c := s.cluster.View().Index, s.client()
	change, err := c.ScaleVM(short(t), &blixardv1.ScaleVMRequest{Name: "web", Replicas: new(int32(3)), DryRun: true})
	if err != nil || !change.DryRun || change.Noop {
		t.Errorf("%v, %v", change, err)
	}
	_, err = c.CreateVM(short(t), &blixardv1.CreateVMRequest{Name: "web", DryRun: true})
	wantCode(t, err, blixard.CodeExists)
	made, err := c.CreateToken(short(t), &blixardv1.CreateTokenRequest{DryRun: true})
	if err != nil || made.Token != "" {
		t.Errorf("%v, %v", made, err)
	}
	member, err := c.AddNode(short(t), &blixardv1.AddNodeRequest{Node: &blixardv1.NodeIdentity{Name: "n", Address: "10.0.0.1:1"}, DryRun: true})
	if err != nil || member.Secret != "" {
		t.Errorf("%v, %v", member, err)
	}
	if now := s.cluster.View().Index; now != index {
		t.Errorf("index %d, was %d", now, index)
	}
}

func TestJoinByToken(t *testing.T) {
	s := newSite(t, 1)
	c := s.client()
	made, err := c.CreateToken(short(t), &blixardv1.CreateTokenRequest{IdempotencyKey: "k1"})
	if err != nil || !strings.HasPrefix(made.Token, "blx1."+made.Id+".") {
		t.Fatalf("%v, %v", made, err)
	}
	again, err := c.CreateToken(short(t), &blixardv1.CreateTokenRequest{IdempotencyKey: "k1"})
	if err != nil || again.Token != made.Token || again.ExpiresMs != made.ExpiresMs {
		t.Errorf("a repeat made %v, %v", again, err)
	}
	other, err := c.CreateToken(short(t), &blixardv1.CreateTokenRequest{})
	if err != nil || other.Token == made.Token {
		t.Errorf("another made %v, %v", other, err)
	}
	list, err := c.ListTokens(short(t), &blixardv1.ListTokensRequest{})
	if err != nil || len(list.Tokens) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	_, secret, _ := strings.Cut(strings.TrimPrefix(made.Token, "blx1."), ".")
	s.cluster.View().Tokens(func(stored *state.Token) bool {
		if strings.Contains(stored.Hash, secret) {
			t.Error("the state holds the secret")
		}
		return true
	})

	// The joining node has no token for the API.
	stranger, err := client.New(client.Options{Addresses: []string{s.urls["node1"]}})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	lost := 0
	s.cluster.LoseWith(func(state.Envelope) error {
		if lost++; lost == 1 {
			return blixard.Errorf(blixard.CodeUnavailable, "the answer is lost")
		}
		return nil
	})
	me := &blixardv1.NodeIdentity{Name: "node9", Address: "10.0.0.9:7400", Labels: map[string]string{"disk": "ssd"}}
	member, err := stranger.Join(short(t), &blixardv1.JoinRequest{Token: made.Token, Node: me})
	if err != nil || member.RaftId != 2 || member.Secret != apitest.Secret || len(member.Members) != 2 || lost != 2 {
		t.Fatalf("%v, %v", member, err)
	}
	_, err = stranger.Join(short(t), &blixardv1.JoinRequest{Token: made.Token, Node: &blixardv1.NodeIdentity{Name: "node8", Address: "10.0.0.8:7400"}})
	wantCode(t, err, blixard.CodeDenied)
	_, err = stranger.ListVMs(short(t), &blixardv1.ListVMsRequest{})
	wantCode(t, err, blixard.CodeDenied)
	if _, err := c.RevokeToken(short(t), &blixardv1.RevokeTokenRequest{Id: other.Id}); err != nil {
		t.Error(err)
	}
	_, err = stranger.Join(short(t), &blixardv1.JoinRequest{Token: other.Token, Node: &blixardv1.NodeIdentity{Name: "node8", Address: "10.0.0.8:7400"}})
	wantCode(t, err, blixard.CodeDenied)
}

func TestSnapshotDownload(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	var b bytes.Buffer
	if err := s.client().DownloadSnapshot(short(t), &b); err != nil {
		t.Fatal(err)
	}
	_, body := s.do("GET", "/v1/cluster/snapshot", "")
	if b.Len() < 100 || body != b.String() {
		t.Errorf("%d bytes by RPC, %d by REST", b.Len(), len(body))
	}
}

func TestRecord(t *testing.T) {
	s := newSite(t, 1)
	s.create("web", 1)
	var b bytes.Buffer
	if err := s.client().Record(short(t), 0, false, &b); err != nil {
		t.Fatal(err)
	}
	_, body := s.do("GET", "/v1/cluster/record", "")
	if !record.Is(b.Bytes()) || body != b.String() {
		t.Errorf("%d bytes by RPC, %d by REST", b.Len(), len(body))
	}
	// What is followed ends without an error when the caller leaves.
	ctx, leave := context.WithCancel(short(t))
	followed := leaving{leave: leave}
	if err := s.client().Record(ctx, 0, true, &followed); err != nil || followed.Len() >= b.Len() || !record.Is(followed.Bytes()) {
		t.Errorf("%d bytes, %v", followed.Len(), err)
	}
}

// leaving is a reader of a stream that leaves after the first part.
type leaving struct {
	bytes.Buffer
	leave func()
}

func (l *leaving) Write(b []byte) (int, error) {
	defer l.leave()
	return l.Buffer.Write(b)
}

func TestManyClientsAtOnce(t *testing.T) {
	s := newSite(t, 2)
	c := s.client("node1", "node2")
	var made atomic.Int32
	done := make(chan error, 8)
	for w := range 8 {
		go func() {
			for i := range 20 {
				_, err := c.CreateVM(t.Context(), &blixardv1.CreateVMRequest{Name: fmt.Sprintf("vm-%d-%d", w, i%10)})
				if err == nil {
					made.Add(1)
				} else if blixard.CodeOf(err) != blixard.CodeExists {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if made.Load() != 80 || s.cluster.View().VMCount() != 80 {
		t.Errorf("%d made, %d there", made.Load(), s.cluster.View().VMCount())
	}
}
