package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// composer makes an image of a chain of snapshots.
type composer struct {
	s     *Store
	view  Snapshots
	o     SaveOptions
	sink  *sink
	chain []snapshots.Info // base first
}

// compose returns the image; blobs that had to be made are in the sink.
func (c *composer) compose(ctx context.Context, key string) (Image, error) {
	var err error
	if c.chain, err = chainOf(ctx, c.view, key); err != nil {
		return Image{}, err
	}
	if len(c.chain) == 0 && c.o.Base == "" {
		return Image{}, fmt.Errorf("a snapshot without a name: %w", errdefs.ErrInvalidArgument)
	}
	base, img, err := c.base(ctx)
	if err != nil {
		return Image{}, err
	}
	layers, err := c.layers(ctx, base)
	if err != nil {
		return Image{}, err
	}
	if base != nil && sameLayers(base.Layers, layers) {
		return img, nil
	}
	target, err := c.document(ctx, base, layers)
	return Image{Target: target}, err
}

// chainOf returns the snapshot and all below it, base first.
func chainOf(ctx context.Context, view Snapshots, key string) ([]snapshots.Info, error) {
	var chain []snapshots.Info
	for key != "" {
		i, err := view.Stat(ctx, key)
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", key, err)
		}
		chain = append(chain, i)
		key = i.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// base finds the image that this one goes on from: the one that was asked for,
// else one that was unpacked to a snapshot of the chain, the nearest to its tip.
// nil if there is none.
func (c *composer) base(ctx context.Context) (*Manifest, Image, error) {
	if c.o.Base != "" {
		img, err := c.s.Resolve(ctx, c.o.Base)
		if err != nil {
			return nil, img, err
		}
		m, err := c.s.manifest(ctx, img, c.o.Platform)
		return m, img, err
	}
	list, err := c.s.List(ctx)
	if err != nil {
		return nil, Image{}, err
	}
	depth, base, from := 0, (*Manifest)(nil), Image{}
	for _, img := range list {
		m, err := c.s.manifest(ctx, img, c.o.Platform)
		if err != nil {
			continue // not for this platform, or broken: not what this chain came from
		}
		if d := c.depth(m.ChainID()); d > depth {
			depth, base, from = d, m, img
		}
	}
	return base, from, ctx.Err()
}

// depth is how many snapshots of the chain a ChainID stands for; 0 for none.
func (c *composer) depth(chainID digest.Digest) int {
	return 1 + slices.IndexFunc(c.chain, func(i snapshots.Info) bool { return i.Name == chainID.String() && chainID != "" })
}

func sameLayers(a, b []Layer) bool {
	return slices.EqualFunc(a, b, func(a, b Layer) bool {
		return a.Blob.Digest == b.Blob.Digest && a.Blob.Size == b.Blob.Size && a.DiffID == b.DiffID
	})
}

// layers has each layer's blob, kept or made.
func (c *composer) layers(ctx context.Context, base *Manifest) ([]Layer, error) {
	layers := make([]Layer, len(c.chain))
	for i, info := range c.chain {
		l, ok := c.kept(i, base)
		if !ok {
			var err error
			if l, err = c.makeLayer(ctx, i); err != nil {
				return nil, fmt.Errorf("layer %d of %d (%s): %w", i+1, len(c.chain), info.Name, err)
			}
		}
		layers[i] = l
	}
	return layers, nil
}

// kept finds a blob of layer i that the store has: the base's, else the one that
// the snapshot was unpacked from.
func (c *composer) kept(i int, base *Manifest) (Layer, bool) {
	if base != nil && i < len(base.Layers) && base.Layers[i].ChainID.String() == c.chain[i].Name && c.has(base.Layers[i].Blob) {
		return base.Layers[i], true
	}
	l, ok := keptLayer(c.chain[i].Labels)
	return l, ok && c.has(l.Blob)
}

func (c *composer) has(d ocispec.Descriptor) bool {
	size, ok := c.s.layout.size(d.Digest)
	return ok && size == d.Size
}

// keptLayer reads the labels that Unpack set.
func keptLayer(labels map[string]string) (Layer, bool) {
	size, err := strconv.ParseInt(labels[LabelBlobSize], 10, 64)
	l := Layer{
		Blob:   ocispec.Descriptor{MediaType: labels[LabelMediaType], Digest: digest.Digest(labels[LabelBlob]), Size: size},
		DiffID: digest.Digest(labels[LabelDiffID]),
	}
	return l, err == nil && checkLayer(l.Blob) == nil && l.DiffID.Validate() == nil
}

// makeLayer writes the difference between a snapshot and its parent as a blob;
// DiffID and digest are taken in the same pass.
func (c *composer) makeLayer(ctx context.Context, i int) (Layer, error) {
	cs, err := c.sink.store()
	if err != nil {
		return Layer{}, err
	}
	comp := c.o.Compression
	if comp == "" {
		comp = layer.Gzip
	}
	var l Layer
	l.Blob, err = produce(ctx, cs, ocispec.Descriptor{MediaType: layer.MediaType(comp)}, func(w io.Writer) (err error) {
		l.DiffID, err = c.writeLayer(ctx, w, i, comp)
		return err
	})
	return l, err
}

func (c *composer) writeLayer(ctx context.Context, w io.Writer, i int, comp layer.Compression) (digest.Digest, error) {
	z, err := layer.NewCompressor(w, comp)
	if err != nil {
		return "", err
	}
	m := newMeter(c.o.Progress, Event{Step: "diff", Index: i, Count: len(c.chain)})
	o := layer.TarOptions{Skipped: c.o.Skipped, Progress: m.set}
	if !c.o.Created.IsZero() {
		o.Epoch = c.o.Created.Unix()
	}
	info := c.chain[i]
	r, err := layer.WriteTar(ctx, z, c.view.Diff(ctx, info.Parent, info.Name), o)
	if err != nil {
		z.Close()
		return "", err
	}
	return r.DiffID, z.Close()
}

// document writes the configuration and the manifest.
func (c *composer) document(ctx context.Context, base *Manifest, layers []Layer) (ocispec.Descriptor, error) {
	config, err := c.config(base, layers)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Layers:    []ocispec.Descriptor{},
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, ociLayer(l.Blob))
	}
	if m.Config, err = c.write(ctx, ocispec.MediaTypeImageConfig, config); err != nil {
		return ocispec.Descriptor{}, err
	}
	b, err := marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return c.write(ctx, ocispec.MediaTypeImageManifest, b)
}

