package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// completionLimit bounds how long a shell waits for names.
const completionLimit = time.Second

func (a *app) completion() *cobra.Command {
	return &cobra.Command{
		Use: "completion bash|zsh|fish", Short: "Print the completion script of a shell", Args: takes("bash|zsh|fish"),
		Long: `Print the completion script of a shell. Names of VMs, instances and nodes are
completed from the cluster.

  bash:  source <(blixard completion bash)
  zsh:   blixard completion zsh > "${fpath[1]}/_blixard"
  fish:  blixard completion fish > ~/.config/fish/completions/blixard.fish`,
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf("shell", args[0], []string{"bash", "zsh", "fish"}); err != nil {
				return err
			}
			root := cmd.Root()
			switch args[0] {
			case "bash":
				if err := root.GenBashCompletionV2(a.env.Stdout, true); err != nil {
					return err
				}
				_, err := io.WriteString(a.env.Stdout, bashWords)
				return err
			case "zsh":
				return root.GenZshCompletion(a.env.Stdout)
			default:
				return root.GenFishCompletion(a.env.Stdout, true)
			}
		},
	}
}

// bashWords makes the script work where the package bash-completion is not
// loaded: the words come from the shell then, which splits them at = and : too;
// those are put together again.
const bashWords = `
if ! declare -F _get_comp_words_by_ref >/dev/null 2>&1; then
    __blixard_init_completion()
    {
        COMPREPLY=()
        words=()
        local i word glue=""
        for ((i = 0; i <= COMP_CWORD; i++)); do
            word="${COMP_WORDS[i]}"
            if [[ ${#words[@]} -gt 0 && ( $word == [=:]* || $glue == *[=:] ) && ( -n $word || $glue == *= ) ]]; then
                words[${#words[@]}-1]+="$word"
            else
                words+=("$word")
            fi
            glue="$word"
        done
        cword=$((${#words[@]} - 1))
        cur="${words[cword]}"
        prev=""
        if ((cword > 0)); then prev="${words[cword-1]}"; fi
    }
fi
`

// live asks the cluster for names; when it does not answer at once there are
// none.
func (a *app) live(ctx context.Context, list func(context.Context, *client.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completionLimit)
	defer cancel()
	c, err := client.New(client.Options{Addresses: a.addresses(), Token: a.credentials(), RetryFor: -1})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	names, err := list(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func vmNamesOf(ctx context.Context, c *client.Client) ([]string, error) {
	got, err := c.ListVMs(ctx, &blixardv1.ListVMsRequest{WithoutInstances: true, Consistency: blixardv1.Consistency_CONSISTENCY_STALE, Limit: 1000})
	var out []string
	for _, vm := range got.GetVms() {
		out = append(out, vm.Name+"\t"+fmt.Sprintf("%s %d/%d", vm.Phase, vm.Ready, vm.GetSpec().GetReplicas()))
	}
	return out, err
}

func instanceNamesOf(ctx context.Context, c *client.Client) ([]string, error) {
	got, err := c.ListInstances(ctx, &blixardv1.ListInstancesRequest{Consistency: blixardv1.Consistency_CONSISTENCY_STALE})
	var out []string
	for _, i := range got.GetInstances() {
		if name := i.Id + "\t" + i.State + " on " + i.Node; !terminalState(i) {
			out = append(out, name)
		}
	}
	return out, err
}

func nodeNamesOf(ctx context.Context, c *client.Client) ([]string, error) {
	got, err := c.ListNodes(ctx, &blixardv1.ListNodesRequest{Consistency: blixardv1.Consistency_CONSISTENCY_STALE})
	var out []string
	for _, n := range got.GetNodes() {
		out = append(out, n.Id+"\t"+n.State)
	}
	return out, err
}

// completeVMs completes names of VMs that are not there yet on the line.
func (a *app) completeVMs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	names, directive := a.live(cmd.Context(), vmNamesOf)
	return slices.DeleteFunc(names, func(n string) bool {
		name, _, _ := strings.Cut(n, "\t")
		return slices.Contains(args, name)
	}), directive
}

func (a *app) completeOneVM(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.live(cmd.Context(), vmNamesOf)
}

func (a *app) completeOneNode(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.live(cmd.Context(), nodeNamesOf)
}

// completeTargets completes VMs and instances.
func (a *app) completeTargets(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.live(cmd.Context(), func(ctx context.Context, c *client.Client) ([]string, error) {
		vms, err := vmNamesOf(ctx, c)
		if err != nil {
			return nil, err
		}
		instances, err := instanceNamesOf(ctx, c)
		return append(vms, instances...), err
	})
}

// completeObjects completes kinds, and behind "vm/" their names.
func (a *app) completeObjects(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	kind, _, slash := kindName(toComplete)
	if len(args) == 1 && !strings.Contains(args[0], "/") {
		kind, slash = args[0], false
	} else if !slash {
		return kinds, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	list := map[string]func(context.Context, *client.Client) ([]string, error){"vm": vmNamesOf, "node": nodeNamesOf, "instance": instanceNamesOf, "function": functionNamesOf}[strings.TrimSuffix(kind, "s")]
	if list == nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, directive := a.live(cmd.Context(), list)
	if slash {
		for i := range names {
			names[i] = kind + "/" + names[i]
		}
	}
	return names, directive
}
