package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/blixard/blixard"
	"github.com/blixard/blixard/client"
)

// exitInterrupted is what shells expect after Ctrl-C: 128 + SIGINT.
const exitInterrupted = 130

// exitCodes is the documentation of client.ExitCode; a test compares them.
var exitCodes = []struct {
	exit int
	code blixard.Code // "" when no error of the cluster belongs to it
	what string
}{
	{0, "", "done, and the effect is there (with --no-wait or --dry-run: accepted)"},
	{1, blixard.CodeInternal, "failed for a reason of no kind below; a check of `blixard doctor` failed"},
	{2, blixard.CodeInvalid, "the command line, a file or the request is wrong; nothing was changed"},
	{3, blixard.CodeNotFound, "what was named is not there"},
	{4, blixard.CodeExists, "the name is taken"},
	{5, blixard.CodeConflict, "it was changed meanwhile, or is in the wrong state"},
	{6, blixard.CodeRefused, "cannot be done now: no node fits, last voter, not in this build, …"},
	{7, blixard.CodeUnavailable, "no node or no leader could be reached, or the effect did not show within --timeout"},
	{8, blixard.CodeOverloaded, "the cluster is overloaded; try again later"},
	{9, blixard.CodeDenied, "not allowed: the token is missing or wrong"},
	{10, blixard.CodeGone, "what was asked for is no longer kept"},
	{exitFunctionError, "", "the function that was called has failed; its error is on standard output"},
	{exitInterrupted, "", "interrupted by Ctrl-C; what was asked for goes on"},
}

// guestExitError carries the exit code of a command that ran in a guest; there is
// nothing to say about it.
type guestExitError int

func (g guestExitError) Error() string { return fmt.Sprintf("the command ended with %d", int(g)) }

// report tells an error to the user and returns the exit code.
func (a *app) report(err error) int {
	if inGuest, ok := errors.AsType[guestExitError](err); ok {
		return int(inGuest)
	}
	if silent, ok := errors.AsType[silentError](err); ok {
		return int(silent)
	}
	if many, ok := errors.AsType[documentErrors](err); ok {
		for _, line := range many.lines() { // as editors know to read them
			a.note("%s", line)
		}
		return client.ExitCode(blixard.Errorf(blixard.CodeInvalid, "documents"))
	}
	if blixard.CodeOf(err) == blixard.CodeInternal && errors.Is(err, context.DeadlineExceeded) {
		err = &blixard.Error{Code: blixard.CodeUnavailable, Message: "no answer in time", Hint: "is the node there? --request-timeout gives it longer"}
	}
	var e *blixard.Error
	if errors.As(err, &e) && e.Hint != "" {
		// What was wrapped round the error stays in front of it.
		text := strings.TrimSuffix(strings.Replace(err.Error(), e.Error(), e.Message, 1), " ("+e.Hint+")")
		a.say("%s", text)
		fmt.Fprintf(a.env.Stderr, "  hint: %s\n", e.Hint)
	} else {
		a.say("%v", err)
	}
	return client.ExitCode(err)
}

// silentError is an exit code after everything was said.
type silentError int

func (s silentError) Error() string { return fmt.Sprintf("exit %d", int(s)) }

// say writes a line of words.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.env.Stderr, "blixard: "+format+"\n", args...)
}

// note writes a line of words without the program's name.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.env.Stderr, format+"\n", args...)
}

// flagError explains a flag that cannot be used.
func flagError(cmd *cobra.Command, err error) error {
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		var known []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				known = append(known, f.Name)
			}
		})
		name := unknown.GetSpecifiedName()
		hint := "`" + cmd.CommandPath() + " --help` lists the flags"
		if near := blixard.Nearest(name, known); near != "" && len(name) > 1 {
			hint = "did you mean --" + near + "? " + hint
		}
		flag := "--" + name
		if len(name) == 1 {
			flag = "-" + name
		}
		return blixard.Invalid(flag, hint, "%s has no flag %s", cmd.CommandPath(), flag)
	}
	if value, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		flag := "--" + value.GetFlag().Name
		if e, ok := errors.AsType[*blixard.Error](value.Unwrap()); ok {
			return &blixard.Error{Code: blixard.CodeInvalid, Field: flag, Hint: e.Hint, Message: flag + ": " + e.Message}
		}
		return blixard.Invalid(flag, kindHint(value.GetFlag().Value.Type()), "%s: %q cannot be used", flag, value.GetValue())
	}
	return blixard.Invalid("flags", "`"+cmd.CommandPath()+" --help` lists the flags", "%s", err.Error())
}

