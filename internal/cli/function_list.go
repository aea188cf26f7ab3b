package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) functionList() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List functions, and where their instances are", Aliases: []string{"ls"}, Args: takes(),
		Long: "List functions with a sentence each; -o wide has columns.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if flags.watch {
				return blixard.Invalid("--watch", "`blixard function watch NAME` shows what happens", "the list of functions cannot be watched")
			}
			list, err := ask(cmd.Context(), a, (*client.Client).ListFunctions, &blixardv1.ListFunctionsRequest{})
			if err != nil {
				return err
			}
			return a.printFunctions(a.env.Stdout, list.Functions, flags)
		},
	}
	flags.add(cmd, false)
	completeSortOf(cmd, "function")
	a.mayBeStale(cmd)
	return cmd
}

// printFunctions prints functions: sentences for people who have not asked for
// more.
func (a *app) printFunctions(w io.Writer, functions []*blixardv1.Function, flags listFlags) error {
	l := functionListing(functions, time.Now())
	if a.output != formatTable || len(functions) == 0 {
		return a.print(w, l, flags)
	}
	if err := l.narrow(flags); err != nil {
		return err
	}
	for _, r := range l.rows {
		f, _ := r.object.(*blixardv1.Function)
		fmt.Fprintln(w, visible(f.GetName())+" ("+visible(functionSentence(f))+")")
	}
	return nil
}

func functionListing(functions []*blixardv1.Function, now time.Time) *listing {
	l := &listing{
		key: "functions", empty: "there are no functions; `blixard function create NAME --config CODE` makes one",
		columns: []column{
			{name: "NAME"},
			{name: "STATE"},
			{name: "RUNTIME"},
			{name: "INSTANCES"},
			{name: "WARM"},
			{name: "BUSY"},
			{name: "NODES"},
			{name: "MEMORY"},
			{name: "AGE"},
			{name: "TIMEOUT", wide: true},
			{name: "CONCURRENT", wide: true},
			{name: "REASON", wide: true},
		},
	}
	for _, f := range functions {
		v := f.GetLatest()
		count, nodes := countInstances(f)
		l.rows = append(l.rows, row{
			name: "function/" + f.Name, object: f,
			cells: []cell{
				str(f.Name), str(functionState(f)), str(v.GetSpec().GetRuntime()), num(count.Instances), num(count.Warm), num(count.Busy), str(strings.Join(nodes, ",")),
				mib(v.GetSpec().GetMemoryMib()), age(now, f.CreatedMs), str(durationText(v.GetSpec().GetTimeoutMs())), num(f.GetSettings().GetMaxConcurrent()), str(v.GetStateReason()),
			},
		})
	}
	return l
}

func functionState(f *blixardv1.Function) string {
	if f.Deleting {
		return "Deleting"
	}
	return f.GetLatest().GetState()
}

// countInstances adds up what nodes do for a function, and names those that do
// something.
func countInstances(f *blixardv1.Function) (sum *blixardv1.FunctionOnNode, nodes []string) {
	sum = &blixardv1.FunctionOnNode{}
	for _, n := range f.Nodes {
		sum.Instances += n.Instances
		sum.Warm += n.Warm
		sum.Busy += n.Busy
		sum.Starting += n.Starting
		if n.Instances > 0 {
			nodes = append(nodes, n.Node)
		}
	}
	slices.Sort(nodes)
	return sum, nodes
}