// ociLayer gives a kept blob OCI's name for what it is, since the manifest is
// OCI's, too.
func ociLayer(d ocispec.Descriptor) ocispec.Descriptor {
	if comp, err := layer.ParseMediaType(d.MediaType); err == nil && strings.Contains(d.MediaType, "docker") {
		d.MediaType = layer.MediaType(comp)
	}
	return d
}

// write makes a blob of b.
func (c *composer) write(ctx context.Context, mediaType string, b []byte) (ocispec.Descriptor, error) {
	cs, err := c.sink.store()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return produce(ctx, cs, desc, func(w io.Writer) error { _, err := w.Write(b); return err })
}

// config goes on from the base's configuration, of which every field that is not
// about layers stays as it is, unknown ones too.
func (c *composer) config(base *Manifest, layers []Layer) ([]byte, error) {
	doc, history, err := c.baseConfig(base)
	if err != nil {
		return nil, err
	}
	rootfs := ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	for _, l := range layers {
		rootfs.DiffIDs = append(rootfs.DiffIDs, l.DiffID)
	}
	if base != nil && countLayers(history) > c.depth(base.ChainID()) {
		history = nil // it speaks of layers that this image has not
	}
	for _, info := range c.chain[countLayers(history):] {
		created := c.created(info)
		history = append(history, ocispec.History{Created: &created, CreatedBy: c.o.CreatedBy, Author: c.o.Author})
	}
	for k, v := range map[string]any{"rootfs": rootfs, "history": history, "created": c.created(c.chain[len(c.chain)-1])} {
		if doc[k], err = marshal(v); err != nil {
			return nil, err
		}
	}
	return marshal(doc)
}

// baseConfig returns the base's configuration field by field, and its history;
// without a base, that of an image for the platform.
func (c *composer) baseConfig(base *Manifest) (map[string]json.RawMessage, []ocispec.History, error) {
	if base != nil {
		doc := map[string]json.RawMessage{}
		err := unmarshal(base.raw, &doc)
		return doc, base.Config.History, err
	}
	p := platforms.DefaultSpec()
	if c.o.Platform != "" {
		var err error
		if p, err = platforms.Parse(c.o.Platform); err != nil {
			return nil, nil, err
		}
	}
	p = platforms.Normalize(ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant})
	b, err := marshal(ocispec.Image{Platform: p})
	if err != nil {
		return nil, nil, err
	}
	doc := map[string]json.RawMessage{}
	err = unmarshal(b, &doc)
	return doc, nil, err
}

// countLayers is how many layers a history speaks of.
func countLayers(history []ocispec.History) int {
	n := 0
	for _, h := range history {
		if !h.EmptyLayer {
			n++
		}
	}
	return n
}

func (c *composer) created(i snapshots.Info) time.Time {
	if !c.o.Created.IsZero() {
		return c.o.Created.UTC()
	}
	return i.Created.UTC()
}

// dockerName is an image's name as a docker-archive has it: with a tag.
func dockerName(name string) string {
	if strings.Contains(name[strings.LastIndex(name, "/")+1:], ":") {
		return name
	}
	return name + ":latest"
}
