package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// maxLogLine bounds what is held back of a line that has not ended.
const maxLogLine = 64 << 10

func (a *app) vmLogs() *cobra.Command {
	var follow bool
	var tail int32
	cmd := &cobra.Command{
		Use: "logs NAME", Short: "The console log of a VM's instances, or of one instance", Args: takes("NAME"), ValidArgsFunction: a.completeTargets,
		Long: `Print the console log of a VM, or of one of its instances (webapp-2).
When there are several instances each line begins with the one it is of. Following
rides out nodes that restart; what is written meanwhile is left out.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if tail < -1 {
				return blixard.Invalid("--tail", "give a number of lines, or -1 for all that is kept", "--tail is %d", tail)
			}
			return a.logs(cmd.Context(), args[0], follow, tail)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on, until Ctrl-C")
	cmd.Flags().Int32Var(&tail, "tail", -1, "begin with the last so many lines of each instance; -1: all that is kept")
	return cmd
}

// target finds the VM, and the instance if the name is one's.
func (a *app) target(ctx context.Context, name string) (vm *blixardv1.VM, instance string, err error) {
	if err := checkTarget(name); err != nil {
		return nil, "", err
	}
	got, err := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name})
	if err == nil {
		return got.Vm, "", nil
	}
	at := strings.LastIndexByte(name, '-')
	if blixard.CodeOf(err) != blixard.CodeNotFound || at <= 0 {
		return nil, "", err
	}
	if _, notNumber := strconv.Atoi(name[at+1:]); notNumber != nil {
		return nil, "", err
	}
	of, ofErr := ask(ctx, a, (*client.Client).GetVM, &blixardv1.GetVMRequest{Name: name[:at]})
	if ofErr != nil {
		return nil, "", err
	}
	for _, i := range of.Vm.Instances {
		if i.Id == name {
			return of.Vm, name, nil
		}
	}
	return nil, "", &blixard.Error{
		Code: blixard.CodeNotFound, Message: fmt.Sprintf("the VM %s has no instance %s", of.Vm.Name, name), Hint: "`blixard vm status " + of.Vm.Name + "` lists them",
	}
}

// checkTarget checks the name of a VM or an instance: an instance's may be
// longer by its ordinal.
func checkTarget(name string) error {
	if at := strings.LastIndexByte(name, '-'); at > 0 && len(name) <= 63 {
		if _, err := strconv.Atoi(name[at+1:]); err == nil {
			return blixard.CheckName(name[:at])
		}
	}
	return blixard.CheckName(name)
}

func (a *app) logs(ctx context.Context, name string, follow bool, tail int32) error {
	vm, instance, err := a.target(ctx, name)
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	req := &blixardv1.LogsRequest{Vm: vm.Name, Instance: instance, Follow: follow}
	if tail >= 0 {
		req.TailLines = &tail
	}
	out := &logLines{w: a.env.Stdout, prefix: instance == "" && vm.GetSpec().GetReplicas() > 1, rest: map[string][]byte{}}
	for told := false; ; told = true {
		err = c.Logs(ctx, req, func(m *blixardv1.LogsResponse) error { return out.take(m.Instance, m.Data) })
		out.flush()
		if follow && ctx.Err() != nil {
			return nil //nolint:nilerr // Ctrl-C is how following ends
		}
		if !follow || blixard.CodeOf(err) != blixard.CodeUnavailable {
			return err
		}
		if !told {
			a.say("%v; going on when it is back, with what is written from then on", err)
		}
		req.TailLines = new(int32(0))
		select {
		case <-time.After(logsAgain):
		case <-ctx.Done():
			return nil
		}
	}
}

// logsAgain is how long following waits before it looks whether a node is back.
const logsAgain = time.Second

// logLines puts the instance before each line when several are mixed.
type logLines struct {
	w      io.Writer
	prefix bool
	rest   map[string][]byte // of each instance, the line that has not ended
	order  []string
}

func (l *logLines) take(instance string, data []byte) error {
	if !l.prefix {
		_, err := l.w.Write(data)
		return err
	}
	if _, known := l.rest[instance]; !known {
		l.order = append(l.order, instance)
	}
	buf := append(l.rest[instance], data...)
	var b bytes.Buffer
	for {
		at := bytes.IndexByte(buf, '\n')
		if at < 0 && len(buf) < maxLogLine {
			break
		}
		line := buf
		if at >= 0 {
			line, buf = buf[:at], buf[at+1:]
		} else {
			buf = nil
		}
		fmt.Fprintf(&b, "%s | %s\n", instance, bytes.TrimSuffix(line, []byte("\r")))
	}
	l.rest[instance] = bytes.Clone(buf)
	_, err := l.w.Write(b.Bytes())
	return err
}

// flush writes lines that never ended.
func (l *logLines) flush() {
	for _, instance := range l.order {
		if rest := l.rest[instance]; len(rest) > 0 {
			fmt.Fprintf(l.w, "%s | %s\n", instance, rest)
			l.rest[instance] = nil
		}
	}
}
