package image

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// Manifest is an image of one platform, read whole: what its layers are and what
// its configuration says.
type Manifest struct {
	Target ocispec.Descriptor // of the manifest
	Config ocispec.Image
	Layers []Layer // base first

	config ocispec.Descriptor // of the configuration
	raw    []byte             // the configuration, byte for byte
}

// Layer is one layer of an image.
type Layer struct {
	Blob    ocispec.Descriptor
	DiffID  digest.Digest // of the uncompressed tar
	ChainID digest.Digest // of this layer on all below it: its snapshot's name
}

// ChainID names the snapshot of the whole image; "" for an image without layers.
func (m *Manifest) ChainID() digest.Digest {
	if len(m.Layers) == 0 {
		return ""
	}
	return m.Layers[len(m.Layers)-1].ChainID
}

// Platform returns what the configuration says that the image runs on.
func (m *Manifest) Platform() ocispec.Platform { return platforms.Normalize(m.Config.Platform) }

// Size returns the bytes of all layer blobs.
func (m *Manifest) Size() int64 {
	var n int64
	for _, l := range m.Layers {
		n += l.Blob.Size
	}
	return n
}

// Manifest reads the manifest of an image for a platform in containerd's
// spelling ("linux/arm64"); "" means this machine's. ErrNotFound names the
// platforms that there are.
func (s *Store) Manifest(ctx context.Context, img Image, platform string) (*Manifest, error) {
	m, err := s.manifest(ctx, img, platform)
	if err != nil {
		return nil, fmt.Errorf("image: %s: %w", img, err)
	}
	return m, nil
}

func (s *Store) manifest(ctx context.Context, img Image, platform string) (*Manifest, error) {
	match, err := matcher(platform)
	if err != nil {
		return nil, err
	}
	return (&walker{p: s.layout, lim: kept}).manifest(ctx, img.Target, match)
}

func matcher(platform string) (platforms.MatchComparer, error) {
	if platform == "" {
		return platforms.Default(), nil
	}
	p, err := platforms.Parse(platform)
	if err != nil {
		return nil, err
	}
	return platforms.Only(p), nil
}

// walker goes through the documents of one image under one budget.
type walker struct {
	p    content.Provider
	lim  Limits
	seen int // descriptors of indexes so far
}

// leaf is a manifest that an index leads to.
type leaf struct {
	desc     ocispec.Descriptor
	platform ocispec.Platform
}

// manifest reads the manifest that fits match best. A target that is no index is
// taken as it is: there is nothing to choose.
func (w *walker) manifest(ctx context.Context, target ocispec.Descriptor, match platforms.MatchComparer) (*Manifest, error) {
	if !isIndex(target.MediaType) {
		return w.read(ctx, target)
	}
	leaves, err := w.leaves(ctx, target, 1)
	if err != nil {
		return nil, err
	}
	best, err := choose(leaves, match)
	if err != nil {
		return nil, err
	}
	return w.read(ctx, best)
}

// leaves collects the manifests below an index, nested ones too. An index that
// holds itself cannot exist under digests that are verified; depth and seen bound
// what can: one index listed many times over.
func (w *walker) leaves(ctx context.Context, target ocispec.Descriptor, depth int) ([]leaf, error) {
	if over(depth, w.lim.Depth) {
		return nil, fmt.Errorf("index %s: more than %d indexes inside each other: %w", target.Digest, w.lim.Depth, errdefs.ErrResourceExhausted)
	}
	b, err := readDocument(ctx, w.p, target, w.lim)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	idx, err := parseIndex(b, w.lim)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", target.Digest, err)
	}
	if w.seen += len(idx.Manifests); over(w.seen, w.lim.Manifests) {
		return nil, fmt.Errorf("index %s: more than %d manifests in all: %w", target.Digest, w.lim.Manifests, errdefs.ErrResourceExhausted)
	}
	var all []leaf
	for _, d := range idx.Manifests {
		more, err := w.child(ctx, d, depth)
		if err != nil {
			return nil, err
		}
		all = append(all, more...)
	}
	return all, nil
}

