package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
)

// logPoll is how often log files are looked at for more.
const logPoll = 200 * time.Millisecond

func (a *app) devLogs() *cobra.Command {
	var follow bool
	var tail int
	cmd := &cobra.Command{
		Use: "logs [NODE…]", Short: "The logs of the servers, made readable", Args: takes("[NODE…]"), ValidArgsFunction: a.completeDevNodes,
		Long: "Print the logs of the servers, made readable; with -o json the lines as they are.",
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := a.needDev(false)
			if err != nil {
				return err
			}
			if tail < 0 {
				return blixard.Invalid("--tail", "", "--tail is %d", tail)
			}
			nodes := d.Nodes
			if len(args) > 0 {
				nodes = nil
				for _, name := range args {
					n, err := d.node(name)
					if err != nil {
						return err
					}
					nodes = append(nodes, n)
				}
			}
			if !follow {
				return a.printLogs(d, nodes, tail)
			}
			if err := a.followLogs(cmd.Context(), d, nodes, tail); err != nil {
				return err
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on, until Ctrl-C")
	cmd.Flags().IntVar(&tail, "tail", 50, "begin with the last so many lines of each node; 0: none")
	return cmd
}

// devLine is a line of a log.
type devLine struct {
	node string
	time string // RFC 3339 sorts as text; "" for what is no JSON
	text string
}

// printLogs prints the last lines of several logs in the order of time.
func (a *app) printLogs(d *devCluster, nodes []*devNode, tail int) error {
	var lines []devLine
	for _, n := range nodes {
		data, err := os.ReadFile(d.logFile(n))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading the log of %s: %w", n.Name, err)
		}
		lines = append(lines, lastLines(n.Name, data, tail)...)
	}
	slices.SortStableFunc(lines, func(x, y devLine) int { return strings.Compare(x.time, y.time) })
	for _, l := range lines {
		a.printLogLine(l.node, l.text)
	}
	return nil
}

// lastLines are the last lines of a log; what is no JSON belongs to the time of
// the line before it.
func lastLines(node string, data []byte, tail int) []devLine {
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	all = all[max(0, len(all)-tail):]
	var out []devLine
	at := ""
	for _, text := range all {
		var entry struct{ Timestamp, Time string }
		if json.Unmarshal([]byte(text), &entry) == nil {
			at = firstOf(entry.Timestamp, entry.Time, at)
		}
		if text != "" {
			out = append(out, devLine{node, at, text})
		}
	}
	return out
}

func (a *app) printLogLine(node, text string) {
	if a.output == formatJSON {
		fmt.Fprintln(a.env.Stdout, text)
		return
	}
	fmt.Fprintf(a.env.Stdout, "%-6s %s\n", node, readableLog(text))
}

// readableLog makes one line of words of a line of JSON.
func readableLog(text string) string {
	entry := map[string]any{}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	if dec.Decode(&entry) != nil {
		return visible(text)
	}
	take := func(keys ...string) string {
		found := ""
		for _, k := range keys {
			if v, ok := entry[k]; ok && found == "" {
				found = fmt.Sprint(v)
			}
			delete(entry, k)
		}
		return found
	}
	at := take("timestamp", "time")
	if t, err := time.Parse(time.RFC3339Nano, at); err == nil {
		at = t.Local().Format("15:04:05.000")
	}
	level := take("level")
	component := take("component")
	message := take("msg", "message")
	take("node_id", "event")
	line := fmt.Sprintf("%s %-5s %-10s %s", at, level, component, message)
	for _, k := range slices.Sorted(maps.Keys(entry)) {
		value := fmt.Sprint(entry[k])
		if strings.ContainsAny(value, " \"") {
			value = fmt.Sprintf("%q", value)
		}
		line += " " + k + "=" + value
	}
	return visible(line)
}

// followLogs prints what is added to the logs until ctx ends.
func (a *app) followLogs(ctx context.Context, d *devCluster, nodes []*devNode, tail int) error {
	if tail > 0 {
		if err := a.printLogs(d, nodes, tail); err != nil {
			return err
		}
	}
	at, rest := map[string]int64{}, map[string][]byte{}
	for _, n := range nodes {
		if info, err := os.Stat(d.logFile(n)); err == nil {
			at[n.Name] = info.Size()
		}
	}
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, n := range nodes {
			data, err := readFrom(d.logFile(n), at[n.Name])
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("reading the log of %s: %w", n.Name, err)
			}
			at[n.Name] += int64(len(data))
			buf := append(rest[n.Name], data...)
			for {
				end := bytes.IndexByte(buf, '\n')
				if end < 0 {
					break
				}
				a.printLogLine(n.Name, string(buf[:end]))
				buf = buf[end+1:]
			}
			rest[n.Name] = bytes.Clone(buf)
		}
	}
}

// readFrom reads up to 1 MiB of a file behind an offset.
func readFrom(path string, offset int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, 1<<20))
}
