package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/snapshot"
)

func (a *app) gcCommand() *cobra.Command {
	var wait bool
	c := inNamespaces(nsDrop, &cobra.Command{
		Use: "gc", Short: "Free what nothing needs any more", Args: cobra.NoArgs,
		Long: `Remove the bytes of snapshots that were removed while they were in use, leftovers
of interrupted work, blobs that no image needs, and block devices of layers that
nobody has had mounted for ten minutes. btrfs frees the space of removed
snapshots in the background; --wait returns when it is free, not before the last file
that is open in one is closed, and drops the qgroups that deleted subvolumes left.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.gc(cmd.Context(), wait), "gc") },
	})
	c.Flags().BoolVarP(&wait, "wait", "w", false, "until the space is free")
	return c
}

// gcReport is what gc freed and what it could not.
type gcReport struct {
	Layers   int64    `json:"layers"`   // whose bytes were removed
	Bytes    int64    `json:"bytes"`    // that they held, of drivers that know
	Blobs    int      `json:"blobs"`    // that no image needs
	BlobSize int64    `json:"blobSize"` // of those
	Leftover int      `json:"leftover"` // of interrupted loads and unpacks
	Left     []string `json:"left,omitempty"`
}

func (a *app) gc(ctx context.Context, wait bool) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	var r gcReport
	if a.haveImages() {
		s, err := a.openImages(ctx)
		if err != nil {
			return err
		}
		i, err := s.GC(ctx, v)
		if err != nil {
			return err
		}
		r.Blobs, r.BlobSize, r.Leftover = i.Blobs, i.Bytes, i.Ingests+i.Unpacked
	}
	g, err := v.Store().GC(ctx)
	if err != nil {
		return err
	}
	if err := v.Store().DropIdle(ctx); err != nil {
		return err
	}
	r.Layers, r.Bytes = g.Layers, g.Bytes
	if wait {
		if err := a.waitFreed(ctx, v.Store()); err != nil {
			return err
		}
	}
	for _, b := range g.Left {
		r.Left = append(r.Left, fmt.Sprintf("%s layer %s stays: %s", b.Driver, b.ID, b.Why))
	}
	if a.format != "table" {
		return a.showOne(r)
	}
	for _, l := range r.Left {
		a.note("%s", l)
	}
	if !a.quiet {
		fmt.Fprintf(a.out, "%s (%s), %s (%s), %s\n", counted(r.Layers, "layer", "layers"), humanBytes(r.Bytes),
			counted(r.Blobs, "blob", "blobs"), humanBytes(r.BlobSize), counted(r.Leftover, "leftover", "leftovers"))
	}
	return nil
}

func (a *app) waitFreed(ctx context.Context, s *snapshot.Store) error {
	p := a.startSteps("gc")
	defer p.Stop()
	return s.WaitFreed(drivers.WithProgress(ctx, func(g drivers.Progress) { p.Step(g.Step, g.Entries, 0) }))
}
