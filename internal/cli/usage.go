package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"
)

// usage writes how a command is used, no wider than the terminal.
func (a *app) usage(cmd *cobra.Command) error {
	width, _ := terminal(a.env.Stdout)
	if width == 0 {
		width = 80
	}
	width = max(width, 40)
	w := cmd.OutOrStderr()
	fmt.Fprint(w, "Usage:\n")
	var subs []*cobra.Command
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() || c.Name() == "help" {
			subs = append(subs, c)
		}
	}
	if len(subs) > 0 {
		fmt.Fprintf(w, "  %s COMMAND\n\nCommands:\n", cmd.CommandPath())
		longest := 0
		for _, c := range subs {
			longest = max(longest, len(c.Name()))
		}
		for _, c := range subs {
			hanging(w, fmt.Sprintf("  %-*s  ", longest, c.Name()), c.Short, width)
		}
	} else {
		hanging(w, "  ", cmd.UseLine(), width)
	}
	if len(cmd.Aliases) > 0 {
		fmt.Fprintf(w, "\nAliases:\n  %s\n", cmd.NameAndAliases())
	}
	if cmd.HasExample() {
		fmt.Fprintf(w, "\nExamples:\n%s\n", strings.TrimRight(cmd.Example, "\n"))
	}
	if cmd.HasAvailableLocalFlags() {
		fmt.Fprintf(w, "\nFlags:\n%s", cmd.LocalFlags().FlagUsagesWrapped(width))
	}
	if cmd.HasAvailableInheritedFlags() {
		fmt.Fprintf(w, "\nGlobal flags:\n%s", cmd.InheritedFlags().FlagUsagesWrapped(width))
	}
	if len(subs) > 0 {
		fmt.Fprintf(w, "\n\"%s COMMAND --help\" tells more about a command.\n", cmd.CommandPath())
	}
	return nil
}

// hanging writes a text behind its head, wrapped at the words, the lines after
// the first below its begin.
func hanging(w io.Writer, head, words string, width int) {
	indent := strings.Repeat(" ", len(head))
	for i, line := range strings.Split(text.WrapSoft(words, max(width-len(head)-1, 20)), "\n") {
		if i > 0 {
			head = indent
		}
		fmt.Fprintf(w, "%s%s\n", head, strings.TrimRight(line, " "))
	}
}
