package service

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// layerTypes are the media types that Apply takes. How a blob is compressed, it
// says itself.
var layerTypes = map[string]bool{
	ocispec.MediaTypeImageLayer:                                    true,
	ocispec.MediaTypeImageLayerGzip:                                true,
	ocispec.MediaTypeImageLayerZstd:                                true,
	images.MediaTypeDockerSchema2Layer:                             true,
	images.MediaTypeDockerSchema2LayerGzip:                         true,
	images.MediaTypeDockerSchema2LayerZstd:                         true,
	images.MediaTypeDockerSchema2LayerForeign:                      true,
	images.MediaTypeDockerSchema2LayerForeignGzip:                  true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": true,
}

// Apply implements diff.Applier: it unpacks a layer onto the active snapshot that
// mounts show, and verifies its digest and size. It returns the uncompressed
// layer's descriptor. ErrNotImplemented where the mounts are not the store's, and
// for layers that need a processor.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	res, err := d.apply(ctx, desc, mounts, opts)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	return res, nil
}

func (d *Differ) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts []diff.ApplyOpt) (none ocispec.Descriptor, err error) {
	var config diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &config); err != nil {
			return none, err
		}
	}
	rec, err := d.owner(ctx, mounts)
	if err != nil {
		return none, err
	}
	if !layerTypes[desc.MediaType] {
		return none, d.refuse(ctx, rec, desc.MediaType)
	}
	if ctx, err = forward(ctx); err != nil {
		return none, err
	}
	ra, err := d.o.Content.ReaderAt(ctx, desc)
	if err != nil {
		return none, fmt.Errorf("content: %w", err)
	}
	defer ra.Close()
	in := bufio.NewReaderSize(content.NewReader(ra), transferSize)
	blob, err := layer.NewBlobReader(in, layer.Blob{Digest: desc.Digest, Size: desc.Size}, d.o.Limits)
	if err != nil {
		return none, err
	}
	defer blob.Close()
	if err := d.o.Store.ApplyMounts(ctx, mounts, blob, layer.ApplyOptions{Limits: d.o.Limits}); err != nil {
		return none, err
	}
	if _, err := io.Copy(io.Discard, blob); err != nil { // what follows the tar is in the digests, too
		return none, err
	}
	if config.Progress != nil {
		config.Progress(desc.Size)
	}
	d.o.Transferred("apply", blob.TarSize())
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Size: blob.TarSize(), Digest: blob.DiffID()}, nil
}

// refuse is the error for a media type that Apply does not know. Another differ may,
// but not where the layer's whiteouts have to be kept.
func (d *Differ) refuse(ctx context.Context, rec snapshot.Record, mediaType string) error {
	if d.o.Rebase && len(rec.Parents) == 0 {
		if drv, err := d.o.Store.Driver(ctx, rec.Driver); err != nil {
			return err
		} else if drv.Capabilities().Rebase {
			return fmt.Errorf("media type %q onto a layer that gets its parent later; such images need a snapshotter without the capability rebase: %w",
				mediaType, errdefs.ErrFailedPrecondition)
		}
	}
	return fmt.Errorf("media type %q: %w", mediaType, errdefs.ErrNotImplemented)
}
