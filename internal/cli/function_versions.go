package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) functionVersions() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "versions NAME", Short: "The versions of a function, and its aliases", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).ListFunctionVersions, &blixardv1.ListFunctionVersionsRequest{Name: args[0]})
			if err != nil {
				return err
			}
			l := &listing{
				key:     "versions",
				columns: []column{{name: "VERSION"}, {name: "STATE"}, {name: "ALIASES"}, {name: "CODE"}, {name: "RUNTIME"}, {name: "MEMORY"}, {name: "AGE"}, {name: "DESCRIPTION", wide: true}, {name: "REASON", wide: true}},
			}
			for _, v := range got.Versions {
				var aliases []string
				for _, al := range got.Aliases {
					if al.Version == v.Version || al.SecondWeight > 0 && al.SecondVersion == v.Version {
						aliases = append(aliases, al.Name)
					}
				}
				l.rows = append(l.rows, row{name: "version/" + args[0] + ":" + v.Version, object: v, cells: []cell{
					str(v.Version), str(v.State), str(strings.Join(aliases, ",")), str(shortImage("sha256:" + v.CodeDigest)), str(v.GetSpec().GetRuntime()),
					mib(v.GetSpec().GetMemoryMib()), age(time.Now(), v.ModifiedMs), str(v.GetSpec().GetDescription()), str(v.StateReason),
				}})
			}
			return a.print(a.env.Stdout, l, flags)
		},
	}
	flags.add(cmd, false)
	a.mayBeStale(cmd)
	return cmd
}

func (a *app) functionPublish() *cobra.Command {
	var description string
	var dryRun, noWait bool
	cmd := &cobra.Command{
		Use: "publish NAME", Short: "Make a version of what $LATEST is now, which never changes", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			got, err := ask(cmd.Context(), a, (*client.Client).PublishFunction, &blixardv1.PublishFunctionRequest{Name: args[0], Description: description, DryRun: dryRun})
			switch {
			case err != nil:
				return err
			case dryRun:
				return a.done("function", args[0], "would be published as version "+got.Version)
			case got.GetChange().GetNoop():
				return a.done("function", args[0]+":"+got.Version, "is what $LATEST is already")
			}
			if !noWait {
				if err := a.awaitVersion(cmd.Context(), args[0], got.Version); err != nil {
					return err
				}
			}
			return a.done("function", args[0]+":"+got.Version, "published")
		},
	}
	cmd.Flags().StringVar(&description, "description", "", "what is special about it, in words")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until it can be called")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}

func (a *app) functionAlias() *cobra.Command {
	var description, canary string
	var remove, dryRun bool
	cmd := &cobra.Command{
		Use: "alias NAME [ALIAS [VERSION]]", Short: "Give a version of a function a name, or move it", Args: takes("NAME", "[ALIAS]", "[VERSION]"), ValidArgsFunction: a.completeOneFunction,
		Long: `List the aliases of a function, show one, or let one point to a version. With
--canary a share of the calls goes to a second version.`,
		Example: `  blixard function alias hello live 3
  blixard function alias hello live 3 --canary 4=10%
  blixard function alias hello live --delete`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := blixard.CheckFunctionName(args[0]); err != nil {
				return err
			}
			switch {
			case remove && len(args) == 2:
				answer, err := ask(cmd.Context(), a, (*client.Client).DeleteFunctionAlias, &blixardv1.DeleteFunctionAliasRequest{Name: args[0], Alias: args[1], DryRun: dryRun})
				if err != nil {
					return err
				}
				return a.done("alias", args[0]+":"+args[1], outcome(answer, dryRun, "deleted"))
			case remove:
				return blixard.Invalid("--delete", "write `blixard function alias NAME ALIAS --delete`", "--delete takes a function and an alias, no version")
			case len(args) < 3:
				if canary != "" || description != "" {
					return blixard.Invalid("arguments", "write `blixard function alias NAME ALIAS VERSION …`", "the version that the alias is to point to is missing")
				}
				return a.listAliases(cmd, args)
			}
			req := &blixardv1.SetFunctionAliasRequest{Name: args[0], Alias: args[1], Version: args[2], Description: description, DryRun: dryRun}
			if canary != "" {
				var err error
				if req.SecondVersion, req.SecondWeight, err = parseCanary(canary); err != nil {
					return err
				}
			}
			answer, err := ask(cmd.Context(), a, (*client.Client).SetFunctionAlias, req)
			if err != nil {
				return err
			}
			return a.done("alias", args[0]+":"+args[1], outcome(answer, dryRun, "points to "+strings.TrimPrefix(aliasText(&blixardv1.FunctionAlias{Version: req.Version, SecondVersion: req.SecondVersion, SecondWeight: req.SecondWeight}), "-> ")))
		},
	}
	f := cmd.Flags()
	f.StringVar(&description, "description", "", "what it is for, in words")
	f.StringVar(&canary, "canary", "", "VERSION=SHARE that gets a share of the calls, such as 4=10%")
	f.BoolVar(&remove, "delete", false, "delete the alias")
	f.BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}

// outcome puts a change into words.
func outcome(c *blixardv1.Change, dryRun bool, words string) string {
	switch {
	case dryRun:
		return "would be: " + words
	case c.GetNoop():
		return "is as wanted already"
	}
	return words
}

// parseCanary reads "4=10%" or "4=0.1".
func parseCanary(text string) (version string, weight float64, err error) {
	version, share, found := strings.Cut(text, "=")
	bad := blixard.Invalid("--canary", "write VERSION=SHARE, such as 4=10% or 4=0.1", "%q is not a version and its share", text)
	if !found || version == "" {
		return "", 0, bad
	}
	percent := strings.HasSuffix(share, "%")
	weight, parseErr := strconv.ParseFloat(strings.TrimSuffix(share, "%"), 64)
	if percent {
		weight /= 100
	}
	if parseErr != nil || weight != weight || weight < 0 || weight > 1 { //nolint:gocritic // NaN differs from itself
		return "", 0, bad
	}
	return version, weight, nil
}

func (a *app) listAliases(cmd *cobra.Command, args []string) error {
	got, err := ask(cmd.Context(), a, (*client.Client).ListFunctionVersions, &blixardv1.ListFunctionVersionsRequest{Name: args[0]})
	if err != nil {
		return err
	}
	l := &listing{key: "aliases", empty: "the function " + args[0] + " has no aliases", columns: []column{{name: "ALIAS"}, {name: "VERSION"}, {name: "CANARY"}, {name: "DESCRIPTION"}}}
	for _, al := range got.Aliases {
		canary := ""
		if al.SecondWeight > 0 {
			canary = fmt.Sprintf("%g %% to %s", al.SecondWeight*100, al.SecondVersion)
		}
		l.rows = append(l.rows, row{name: "alias/" + al.Name, object: al, cells: []cell{str(al.Name), str(al.Version), str(canary), str(al.Description)}})
	}
	if len(args) == 2 {
		if l, err = l.named("alias", args[1]); err != nil {
			return err
		}
	}
	return a.print(a.env.Stdout, l, listFlags{})
}
