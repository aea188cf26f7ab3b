// Command blixard is Blixard: server, node agent and command line in one
// program. This package only wires: it is the one place that names adapters.
package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard/internal/cli"
)

func main() { os.Exit(run()) }

func run() int {
	return cli.Run(context.Background(), cli.Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Version: release(),
		Extra:          []*cobra.Command{serverCommand(), initCommand(), watchdogCommand(), simCommand()},
		ClusterExtra:   []*cobra.Command{clusterInitCommand(), clusterJoinCommand(), clusterRecoverCommand()},
		Doctor:         doctorChecks(),
		PackImage:      packImage,
		PackCode:       packCode,
		LocalFunctions: openLocal,
		EndNode:        endNode,
	}, os.Args[1:])
}
