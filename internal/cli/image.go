package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blixard/blixard"
	blixardv1 "github.com/blixard/blixard/api/blixard/v1"
	"github.com/blixard/blixard/client"
)

// imagePrefix is what the name of an imported image begins with.
const imagePrefix = "sha256:"

func (a *app) imageList() *cobra.Command {
	var flags listFlags
	cmd := &cobra.Command{
		Use: "list", Short: "List the images that the answering node keeps", Aliases: []string{"ls"}, Args: takes(),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.getKind(cmd.Context(), "image", "", flags) },
	}
	flags.add(cmd, false)
	completeSortOf(cmd, "image")
	return cmd
}

func (a *app) imageImport() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: "import PATH", Short: "Import an image without making a VM of it", Args: takes("PATH"),
		Long: `Pack a kernel with an initrd or a root disk, or a root file system, and send it to
the cluster, which keeps it on two nodes. Prints its name, sha256:…, for --image
and for documents. Importing what is there is no error.`,
		Example: "  blixard image import ./rootfs.tar\n  blixard vm create web --image $(blixard image import ./rootfs.tar -o name | cut -d/ -f2)",
		RunE: func(cmd *cobra.Command, args []string) error {
			digest, err := a.importImage(cmd.Context(), args[0], dryRun)
			if err != nil {
				return err
			}
			if dryRun {
				return a.done("image", digest, "would be imported")
			}
			return a.done("image", digest, "imported")
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only pack it, and tell its name")
	return cmd
}

func (a *app) imageDelete() *cobra.Command {
	var dryRun, ignoreMissing bool
	cmd := &cobra.Command{
		Use: "delete sha256:DIGEST…", Short: "Remove imported images from every node", Aliases: []string{"rm"}, Args: takes("sha256:DIGEST…"), ValidArgsFunction: a.completeImages,
		Long: `Remove imported images from every node. A node that is away removes them when it
is back. An image that a VM uses is not removed.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachOf(args, func(name string) error {
				err := a.deleteImage(cmd.Context(), strings.TrimPrefix(name, "image/"), dryRun)
				if ignoreMissing && blixard.CodeOf(err) == blixard.CodeNotFound {
					return a.done("image", name, "is not there")
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "check it, and change nothing")
	cmd.Flags().BoolVar(&ignoreMissing, "ignore-missing", false, "images that are not there are no error")
	return cmd
}

func (a *app) deleteImage(ctx context.Context, digest string, dryRun bool) error {
	if digest == "builtin" {
		return blixard.Invalid("digest", "only imported images can be deleted", "builtin is part of every node")
	}
	answer, err := ask(ctx, a, (*client.Client).DeleteImage, &blixardv1.DeleteImageRequest{Digest: digest, DryRun: dryRun})
	switch {
	case err != nil:
		return err
	case answer.Noop:
		return a.done("image", digest, "was deleted already")
	case dryRun:
		return a.done("image", digest, "would be deleted")
	}
	return a.done("image", digest, "deleted")
}

func imageNamesOf(ctx context.Context, c *client.Client) ([]string, error) {
	got, err := c.ListImages(ctx, &blixardv1.ListImagesRequest{})
	var out []string
	for _, i := range got.GetImages() {
		out = append(out, i.Digest+"\t"+i.Description)
	}
	return out, err
}

func (a *app) completeImages(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.live(cmd.Context(), imageNamesOf)
}
