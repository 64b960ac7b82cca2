package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

type loadOptions struct {
	name, only, platform string
	noUnpack, dropBlobs  bool
}

func (a *app) loadCommand() *cobra.Command {
	var o loadOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "load {DIR|ARCHIVE|-}", Short: "Load images and unpack them as snapshots",
		Long: `Load the images of an OCI image layout, an oci-archive or a docker-archive, in a
file or on standard input, plain or compressed. Every digest is verified. Their
layers become committed snapshots named by ChainID; the name or digest of each
image is printed. The blobs are kept, so that save gives the same digests.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.mayMake = true
			return verbError(a.load(cmd.Context(), args[0], o), "load", args[0])
		},
	})
	f := c.Flags()
	f.StringVar(&o.name, "name", "", "name the image, of which there must be one only")
	f.StringVar(&o.only, "only", "", "load only the image of this name or digest")
	f.StringVar(&o.platform, "platform", "", "of images for several (default: this machine's)")
	f.BoolVar(&o.noUnpack, "no-unpack", false, "keep the blobs only")
	f.BoolVar(&o.dropBlobs, "drop-blobs", false, "do not keep the layer blobs; save makes them anew, with other digests")
	return a.limited(c)
}

func (a *app) load(ctx context.Context, src string, o loadOptions) error {
	if err := needSource(src); err != nil {
		return err
	}
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return err
	}
	a.sayVolatile()
	r, err := a.loadBlobs(ctx, s, src, o)
	if err != nil {
		return err
	}
	for _, skipped := range r.Skipped {
		a.note("not an image: %s", skipped)
	}
	for i, img := range r.Images {
		if u, err := a.unpack(ctx, s, v, img, o); err != nil {
			// Half an image is none: neither this one nor those that would follow.
			ctx = context.WithoutCancel(ctx)
			return errors.Join(fmt.Errorf("%s: %w", imageLabel(img), err),
				s.TakeBack(ctx, r, r.Images[i:]...), s.Discard(ctx, v, img, u, o.platform))
		}
		fmt.Fprintln(a.out, imageLabel(img))
	}
	return nil
}

func (a *app) loadBlobs(ctx context.Context, s *image.Store, src string, o loadOptions) (image.LoadResult, error) {
	p := a.startProgress("load", 0)
	defer p.Stop()
	lo := image.LoadOptions{Name: o.name, Select: o.only, Platform: o.platform, Progress: p.event,
		Limits: image.Limits{Size: a.limits.Size, Window: a.limits.Window}}
	if src != "-" {
		return s.Load(ctx, src, lo)
	}
	if isTerminal(a.in) {
		return image.LoadResult{}, hintf(fmt.Errorf("standard input is a terminal: %w", errdefs.ErrInvalidArgument), "pipe an archive in")
	}
	return s.LoadFrom(ctx, a.in, lo)
}

// unpack makes snapshots of an image. One for other platforms only stays as
// blobs.
func (a *app) unpack(ctx context.Context, s *image.Store, v *snapshot.View, img image.Image, o loadOptions) (image.Unpacked, error) {
	if o.noUnpack {
		return image.Unpacked{}, nil
	}
	left := &leftOut{}
	p := a.startProgress("unpack", 0)
	defer p.Stop()
	u, err := s.Unpack(ctx, v, img, image.UnpackOptions{
		Platform: o.platform, Volatile: a.volatile, Progress: p.event,
		Apply: layer.ApplyOptions{Limits: a.limits, Skipped: left.add},
	})
	p.Stop()
	if errdefs.IsNotFound(err) && o.platform == "" {
		a.note("%s: not unpacked: %v", imageLabel(img), err)
		return u, nil
	}
	if err != nil {
		return u, err
	}
	left.say(a)
	if !a.quiet {
		a.note("%s: %s, %d of them new, as %s", imageLabel(img), counted(u.Layers, "layer", "layers"), u.New, shortName(u.ChainID.String()))
	}
	if o.dropBlobs {
		_, err = s.DropLayers(ctx, img.Target.Digest.String())
	}
	return u, err
}

// event is an image.Progress.
func (p *progress) event(e image.Event) {
	if p == nil {
		return
	}
	object := ""
	if e.Item != "" {
		object = fmt.Sprintf("%s (%d of %d)", shortName(e.Item.String()), e.Index+1, e.Count)
	}
	p.Step(object, e.Done, e.Total)
}

type saveOptions struct {
	output, kind, name, base, platform, compress string
}

func (a *app) saveCommand() *cobra.Command {
	var o saveOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "save NAME -o PATH", Short: "Write a snapshot or an image as an OCI image",
		Long: `Write an image, or a snapshot with all below it as one layer each, as an OCI image
layout (a directory, to which it is added), an oci-archive (.tar) or a
docker-archive. Layers whose blobs were kept are written as they came, others are
made of what each snapshot changes. The digest of the manifest is printed.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.output == "" {
				return usagef(cmd, "-o PATH is missing")
			}
			return verbError(a.save(cmd.Context(), args[0], o), "save", args[0])
		},
	})
	f := c.Flags()
	f.StringVarP(&o.output, "output", "o", "", "a directory, an archive file, or - for an archive on standard output")
	f.StringVar(&o.kind, "type", "", "oci, oci-archive or docker-archive (default: by the suffix .tar)")
	f.StringVar(&o.name, "tag", "", "the image's name there (default: the name it has)")
	f.StringVar(&o.base, "base", "", "the image whose configuration a snapshot's image goes on from (default: the one that it was unpacked from)")
	f.StringVar(&o.platform, "platform", "", "of an image for several, or of one made without a base")
	f.StringVar(&o.compress, "compress", "gzip", "of layers that have to be made: none, gzip or zstd")
	_ = c.RegisterFlagCompletionFunc("type", cobra.FixedCompletions([]string{"oci", "oci-archive", "docker-archive"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("compress", cobra.FixedCompletions([]string{"none", "gzip", "zstd"}, cobra.ShellCompDirectiveNoFileComp))
	return a.limited(c)
}

func (a *app) save(ctx context.Context, name string, o saveOptions) error {
	to, err := a.destination(o)
	if err != nil {
		return err
	}
	comp, err := (&tarOptions{compress: o.compress}).compression()
	if err != nil {
		return err
	}
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return err
	}
	left := &leftOut{}
	p := a.startProgress("save", 0)
	defer p.Stop()
	so := image.SaveOptions{
		Name: o.name, Platform: o.platform, Base: o.base, Compression: comp, Created: epochTime(),
		Skipped: left.add, Progress: p.event, Snapshots: v, Window: a.limits.Window,
	}
	digest, size, err := saveNamed(ctx, a, s, v, name, to, so)
	if err != nil {
		return err
	}
	p.Stop()
	left.say(a)
	return a.saySaved(to, digest, size)
}

// saveNamed saves the image of that name, else the snapshot.
func saveNamed(ctx context.Context, a *app, s *image.Store, v *snapshot.View, name string, to image.Destination, o image.SaveOptions) (digest string, size int64, err error) {
	_, err = v.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		img, ierr := resolveImage(ctx, s, name)
		if ierr == nil {
			d, err := s.Save(ctx, img, to, o)
			return d.Digest.String(), d.Size, err
		}
		if !errdefs.IsNotFound(ierr) {
			return "", 0, ierr
		}
	}
	info, err := a.resolve(ctx, v, name)
	if err != nil {
		return "", 0, err
	}
	if o.Name == "" && !strings.HasPrefix(info.Name, "sha256:") {
		o.Name = info.Name
	}
	d, err := s.SaveSnapshot(ctx, v, info.Name, to, o)
	return d.Digest.String(), d.Size, err
}

