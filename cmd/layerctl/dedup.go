package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/drivers"
)

func (a *app) dedupCommand() *cobra.Command {
	var o drivers.DedupOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "dedup", Short: "Let equal files of committed layers share their blocks", Args: cobra.NoArgs,
		Long: `Find files of committed layers that have one content in blocks of their own, and let
the kernel share the blocks: it compares them itself, so no content can change, and no
metadata does. Files that were copied from one layer to the next share theirs
already. Layers of the driver btrfs only, as root. The kernel frees what is not
needed any more in the background.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.dedup(cmd.Context(), o), "dedup") },
	})
	c.Flags().BoolVarP(&o.DryRun, "dry-run", "n", false, "only say what could be shared")
	return c
}

// dedupRow is what dedup did with the layers of one driver.
type dedupRow struct {
	Driver string `json:"driver"`
	Layers int64  `json:"layers"` // that were looked at
	Files  int64  `json:"files"`  // with blocks of their own
	Equal  int64  `json:"equal"`  // of which another has the content
	Bytes  int64  `json:"bytes"`  // of those: shared now, with --dry-run what could be
	DryRun bool   `json:"dryRun"`
}

func (a *app) dedup(ctx context.Context, o drivers.DedupOptions) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	p := a.startProgress("dedup", 0)
	defer p.Stop()
	all, err := v.Store().Dedup(drivers.WithProgress(ctx, func(g drivers.Progress) { p.Set(g.Bytes) }), o)
	p.Stop()
	rows := []dedupRow{}
	for _, r := range all {
		rows = append(rows, dedupRow{r.Driver, r.Layers, r.Files, r.Equal, r.Bytes, o.DryRun})
	}
	if err != nil {
		return err
	}
	return show(a, rows, table[dedupRow]{
		head: []string{"DRIVER", "LAYERS", "FILES", "EQUAL", "SHARED"},
		row: func(r dedupRow) []string {
			return []string{r.Driver, humanCount(r.Layers), humanCount(r.Files), humanCount(r.Equal), humanBytes(r.Bytes)}
		},
		name: func(r dedupRow) string { return r.Driver },
	})
}
