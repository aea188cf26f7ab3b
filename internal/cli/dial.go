package cli

import (
	"github.com/spf13/cobra"

	"github.com/blixard/blixard/client"
)

// Dial connects a command of Env.Extra to the cluster that the global flags and
// the environment name. The caller closes the client.
func Dial(cmd *cobra.Command, env Env) (*client.Client, error) {
	a := &app{env: env}
	var err error
	if a.addr, err = cmd.Flags().GetString("addr"); err != nil {
		return nil, err
	}
	if a.token, err = cmd.Flags().GetString("token"); err != nil {
		return nil, err
	}
	return a.client()
}
