package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) exportCommand() *cobra.Command {
	var o tarOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "export NAME", Short: "Write the whole tree of a snapshot as one tar",
		Long: `Write the whole tree of a snapshot or an image as one flat tar, compressed by the
suffix of -o (.gz, .zst) or --compress. The same tree gives the same bytes. Its
DiffID is printed. Sockets are left out and counted.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.output == "" {
				o.output = "-"
			}
			return verbError(a.export(cmd.Context(), args[0], o), "export", args[0])
		},
	})
	o.flags(c)
	return c
}

func (a *app) export(ctx context.Context, name string, o tarOptions) error {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	info, err := a.resolve(ctx, v, name)
	if err != nil {
		return err
	}
	return a.writeLayer(ctx, "export", v.Contents(ctx, info.Name), o)
}
