package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

func (a *app) gcCommand() *cobra.Command {
	return inNamespaces(nsDrop, &cobra.Command{
		Use: "gc", Short: "Free what nothing needs any more", Args: cobra.NoArgs,
		Long: `Remove the bytes of snapshots that were removed while they were in use, leftovers
of interrupted work, and blobs that no image needs.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.gc(cmd.Context()), "gc") },
	})
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

func (a *app) gc(ctx context.Context) error {
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
	r.Layers, r.Bytes = g.Layers, g.Bytes
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
		fmt.Fprintf(a.out, "%d layers (%s), %d blobs (%s), %d leftovers\n",
			r.Layers, humanBytes(r.Bytes), r.Blobs, humanBytes(r.BlobSize), r.Leftover)
	}
	return nil
}
