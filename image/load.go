package image

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl/internal/sys"
)

// copies is how many blobs are copied at a time: hashing is one core's work each.
const copies = 2

// LoadOptions say what is loaded. The zero value loads every image there is,
// under the names it has there.
type LoadOptions struct {
	// Name names the image instead; there must be one only (see Select).
	Name string
	// Select takes only the image that has this name, or digest, in the source.
	Select string
	// Platform is what must be whole of an image of several platforms
	// ("linux/arm64"; "" is this machine's). Others are loaded as far as they are
	// there.
	Platform string
	// Limits bound what the source may ask for.
	Limits Limits
	// Progress, if not nil, is told of the copying.
	Progress Progress
}

// LoadResult says what Load did.
type LoadResult struct {
	Kind   Kind
	Images []Image
	// Skipped tells of each entry that is no image (an artifact), and why.
	Skipped []string

	before []ocispec.Descriptor // index.json's entries until then, for TakeBack
}

// Load brings images into the store from path, which is an OCI image layout
// directory, an oci-archive or a docker-archive, plain or compressed. Every blob
// is verified. The images are listed when all their blobs are durable, all at
// once; after an error none is, and what was copied goes with the next GC.
func (s *Store) Load(ctx context.Context, path string, o LoadOptions) (LoadResult, error) {
	open := func(lim Limits) (*source, error) { return s.openSource(ctx, path, lim) }
	r, err := s.load(ctx, open, o)
	if err != nil {
		return r, fmt.Errorf("image: load %s: %w", path, err)
	}
	return r, nil
}

// LoadFrom is Load of an archive that comes as a stream, which is read to its
// end. The blobs are written once, next to where they go.
func (s *Store) LoadFrom(ctx context.Context, r io.Reader, o LoadOptions) (LoadResult, error) {
	open := func(lim Limits) (*source, error) { return s.streamSource(ctx, r, lim) }
	res, err := s.load(ctx, open, o)
	if err != nil {
		return res, fmt.Errorf("image: load: %w", err)
	}
	return res, nil
}

func (s *Store) load(ctx context.Context, open func(Limits) (*source, error), o LoadOptions) (LoadResult, error) {
	l, err := lock(ctx, s.blobsDir(), sys.LockShared)
	if err != nil {
		return LoadResult{}, err
	}
	defer l.Close()
	o.Limits = o.Limits.withDefaults()
	src, err := open(o.Limits)
	if err != nil {
		return LoadResult{}, err
	}
	defer src.close()
	p := &plan{src: src, o: o, required: map[digest.Digest]bool{}}
	if err := p.make(ctx); err != nil {
		return LoadResult{}, err
	}
	if err := s.copyAll(ctx, src, p.blobs, p.required, newMeter(o.Progress, Event{Step: "load", Total: total(p.blobs)})); err != nil {
		return LoadResult{}, err
	}
	if p.result.before, err = s.put(ctx, p.result.Images...); err != nil {
		return LoadResult{}, err
	}
	return p.result, nil
}

func (s *Store) blobsDir() string { return s.dir + "/" + ocispec.ImageBlobsDir }

func total(descs []ocispec.Descriptor) int64 {
	var n int64
	for _, d := range descs {
		n += d.Size
	}
	return n
}

// plan is what a Load will do.
type plan struct {
	src      *source
	o        LoadOptions
	blobs    []ocispec.Descriptor   // children first
	required map[digest.Digest]bool // those that must be there
	result   LoadResult
}