func kindHint(kind string) string {
	switch kind {
	case "duration":
		return "write a duration such as 500ms, 30s or 2m"
	case "int", "int32", "int64":
		return "write a whole number"
	case "bool":
		return "write true or false"
	}
	return ""
}

// groupRun is what a command with subcommands does by itself.
func groupRun(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	var known []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			known = append(known, c.Name())
			known = append(known, c.Aliases...)
		}
	}
	hint := "`" + cmd.CommandPath() + " --help` lists the commands"
	if near := blixard.Nearest(args[0], known); near != "" {
		hint = "did you mean `" + cmd.CommandPath() + " " + near + "`? " + hint
	}
	return blixard.Invalid("command", hint, "%s has no command %q", cmd.CommandPath(), args[0])
}

// takes checks the number of arguments. A last name of "NAME…" stands for one
// or more, one in brackets may be left out.
func takes(names ...string) cobra.PositionalArgs {
	least, most := 0, len(names)
	for _, n := range names {
		if !strings.HasPrefix(n, "[") {
			least++
		}
		if strings.HasSuffix(n, "…") || strings.HasSuffix(n, "…]") {
			most = 1 << 20
		}
	}
	return func(cmd *cobra.Command, args []string) error {
		usage := cmd.CommandPath() + strings.TrimPrefix(cmd.Use, cmd.Name())
		switch {
		case len(args) < least:
			return blixard.Invalid("arguments", "usage: "+usage, "%s needs %s", cmd.CommandPath(), names[len(args)])
		case len(args) > most:
			return blixard.Invalid("arguments", "usage: "+usage, "%s does not know what to do with %q", cmd.CommandPath(), args[most])
		}
		return nil
	}
}

// explainArguments gives commands whose arguments are checked by the library,
// such as those of Env.Extra, the words and the exit code of all others.
func explainArguments(cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		explainArguments(c)
	}
	check := cmd.Args
	if check == nil {
		return
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		if _, explained := errors.AsType[*blixard.Error](err); err == nil || explained {
			return err
		}
		usage := "usage: " + cmd.UseLine()
		if len(args) > 0 && check(cmd, nil) == nil {
			return blixard.Invalid("arguments", usage, "%s does not know what to do with %q", cmd.CommandPath(), args[0])
		}
		return blixard.Invalid("arguments", usage, "%s: %v", cmd.CommandPath(), err)
	}
}

// helpCommand is `blixard help [command | exit-codes]`.
func (a *app) helpCommand() *cobra.Command {
	help := &cobra.Command{
		Use: "help [COMMAND…]", Short: "Help about a command or a topic (exit-codes, filters, documents)",
		Annotations: map[string]string{"own-output": "yes"},
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			out := []string{"exit-codes", "filters", "documents"}
			for _, c := range cmd.Root().Commands() {
				if c.IsAvailableCommand() {
					out = append(out, c.Name())
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if topic := topics[args[0]]; topic != nil {
					topic(a.env.Stdout)
					return nil
				}
			}
			found, rest, err := cmd.Root().Find(args)
			if err != nil || found == nil || len(rest) > 0 && found.HasSubCommands() {
				return blixard.Invalid("command", "`blixard --help` lists the commands", "there is no help about %q", strings.Join(args, " "))
			}
			return found.Help()
		},
	}
	return help
}

var topics = map[string]func(io.Writer){
	"exit-codes": writeExitCodes, "filters": writeFilterHelp, "documents": writeDocumentHelp,
}

func writeExitCodes(w io.Writer) {
	fmt.Fprintln(w, "CODE  MEANING")
	for _, row := range exitCodes {
		fmt.Fprintf(w, "%-4d  %s\n", row.exit, row.what)
	}
	fmt.Fprintln(w, "\n`blixard vm exec` ends with the exit code of the command in the guest; when that\ncould not be run, with one of these codes and a line that begins with \"blixard:\".")
}

// asError is errors.As for the cluster's error.
func asError(err error, e **blixard.Error) bool { return errors.As(err, e) }
