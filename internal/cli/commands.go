package cli

import "github.com/spf13/cobra"

// addCommands is the one table of commands.
func (a *app) addCommands(root *cobra.Command) {
	vm := group("vm", "VMs: create them, look at them, change them",
		a.vmCreate(), a.vmStart(), a.vmStop(), a.vmRestart(), a.vmPause(), a.vmResume(), a.vmScale(), a.vmDelete(),
		a.vmStatus(), a.vmList(), a.vmDescribe(), a.vmExplain(), a.vmEvents(),
		a.vmLogs(), a.vmConsole(), a.vmExec(),
	)
	cluster := group("cluster", "The cluster: its nodes and its consensus",
		a.clusterStatus(), a.clusterList(), a.clusterAddNode(), a.clusterRemoveNode(), a.clusterForceRemoveNode(), a.clusterLeave(),
		a.clusterDrain(), a.clusterCordon(), a.clusterUncordon(), a.clusterLabel(),
		a.clusterTransferLeader(), a.clusterSnapshot(), a.clusterRecord(), a.clusterMaintenance(),
		group("token", "Tokens that let nodes join", a.tokenCreate(), a.tokenList(), a.tokenRevoke()),
	)
	cluster.AddCommand(a.env.ClusterExtra...)
	image := group("image", "Images that VMs boot: import them, list them, delete them", a.imageImport(), a.imageList(), a.imageDelete())
	function := group("function", "Functions: deploy them, call them, look at them",
		a.functionCreate(), a.functionUpdate(), a.functionDelete(), a.functionList(), a.functionDescribe(), a.functionExplain(),
		a.functionInvoke(), a.functionLogs(), a.functionMetrics(), a.functionWatch(),
		a.functionVersions(), a.functionPublish(), a.functionRollback(), a.functionAlias(),
		a.functionTrigger(), a.functionURL(), a.functionAsync(), a.functionEvents(), a.functionTest(),
	)
	auth := group("auth", "Access keys of programs", a.authCreateKey(), a.authListKeys(), a.authRevokeKey())
	dev := group("dev", "A cluster of real servers on this machine, to try things",
		a.devUp(), a.devDown(), a.devStatus(), a.devKill(), a.devStart(), a.devLogs(), a.devEnv(),
	)
	root.AddCommand(vm, function, cluster, image, auth, dev, a.apply(), a.delete(), a.get(), a.doctor(), a.version(), a.completion(), a.gen())
	root.AddCommand(a.env.Extra...)
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: groupRun}
	g.AddCommand(commands...)
	return g
}
