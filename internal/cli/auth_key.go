package cli

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) authCreateKey() *cobra.Command {
	var name, role string
	var expires time.Duration
	cmd := &cobra.Command{
		Use: "create-key --name NAME", Short: "Make an access key, with which programs sign requests", Args: takes(),
		Long: `Make an access key for clients of the Lambda API and for function URLs with
AWS_IAM. The secret is printed this once: nobody can tell it again.`,
		Example: "  blixard auth create-key --name ci-cd --expires 720h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return blixard.Invalid("--name", "give --name, such as --name ci-cd", "the key needs a name, by which people know it")
			}
			if expires < 0 {
				return blixard.Invalid("--expires", "give a duration such as 720h", "--expires is %s", expires)
			}
			got, err := ask(cmd.Context(), a, (*client.Client).CreateAccessKey, &blixardv1.CreateAccessKeyRequest{Name: name, Role: role, ExpiresInMs: expires.Milliseconds()})
			if err != nil {
				return err
			}
			switch a.output {
			case formatJSON, formatYAML:
				return a.printObject(a.env.Stdout, got)
			case formatName:
				fmt.Fprintln(a.env.Stdout, "key/"+got.GetKey().GetId())
				return nil
			}
			fmt.Fprintf(a.env.Stdout, "AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n", got.GetKey().GetId(), got.GetSecret())
			a.note("the secret is not kept and cannot be shown again")
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "what it is for")
	f.StringVar(&role, "role", "", "the role of who holds it")
	f.DurationVar(&expires, "expires", 0, "how long it is valid; 0: until it is revoked")
	return cmd
}

func (a *app) authListKeys() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "list-keys", Short: "List access keys", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			got, err := ask(cmd.Context(), a, (*client.Client).ListAccessKeys, &blixardv1.ListAccessKeysRequest{})
			if err != nil {
				return err
			}
			now := time.Now()
			l := &listing{key: "keys", empty: "there are no access keys; `blixard auth create-key --name NAME` makes one", columns: []column{{name: "ID"}, {name: "NAME"}, {name: "ROLE"}, {name: "STATE"}, {name: "AGE"}}}
			for _, k := range got.Keys {
				state := "valid"
				switch {
				case k.RevokedMs > 0:
					state = "revoked"
				case k.ExpiresMs > 0 && k.ExpiresMs <= now.UnixMilli():
					state = "expired"
				case k.ExpiresMs > 0:
					state = "valid for " + shortDuration(time.UnixMilli(k.ExpiresMs).Sub(now))
				}
				l.rows = append(l.rows, row{name: "key/" + k.Id, object: k, cells: []cell{str(k.Id), str(k.Name), str(k.Role), str(state), age(now, k.CreatedMs)}})
			}
			return a.print(a.env.Stdout, l, flags)
		},
	}
	flags.add(cmd, false)
	return cmd
}

func (a *app) authRevokeKey() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: "revoke-key ID…", Short: "End access keys at once", Args: takes("ID…"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachOf(args, func(id string) error {
				answer, err := ask(cmd.Context(), a, (*client.Client).RevokeAccessKey, &blixardv1.RevokeAccessKeyRequest{Id: id, DryRun: dryRun})
				if err != nil {
					return err
				}
				return a.done("key", id, outcome(answer, dryRun, "revoked"))
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}
