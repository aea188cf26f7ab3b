package cli

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

func (a *app) version() *cobra.Command {
	var server bool
	cmd := &cobra.Command{
		Use: "version", Short: "Print the release of this program, and of the server with --server", Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := map[string]any{"release": firstOf(a.env.Version, "dev"), "goVersion": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH, "featureLevel": blixard.FeatureLevel}
			var remote *blixardv1.GetVersionResponse
			if server {
				got, err := ask(cmd.Context(), a, (*client.Client).GetVersion, &blixardv1.GetVersionRequest{})
				if err != nil {
					return err
				}
				remote, out["server"] = got, got
			}
			if a.output == formatJSON || a.output == formatYAML {
				return a.printObject(a.env.Stdout, out)
			}
			if a.output == formatName {
				fmt.Fprintln(a.env.Stdout, out["release"])
				return nil
			}
			fmt.Fprintf(a.env.Stdout, "blixard %s (%s, %s, feature level %d)\n", out["release"], out["goVersion"], out["platform"], blixard.FeatureLevel)
			if remote != nil {
				fmt.Fprintf(a.env.Stdout, "server  %s (%s, node %s, feature level %d)\n", remote.Release, remote.GoVersion, remote.Node, remote.FeatureLevel)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&server, "server", false, "ask the server too")
	return cmd
}