// child looks at one descriptor of an index. What is neither index nor manifest
// (attestations, artifacts) is no image and passed by.
func (w *walker) child(ctx context.Context, d ocispec.Descriptor, depth int) ([]leaf, error) {
	switch {
	case isIndex(d.MediaType):
		if _, err := present(ctx, w.p, d); errdefs.IsNotFound(err) {
			return nil, nil // of another platform, left out when the image was copied
		}
		return w.leaves(ctx, d, depth+1)
	case isManifest(d.MediaType):
		p, err := w.platform(ctx, d)
		return []leaf{{d, p}}, err
	}
	return nil, nil
}

// platform is what the index says, else what the image's configuration does.
func (w *walker) platform(ctx context.Context, d ocispec.Descriptor) (ocispec.Platform, error) {
	if d.Platform != nil {
		return platforms.Normalize(*d.Platform), nil
	}
	m, err := w.read(ctx, d)
	switch {
	case errdefs.IsNotFound(err), errdefs.IsNotImplemented(err):
		return ocispec.Platform{}, nil // not here, or not an image: matches nothing
	case err != nil:
		return ocispec.Platform{}, err
	}
	return m.Platform(), nil
}

// choose returns the manifest that fits best.
func choose(leaves []leaf, match platforms.MatchComparer) (ocispec.Descriptor, error) {
	fit := slices.DeleteFunc(slices.Clone(leaves), func(l leaf) bool { return l.platform.OS == "" || !match.Match(l.platform) })
	if len(fit) == 0 {
		var have []string
		for _, l := range leaves {
			if l.platform.OS != "" {
				have = append(have, platforms.FormatAll(l.platform))
			}
		}
		return ocispec.Descriptor{}, fmt.Errorf("no manifest for the platform; there are: %s: %w", strings.Join(have, ", "), errdefs.ErrNotFound)
	}
	slices.SortStableFunc(fit, func(a, b leaf) int {
		switch {
		case match.Less(a.platform, b.platform):
			return -1
		case match.Less(b.platform, a.platform):
			return 1
		}
		return 0
	})
	return fit[0].desc, nil
}

// read reads a manifest and its configuration and puts the layers together.
func (w *walker) read(ctx context.Context, target ocispec.Descriptor) (*Manifest, error) {
	if !isManifest(target.MediaType) {
		return nil, unknownMediaType("image", target)
	}
	b, err := readDocument(ctx, w.p, target, w.lim)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	doc, err := parseManifest(b, w.lim)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", target.Digest, err)
	}
	m := &Manifest{Target: target, config: doc.Config}
	if m.raw, err = readDocument(ctx, w.p, doc.Config, w.lim); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if m.Config, err = parseConfig(m.raw, w.lim); err != nil {
		return nil, fmt.Errorf("%s: %w", doc.Config.Digest, err)
	}
	m.Layers, err = joinLayers(doc.Layers, m.Config.RootFS.DiffIDs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", target.Digest, err)
	}
	return m, nil
}

func joinLayers(blobs []ocispec.Descriptor, diffIDs []digest.Digest) ([]Layer, error) {
	if len(blobs) != len(diffIDs) {
		return nil, fmt.Errorf("%d layers, but %d DiffIDs in the config: %w", len(blobs), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	chain := layer.ChainIDs(diffIDs)
	layers := make([]Layer, len(blobs))
	for i := range blobs {
		layers[i] = Layer{Blob: blobs[i], DiffID: diffIDs[i], ChainID: chain[i]}
	}
	return layers, nil
}

// present returns the length of a blob; ErrNotFound, naming it, if it is not
// there.
func present(ctx context.Context, p content.Provider, d ocispec.Descriptor) (int64, error) {
	ra, err := p.ReaderAt(ctx, d)
	if err != nil {
		return 0, err
	}
	defer ra.Close()
	return ra.Size(), nil
}