// destination says where and in which form.
func (a *app) destination(o saveOptions) (image.Destination, error) {
	to := image.Destination{Kind: image.Kind(o.kind), Path: o.output}
	switch {
	case o.kind == "" && (o.output == "-" || strings.HasSuffix(o.output, ".tar")):
		to.Kind = image.KindLayoutArchive
	case o.kind == "":
		to.Kind = image.KindLayout
	}
	switch to.Kind {
	case image.KindLayout, image.KindLayoutArchive, image.KindDockerArchive:
	default:
		return to, fmt.Errorf("--type %q: not one of oci, oci-archive, docker-archive: %w", o.kind, errdefs.ErrInvalidArgument)
	}
	if o.output != "-" {
		return to, nil
	}
	if to.Kind == image.KindLayout {
		return to, errors.New("a layout is a directory and does not go to standard output: --type oci-archive does")
	}
	if isTerminal(a.out) {
		return to, hintf(fmt.Errorf("standard output is a terminal: %w", errdefs.ErrInvalidArgument), "redirect it, or use -o FILE")
	}
	to.Path, to.Writer = "", a.out
	return to, nil
}

// savedRow is what is printed of an image that was written.
type savedRow struct {
	Path   string `json:"path"`
	Type   string `json:"type"`
	Digest string `json:"digest"` // of the manifest or index
	Size   int64  `json:"size"`   // of that document
}

func (a *app) saySaved(to image.Destination, digest string, size int64) error {
	if to.Writer != nil {
		if !a.quiet {
			a.note("%s", digest)
		}
		return nil
	}
	if a.format != "table" {
		return a.showOne(savedRow{to.Path, string(to.Kind), digest, size})
	}
	_, err := fmt.Fprintln(a.out, digest)
	return err
}