// functionSentence says what a function's instances do: "1 instance warm on
// node3".
func functionSentence(f *blixardv1.Function) string {
	var busyOn, warmOn []string
	busy, warm, starting := int32(0), int32(0), int32(0)
	for _, n := range f.Nodes {
		if n.Busy > 0 {
			busyOn = append(busyOn, n.Node)
		}
		if n.Warm > 0 {
			warmOn = append(warmOn, n.Node)
		}
		busy, warm, starting = busy+n.Busy, warm+n.Warm, starting+n.Starting
	}
	var parts []string
	if busy > 0 {
		parts = append(parts, instances(busy)+" running on "+strings.Join(busyOn, ", "))
	}
	if starting > 0 {
		parts = append(parts, instances(starting)+" starting")
	}
	if warm > 0 {
		parts = append(parts, instances(warm)+" warm on "+strings.Join(warmOn, ", "))
	}
	if len(parts) == 0 {
		parts = append(parts, "0 instances running, 0 warm")
	}
	v := f.GetLatest()
	switch {
	case f.Deleting:
		parts = append(parts, "being deleted")
	case v.GetState() == string(blixard.FunctionPending):
		parts = append(parts, "its template is being built")
	case v.GetState() == string(blixard.FunctionFailed):
		parts = append(parts, "failed: "+firstOf(v.GetStateReason(), v.GetStateCode()))
	}
	if len(f.SilentNodes) > 0 {
		parts = append(parts, "no answer from "+strings.Join(f.SilentNodes, ", "))
	}
	return strings.Join(parts, ", ")
}

func instances(n int32) string {
	if n == 1 {
		return "1 instance"
	}
	return fmt.Sprintf("%d instances", n)
}

func (a *app) functionDescribe() *cobra.Command {
	cmd := &cobra.Command{
		Use: "describe NAME", Short: "All about a function", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: args[0]})
			if err != nil {
				return err
			}
			if a.output != formatTable && a.output != formatWide {
				if a.output == formatName {
					return a.done("function", args[0], "")
				}
				return a.printObject(a.env.Stdout, got.Function)
			}
			describeFunction(a.env.Stdout, got.Function, time.Now())
			return nil
		},
	}
	a.mayBeStale(cmd)
	return cmd
}

func describeFunction(w io.Writer, f *blixardv1.Function, now time.Time) {
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-20s%s\n", key, visible(value))
		}
	}
	v := f.GetLatest()
	s := v.GetSpec()
	line("Name", f.Name)
	line("State", strings.TrimSuffix(functionState(f)+", "+v.GetStateReason(), ", "))
	line("Instances", functionSentence(f))
	line("Description", s.GetDescription())
	line("Runtime", s.GetRuntime())
	line("Handler", s.GetHandler())
	line("Command", commandText(s.GetCommand()))
	line("Code", fmt.Sprintf("sha256:%s, %d bytes", v.GetCodeDigest(), v.GetCodeBytes()))
	line("Memory", blixard.FormatMiB(s.GetMemoryMib()))
	line("vCPUs", fmt.Sprint(s.GetVcpus()))
	line("Timeout", durationText(s.GetTimeoutMs()))
	line("Network", s.GetNetwork())
	line("Environment", strings.Join(sortedPairs(s.GetEnv()), " "))
	sc := s.GetScaling()
	line("Concurrency", fmt.Sprintf("%d at once in the cluster, %d in an instance", f.GetSettings().GetMaxConcurrent(), sc.GetTargetConcurrency()))
	line("Scaling", scalingText(sc))
	line("Rate limit", rateText(f.GetSettings()))
	p := s.GetPlacement()
	line("Placement", strings.Join(p.GetStrategies(), ", "))
	line("Constraints", strings.Join(p.GetConstraints(), ", "))
	line("Preferences", preferencesText(p.GetPreferences()))
	line("Data hints", strings.Join(p.GetDataHints(), ", "))
	for _, t := range f.Triggers {
		line("Trigger", triggerText(t))
	}
	for _, u := range f.Urls {
		line("URL", fmt.Sprintf("http://%s/ (%s, %s)", u.Host, u.Auth, u.InvokeMode))
	}
	for _, al := range f.Aliases {
		line("Alias", aliasText(al))
	}
	for _, c := range f.GetSettings().GetAsync() {
		line("Asynchronous", asyncText(c))
	}
	for _, n := range f.Nodes {
		line("On "+n.Node, strings.TrimSuffix(fmt.Sprintf("%d instances (%d warm, %d busy, %d starting), %d hypervisors spawned ahead, %d slots, template %s: %s", n.Instances, n.Warm, n.Busy, n.Starting, n.Pooled, n.Slots, n.Template, n.TemplateReason), ": "))
	}
	line("Created", when(f.CreatedMs, now))
	line("Changed", when(f.UpdatedMs, now))
}

