package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) functionTrigger() *cobra.Command {
	var http, dryRun bool
	var t blixardv1.FunctionTrigger
	var remove string
	cmd := &cobra.Command{
		Use: "trigger NAME [--http --path PATH]", Short: "Let HTTP requests call a function", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		Long: `Let HTTP requests of a path call a function, on the gateway of every node. A path
that ends in /* or /{proxy+} takes everything below it; the longest match wins.
Without --http the triggers are listed.`,
		Example: `  blixard function trigger image-processor --http --path /api/process-image
  blixard function trigger api --http --path '/shop/*' --method GET --method POST --host shop.example
  blixard function trigger api --delete http-1`,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			switch {
			case remove != "":
				answer, err := ask(ctx, a, (*client.Client).DeleteFunctionTrigger, &blixardv1.DeleteFunctionTriggerRequest{Name: name, Id: remove, DryRun: dryRun})
				if err != nil {
					return err
				}
				return a.done("trigger", remove, outcome(answer, dryRun, "deleted"))
			case !http && (t.Path != "" || len(t.Methods) > 0 || t.Host != ""):
				return blixard.Invalid("--http", "add --http", "--path, --method and --host are of HTTP triggers")
			case !http:
				got, err := ask(ctx, a, (*client.Client).GetFunction, &blixardv1.GetFunctionRequest{Name: name, WithoutNodes: true})
				if err != nil {
					return err
				}
				return a.print(a.env.Stdout, triggerListing(name, got.Function.Triggers), listFlags{})
			case !strings.HasPrefix(t.Path, "/"):
				return blixard.Invalid("--path", "give a path such as /api/process-image", "%q is not a path", t.Path)
			}
			t.Kind, t.Qualifier = "http", qualifier
			got, err := ask(ctx, a, (*client.Client).AddFunctionTrigger, &blixardv1.AddFunctionTriggerRequest{Name: name, Trigger: &t, DryRun: dryRun})
			if err != nil {
				return err
			}
			words := outcome(got.Change, dryRun, "calls "+name)
			if len(got.Urls) > 0 {
				words += ", now at " + strings.Join(got.Urls, " ")
			}
			return a.done("trigger", firstOf(got.Id, "http"), words)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&http, "http", false, "an HTTP trigger")
	f.StringVar(&t.Path, "path", "", "the path, such as /api/process-image")
	f.StringArrayVar(&t.Methods, "method", nil, "only this method; any without")
	f.StringVar(&t.Host, "host", "", "only requests to this host name")
	f.StringVar(&remove, "delete", "", "delete the trigger with this ID")
	f.BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	return cmd
}

func triggerListing(name string, triggers []*blixardv1.FunctionTrigger) *listing {
	l := &listing{key: "triggers", empty: "nothing triggers " + name + "; --http --path PATH adds a trigger", columns: []column{{name: "ID"}, {name: "KIND"}, {name: "METHODS"}, {name: "HOST"}, {name: "PATH"}, {name: "QUALIFIER"}}}
	for _, t := range triggers {
		l.rows = append(l.rows, row{name: "trigger/" + t.Id, object: t, cells: []cell{str(t.Id), str(t.Kind), str(firstOf(strings.Join(t.Methods, "|"), "ANY")), str(t.Host), str(t.Path), str(firstOf(t.Qualifier, "$LATEST"))}})
	}
	return l
}

func (a *app) functionURL() *cobra.Command {
	var url blixardv1.FunctionURL
	var stream, remove, dryRun bool
	cmd := &cobra.Command{
		Use: "url NAME[:QUALIFIER]", Short: "Give a function a URL of its own", Args: takes("NAME"), ValidArgsFunction: a.completeOneFunction,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, qualifier, err := qualified(args[0])
			if err != nil {
				return err
			}
			if remove {
				answer, err := ask(cmd.Context(), a, (*client.Client).DeleteFunctionURL, &blixardv1.DeleteFunctionURLRequest{Name: name, Qualifier: qualifier, DryRun: dryRun})
				if err != nil {
					return err
				}
				return a.done("url", args[0], outcome(answer, dryRun, "deleted"))
			}
			url.Qualifier = qualifier
			if stream {
				url.InvokeMode = "RESPONSE_STREAM"
			}
			got, err := ask(cmd.Context(), a, (*client.Client).SetFunctionURL, &blixardv1.SetFunctionURLRequest{Name: name, Url: &url, DryRun: dryRun})
			if err != nil {
				return err
			}
			return a.done("url", args[0], outcome(got.Change, dryRun, "is http://"+got.GetUrl().GetHost()+"/ on the gateway of every node"))
		},
	}
	f := cmd.Flags()
	f.StringVar(&url.Auth, "auth", "NONE", "who may call: NONE (anybody) or AWS_IAM (who signs with an access key)")
	f.BoolVar(&stream, "stream", false, "send the answer as it is written")
	f.BoolVar(&remove, "delete", false, "take the URL away")
	f.BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	registerValues(cmd, "auth", "NONE", "AWS_IAM")
	return cmd
}
