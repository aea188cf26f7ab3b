package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) tokenCreate() *cobra.Command {
	var ttl time.Duration
	var uses int32
	var node string
	var change changeFlags
	cmd := &cobra.Command{
		Use: "create", Short: "Make a token that lets a node join; it is shown this once", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl < time.Second {
				return blixard.Invalid("--ttl", "write a duration such as 24h", "--ttl is %s; it must be at least 1s", ttl)
			}
			if uses < -1 || uses == 0 {
				return blixard.Invalid("--uses", "-1 is without limit", "--uses is %d", uses)
			}
			if node != "" {
				if err := blixard.CheckName(node); err != nil {
					return inFlag("--node-id", err)
				}
			}
			got, err := ask(cmd.Context(), a, (*client.Client).CreateToken, &blixardv1.CreateTokenRequest{TtlMs: ttl.Milliseconds(), Uses: uses, Node: node, DryRun: change.dryRun})
			switch {
			case err != nil:
				return err
			case change.dryRun:
				return a.done("token", "new", "would be created")
			case a.output == formatJSON || a.output == formatYAML:
				return a.printObject(a.env.Stdout, got)
			case a.output == formatName:
				return a.done("token", got.Id, "")
			}
			a.note("the token is valid for %s; on the machine that joins:", shortDuration(ttl))
			a.note("  sudo blixard cluster join --token TOKEN --node-id %s --address HOST:PORT", firstOf(node, "NAME"))
			fmt.Fprintln(a.env.Stdout, got.Token)
			return nil
		},
	}
	cmd.Flags().DurationVar(&ttl, "ttl", 24*time.Hour, "how long it can be used")
	cmd.Flags().Int32Var(&uses, "uses", 1, "how often it can be used; -1: without limit")
	cmd.Flags().StringVar(&node, "node-id", "", "only for a node of this name")
	change.add(cmd, false)
	return cmd
}

func (a *app) tokenList() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List the tokens that can be used, without their secrets", Aliases: []string{"ls"}, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.show(cmd.Context(), flags, nil, "", a.tokens)
		},
	}
	flags.add(cmd, false)
	completeSortOf(cmd, "token")
	return cmd
}

var tokenColumns = []column{{name: "TOKEN"}, {name: "NODE"}, {name: "USES LEFT"}, {name: "EXPIRES IN"}}

func (a *app) tokens(ctx context.Context) (*listing, error) {
	got, err := ask(ctx, a, (*client.Client).ListTokens, &blixardv1.ListTokensRequest{})
	if err != nil {
		return nil, err
	}
	l := &listing{key: "tokens", empty: "there are no tokens", columns: tokenColumns}
	for _, t := range got.Tokens {
		uses := num(t.UsesLeft)
		if t.UsesLeft < 0 {
			uses.text = "any"
		}
		left := max(time.Until(time.UnixMilli(t.ExpiresMs)), 0)
		l.rows = append(l.rows, row{name: "token/" + t.Id, object: t, cells: []cell{
			str(t.Id), str(firstOf(t.Node, "any")), uses, {text: shortDuration(left), number: blixard.Quantity(left.Milliseconds()), kind: ageCell},
		}})
	}
	return l, nil
}

func (a *app) tokenRevoke() *cobra.Command {
	var change changeFlags
	cmd := &cobra.Command{
		Use: "revoke TOKEN-ID", Short: "Make a token unusable", Args: takes("TOKEN-ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			answer, err := ask(cmd.Context(), a, (*client.Client).RevokeToken, &blixardv1.RevokeTokenRequest{Id: args[0], DryRun: change.dryRun})
			switch {
			case err != nil:
				return err
			case answer.Noop:
				return &blixard.Error{Code: blixard.CodeNotFound, Message: "there is no token " + args[0], Hint: "`blixard cluster token list` lists them"}
			case change.dryRun:
				return a.done("token", args[0], "would be revoked")
			}
			return a.done("token", args[0], "revoked")
		},
	}
	change.add(cmd, false)
	return cmd
}