func sortedPairs(m map[string]string) []string {
	var out []string
	for k, v := range m {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

func scalingText(sc *blixardv1.FunctionScaling) string {
	limit := "as many as concurrency needs"
	if sc.GetMaxInstances() > 0 {
		limit = fmt.Sprint(sc.GetMaxInstances())
	}
	return fmt.Sprintf("%d to %s, idle ones kept for %s, ended after %d calls", sc.GetMinInstances(), limit, firstOf(durationText(sc.GetScaleDownDelayMs()), "0s"), sc.GetRecycleCalls())
}

func rateText(s *blixardv1.FunctionSettings) string {
	var parts []string
	if n := s.GetRateLimit(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d calls/s", n))
	}
	if n := s.GetCallerLimit(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d calls/s of one caller", n))
	}
	return strings.Join(parts, ", ")
}

func triggerText(t *blixardv1.FunctionTrigger) string {
	text := t.Kind + " " + firstOf(strings.Join(t.Methods, "|"), "ANY") + " " + t.Host + t.Path
	if t.Qualifier != "" {
		text += " -> " + t.Qualifier
	}
	return text + " (" + t.Id + ")"
}

func aliasText(al *blixardv1.FunctionAlias) string {
	text := al.Name + " -> " + al.Version
	if al.SecondWeight > 0 {
		text += fmt.Sprintf(" (%g %% to %s)", al.SecondWeight*100, al.SecondVersion)
	}
	return strings.TrimSpace(text + " " + al.Description)
}

func asyncText(c *blixardv1.FunctionAsync) string {
	text := fmt.Sprintf("%s: %d retries, at most %s old", c.Qualifier, c.GetMaxRetries(), durationText(c.MaxAgeMs))
	if c.OnSuccess != "" {
		text += ", successes to " + c.OnSuccess
	}
	if c.OnFailure != "" {
		text += ", failures to " + c.OnFailure
	}
	return text
}

func (a *app) functionExplain() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "explain NAME[:QUALIFIER]", Short: "What each node says to a call of a function now, and why", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).ExplainFunction, &blixardv1.ExplainFunctionRequest{Name: name, Qualifier: qualifier})
			if err != nil {
				return err
			}
			return a.print(a.env.Stdout, candidateListing(got), flags)
		},
	}
	flags.add(cmd, false)
	return cmd
}

func candidateListing(got *blixardv1.ExplainFunctionResponse) *listing {
	l := &listing{
		key: "nodes", empty: "there are no nodes",
		columns: []column{{name: "NODE"}, {name: "FITS"}, {name: "SCORE"}, {name: "RESOURCES"}, {name: "DATA"}, {name: "NETWORK"}, {name: "SPECIALIZATION"}, {name: "WHY NOT"}},
		after:   "a cold start would go to " + got.Chosen,
		whole:   func([]any) any { return got },
	}
	if got.Chosen == "" {
		l.after = "no node fits now"
	}
	for _, n := range got.Nodes {
		fits := "no"
		if n.Fits {
			fits = "yes"
		}
		l.rows = append(l.rows, row{name: "node/" + n.Node, object: n, cells: []cell{
			str(n.Node), str(fits), num(n.Score), num(n.Resources), num(n.DataLocality), num(n.NetworkProximity), num(n.Specialization), str(strings.Join(n.Reasons, "; ")),
		}})
	}
	return l
}

func functionNamesOf(ctx context.Context, c *client.Client) ([]string, error) {
	got, err := c.ListFunctions(ctx, &blixardv1.ListFunctionsRequest{WithoutNodes: true})
	var out []string
	for _, f := range got.GetFunctions() {
		out = append(out, f.Name)
	}
	return out, err
}

func (a *app) completeFunctions(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.live(cmd.Context(), functionNamesOf)
}

func (a *app) completeOneFunction(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.live(cmd.Context(), functionNamesOf)
}
