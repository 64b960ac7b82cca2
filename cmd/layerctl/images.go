package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/image"
)

func (a *app) imagesCommand() *cobra.Command {
	return inNamespaces(nsEnter, &cobra.Command{
		Use: "images", Short: "List the images", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.listImages(cmd.Context()), "images") },
	})
}

// imageRow is a line of images.
type imageRow struct {
	Name      string   `json:"name,omitempty"`
	Digest    string   `json:"digest"` // of the manifest or index
	MediaType string   `json:"mediaType"`
	Platform  string   `json:"platform,omitempty"` // of what is read here
	Layers    int      `json:"layers"`
	Size      int64    `json:"size"`              // of the layer blobs
	ChainID   string   `json:"chainID,omitempty"` // of its top layer, the snapshot's name
	Unpacked  bool     `json:"unpacked"`
	DiffIDs   []string `json:"diffIDs,omitempty"`
}

func (a *app) listImages(ctx context.Context) error {
	rows := []imageRow{}
	if a.storeThere() {
		if _, err := a.openStore(ctx); err != nil {
			return err
		}
	}
	if a.haveImages() {
		var err error
		if rows, err = a.imageRows(ctx); err != nil {
			return err
		}
	}
	return show(a, rows, table[imageRow]{
		head: []string{"NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "UNPACKED"},
		row: func(r imageRow) []string {
			return []string{or(r.Name, "-"), shortName(r.Digest), or(r.Platform, "-"), fmt.Sprint(r.Layers), humanBytes(r.Size), yesNo(r.Unpacked)}
		},
		name: func(r imageRow) string { return or(r.Name, r.Digest) },
	})
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) imageRows(ctx context.Context) ([]imageRow, error) {
	v, err := a.openView(ctx)
	if err != nil {
		return nil, err
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return nil, err
	}
	imgs, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	var rows []imageRow
	for _, i := range imgs {
		r := imageRow{Name: i.Name, Digest: i.Target.Digest.String(), MediaType: i.Target.MediaType}
		m, err := s.Manifest(ctx, i, "")
		switch {
		case errdefs.IsNotFound(err): // none for this platform
		case err != nil:
			return nil, fmt.Errorf("%s: %w", imageLabel(i), err)
		default:
			r.fill(m)
			_, err := v.Stat(ctx, r.ChainID)
			r.Unpacked = err == nil
		}
		rows = append(rows, r)
	}
	return rows, nil
}

func (r *imageRow) fill(m *image.Manifest) {
	p := m.Platform()
	r.Platform = p.OS + "/" + p.Architecture
	if p.Variant != "" {
		r.Platform += "/" + p.Variant
	}
	r.Layers, r.Size, r.ChainID = len(m.Layers), m.Size(), m.ChainID().String()
	for l := range slices.Values(m.Layers) {
		r.DiffIDs = append(r.DiffIDs, l.DiffID.String())
	}
}

func (a *app) tagCommand() *cobra.Command {
	return &cobra.Command{
		Use: "tag IMAGE NAME", Short: "Give an image one more name", Args: cobra.ExactArgs(2),
		Long:              "Give an image one more name. A name that another image had moves. The name is printed.",
		ValidArgsFunction: a.completeImages,
		Annotations:       map[string]string{nsKey: nsEnter},
		RunE: func(cmd *cobra.Command, args []string) error {
			return verbError(a.tag(cmd.Context(), args[0], args[1]), "tag", args[0])
		},
	}
}

func (a *app) tag(ctx context.Context, ref, name string) error {
	s, err := a.openImages(ctx)
	if err != nil {
		return err
	}
	img, err := resolveImage(ctx, s, ref)
	if err != nil {
		return err
	}
	if err := s.Tag(ctx, img.Target.Digest.String(), name); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.out, name)
	return err
}