// make chooses the images and lists their blobs, reading documents only.
func (p *plan) make(ctx context.Context) error {
	p.result.Kind = p.src.kind
	match, err := matcher(p.o.Platform)
	if err != nil {
		return err
	}
	entries, err := p.entries()
	if err != nil {
		return err
	}
	all := newReachable(walker{p: p.src, lim: p.o.Limits})
	for _, d := range entries {
		err := p.add(ctx, all, d, match)
		if errdefs.IsNotImplemented(err) && len(entries) > 1 {
			p.result.Skipped = append(p.result.Skipped, err.Error())
			continue
		}
		if err != nil {
			return err
		}
	}
	if len(p.result.Images) == 0 {
		return fmt.Errorf("no image in it: %w: %s", errdefs.ErrInvalidArgument, strings.Join(p.result.Skipped, "; "))
	}
	p.blobs = all.list
	return nil
}

// entries are the entries of the source's index that were asked for.
func (p *plan) entries() ([]ocispec.Descriptor, error) {
	list := p.src.index.Manifests
	if p.o.Select != "" {
		list = slices.DeleteFunc(slices.Clone(list), func(d ocispec.Descriptor) bool {
			return entryName(d) != p.o.Select && d.Annotations[ocispec.AnnotationRefName] != p.o.Select && d.Digest.String() != p.o.Select
		})
	}
	switch {
	case len(list) == 0 && p.o.Select != "":
		return nil, fmt.Errorf("no image %q in it; there are: %s: %w", p.o.Select, entryNames(p.src.index.Manifests), errdefs.ErrNotFound)
	case len(list) == 0:
		return nil, fmt.Errorf("no image in it: %w", errdefs.ErrNotFound)
	case len(list) > 1 && p.o.Name != "":
		return nil, fmt.Errorf("one name for %d images (%s): %w", len(list), entryNames(list), errdefs.ErrInvalidArgument)
	}
	return list, nil
}

func entryNames(list []ocispec.Descriptor) string {
	var names []string
	for _, d := range list {
		n := entryName(d)
		if n == "" {
			n = d.Digest.String()
		}
		names = append(names, n)
	}
	return strings.Join(names, ", ")
}

// add plans one entry: the manifest for the platform must be whole.
func (p *plan) add(ctx context.Context, all *reachable, d ocispec.Descriptor, match platforms.MatchComparer) error {
	img := Image{Name: p.o.Name, Target: d}
	if img.Name == "" {
		img.Name = entryName(d)
	}
	img.Target.Annotations = entryImage(d).Target.Annotations
	if img.Name != "" {
		if err := checkName(img.Name); err != nil {
			return err
		}
	}
	w := &walker{p: p.src, lim: p.o.Limits}
	m, err := w.manifest(ctx, d, match)
	if err != nil {
		return fmt.Errorf("%s: %w", img, err)
	}
	for _, desc := range append([]ocispec.Descriptor{d, m.Target, m.config}, blobsOf(m)...) {
		p.required[desc.Digest] = true
	}
	if err := all.add(ctx, d, 1); err != nil {
		return fmt.Errorf("%s: %w", img, err)
	}
	p.result.Images = append(p.result.Images, img)
	return nil
}

func blobsOf(m *Manifest) []ocispec.Descriptor {
	var list []ocispec.Descriptor
	for _, l := range m.Layers {
		list = append(list, l.Blob)
	}
	return list
}

// copyAll brings blobs into the store, several at a time: first those that lead
// nowhere, then the documents in their order. One that is missing is an error
// where it is required, else passed by.
func (s *Store) copyAll(ctx context.Context, from content.Provider, blobs []ocispec.Descriptor, required map[digest.Digest]bool, m *meter) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(copies)
	one := func(ctx context.Context, d ocispec.Descriptor) error {
		err := s.copyBlob(ctx, from, d, m.add)
		if errdefs.IsNotFound(err) && !required[d.Digest] {
			return nil
		}
		return err
	}
	var documents []ocispec.Descriptor
	for _, d := range blobs {
		if isIndex(d.MediaType) || isManifest(d.MediaType) {
			documents = append(documents, d)
			continue
		}
		g.Go(func() error { return one(gctx, d) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, d := range documents {
		if err := one(ctx, d); err != nil {
			return err
		}
	}
	return nil
}
