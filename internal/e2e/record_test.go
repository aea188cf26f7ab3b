package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// replayReport is what `sim replay -o json` says.
type replayReport struct {
	OK         bool   `json:"ok"`
	From       uint64 `json:"from"`
	To         uint64 `json:"to"`
	Commands   int    `json:"commands"`
	Placements int    `json:"placements"`
	Hashes     int    `json:"hashes"`
	StateHash  string `json:"state_hash"`
	State      struct {
		VMs []struct {
			Name string `json:"name"`
		} `json:"vms"`
	} `json:"state"`
}

// TestRecordAndReplay: the logs of a cluster that loses its leader and takes
// snapshots, as each of its nodes recorded them, replay soundly and to the same
// state; and what is recorded is what would be planned with.
func TestRecordAndReplay(t *testing.T) {
	needs(t, false)
	t.Parallel()
	c := Start(t, 3)
	// One server pretends machines, so that instances are placed without guests.
	last := c.Nodes[2]
	c.Stop(last)
	last.args = append(last.args, "--simulated", "4")
	c.Restart(last)
	c.Eventually("pretended machines and three voters", 60*time.Second, func() error {
		st := decode[struct {
			Nodes []struct{ ID, State, Role string }
		}](t, c.Must("cluster", "status", "-o", "json"))
		ready, voters := 0, 0
		for _, n := range st.Nodes {
			if n.State == "Ready" {
				ready++
			}
			if n.Role == "leader" || n.Role == "voter" {
				voters++
			}
		}
		if ready != 7 || voters != 3 {
			return fmt.Errorf("%d nodes are ready, %d vote", ready, voters)
		}
		return nil
	})
	// More memory than a real node has.
	for i := range 4 {
		c.Must("vm", "create", fmt.Sprintf("vm%d", i), "--replicas", "3", "--memory", "9G")
	}
	c.Must("vm", "delete", "vm0")
	c.Must("cluster", "snapshot", "--addr", c.Nodes[0].Address)
	if leader := c.Leader(); leader != last {
		c.Kill(leader)
		c.Eventually("another leader", 30*time.Second, func() error {
			if now := c.Leader(); now == leader {
				return fmt.Errorf("it is still %s", now.Name)
			}
			return nil
		})
		c.Restart(leader)
	}
	c.Must("vm", "scale", "vm1", "--replicas", "5")
	c.Must("cluster", "drain", last.Name+"-sim-001")
	// Quiet, so that all nodes have applied the same.
	c.Must("vm", "delete", "vm1", "vm2", "vm3")

	dir := t.TempDir()
	replay := func(file string, more ...string) replayReport {
		out := c.Must(append([]string{"sim", "replay", file, "-o", "json"}, more...)...)
		return decode[replayReport](t, out)
	}
	var files []string
	var reports []replayReport
	lowest := uint64(0)
	for _, n := range c.Nodes {
		file := filepath.Join(dir, n.Name+".blxrec")
		c.Eventually(n.Name+" records", 30*time.Second, func() error {
			if _, words, code := c.CLI("cluster", "record", file, "--addr", n.Address); code != 0 {
				return fmt.Errorf("exit code %d: %s", code, words)
			}
			return nil
		})
		r := replay(file)
		if !r.OK || r.Hashes != 1 || r.To <= r.From {
			t.Errorf("%s: %+v", n.Name, r)
		}
		files, reports = append(files, file), append(reports, r)
		if lowest == 0 || r.To < lowest {
			lowest = r.To
		}
	}
	placements := 0
	for i, file := range files {
		if r := replay(file, "--at", fmt.Sprint(lowest)); r.StateHash != replay(files[0], "--at", fmt.Sprint(lowest)).StateHash {
			t.Errorf("%s comes to another state at %d: %+v", file, lowest, r)
		}
		placements = max(placements, reports[i].Placements)
	}
	if placements < 2 {
		t.Errorf("%d placements were recorded", placements)
	}

	// A changed byte is refused, with the place.
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 4
	damaged := filepath.Join(dir, "damaged")
	if err := os.WriteFile(damaged, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, words, code := c.CLI("sim", "replay", damaged); code != 2 {
		t.Errorf("a damaged recording: exit code %d, %s", code, words)
	}

	var plan struct {
		OK   bool     `json:"ok"`
		Lost []string `json:"lost"`
	}
	if err := json.Unmarshal([]byte(c.Must("sim", "plan", "--live", "--lose", last.Name+"-sim-002", "-o", "json")), &plan); err != nil || !plan.OK || len(plan.Lost) != 1 {
		t.Errorf("%+v, %v", plan, err)
	}
}
