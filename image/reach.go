package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// reachable collects what descriptors lead to, children before what names them:
// the order in which blobs are copied, so that what is there is whole.
type reachable struct {
	walker
	list []ocispec.Descriptor
	seen map[visit]bool
	// skipLayers leaves out the layers of every manifest.
	skipLayers bool
}

// visit is a blob in a role: one digest may be named as a layer here and as a
// manifest there, and only as a manifest does it lead further.
type visit struct {
	digest   string
	document bool
}

func newReachable(w walker) *reachable { return &reachable{walker: w, seen: map[visit]bool{}} }

// add collects desc and all that is below it. A document that is not there ends
// its branch: an image may lack its other platforms. Any other error is one.
func (r *reachable) add(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	v := visit{desc.Digest.String(), isIndex(desc.MediaType) || isManifest(desc.MediaType)}
	if r.seen[v] {
		return nil
	}
	r.seen[v] = true
	if v.document {
		if err := r.addChildren(ctx, desc, depth); err != nil {
			return err
		}
	}
	r.list = append(r.list, desc)
	return nil
}

func (r *reachable) addChildren(ctx context.Context, desc ocispec.Descriptor, depth int) error {
	if over(depth-1, r.lim.Depth) { // a manifest stands below the deepest index
		return fmt.Errorf("%s: more than %d indexes inside each other: %w", desc.Digest, r.lim.Depth, errdefs.ErrResourceExhausted)
	}
	b, err := readDocument(ctx, r.p, desc, r.lim)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	children, err := r.children(desc.MediaType, b)
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	for _, c := range children {
		if err := r.add(ctx, c, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// children lists what an index or a manifest names. It takes any manifest, of
// attestations and artifacts too: they belong to the image and go where it goes.
func (r *reachable) children(mediaType string, b []byte) ([]ocispec.Descriptor, error) {
	if isIndex(mediaType) {
		idx, err := parseIndex(b, r.lim)
		if r.seenMore(len(idx.Manifests)) && err == nil {
			err = fmt.Errorf("more than %d manifests in all: %w", r.lim.Manifests, errdefs.ErrResourceExhausted)
		}
		return idx.Manifests, err
	}
	var m ocispec.Manifest
	if err := unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if over(len(m.Layers), r.lim.Layers) {
		return nil, fmt.Errorf("manifest: %d layers, more than %d: %w", len(m.Layers), r.lim.Layers, errdefs.ErrResourceExhausted)
	}
	if r.skipLayers {
		return []ocispec.Descriptor{m.Config}, nil
	}
	return append(m.Layers, m.Config), nil
}

func (r *reachable) seenMore(n int) bool {
	r.walker.seen += n
	return over(r.walker.seen, r.lim.Manifests)
}
