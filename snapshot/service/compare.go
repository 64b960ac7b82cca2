package service

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// transferSize is how much goes to, or comes from, the content store in one
// message.
const transferSize = 1 << 20

// diffTypes are the media types that Compare writes.
var diffTypes = map[string]layer.Compression{
	ocispec.MediaTypeImageLayer:     layer.None,
	ocispec.MediaTypeImageLayerGzip: layer.Gzip,
	ocispec.MediaTypeImageLayerZstd: layer.Zstd,
}

// Compare implements diff.Comparer: it writes the layer that turns what lower
// shows into what upper shows. No lower is the empty tree. ErrNotImplemented where
// either is not the store's.
func (d *Differ) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (ocispec.Descriptor, error) {
	desc, err := d.compare(ctx, lower, upper, opts)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("diff: %w", err)
	}
	return desc, nil
}

func (d *Differ) compare(ctx context.Context, lower, upper []mount.Mount, opts []diff.Opt) (none ocispec.Descriptor, err error) {
	c := comparison{d: d, lower: lower, upper: upper}
	for _, o := range opts {
		if err := o(&c.config); err != nil {
			return none, err
		}
	}
	if c.config.MediaType == "" {
		c.config.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	var ok bool
	if c.compression, ok = diffTypes[c.config.MediaType]; !ok || c.config.Compressor != nil {
		return none, fmt.Errorf("media type %q: %w", c.config.MediaType, errdefs.ErrNotImplemented)
	}
	for _, ms := range [][]mount.Mount{lower, upper} {
		if len(ms) == 0 {
			continue
		}
		if _, err := d.owner(ctx, ms); err != nil {
			return none, err
		}
	}
	if ctx, err = forward(ctx); err != nil {
		return none, err
	}
	ctx, done, err := d.keep(ctx)
	if err != nil {
		return none, err
	}
	desc, err := c.write(ctx)
	done(err == nil)
	return desc, err
}

// comparison is a Compare in progress.
type comparison struct {
	d            *Differ
	lower, upper []mount.Mount
	config       diff.Config
	compression  layer.Compression
}

// write writes the blob to the content store, under the request's reference or one
// of its own, which goes if this fails.
func (c *comparison) write(ctx context.Context) (none ocispec.Descriptor, err error) {
	store, ref := c.d.o.Content, c.config.Reference
	own := ref == ""
	if own {
		ref = "layerd-diff-" + rand.Text()
	}
	w, err := content.OpenWriter(ctx, store, content.WithRef(ref), content.WithDescriptor(ocispec.Descriptor{MediaType: c.config.MediaType}))
	if err != nil {
		return none, fmt.Errorf("content %s: %w", ref, err)
	}
	committed := false
	defer func() {
		w.Close()
		if committed || !own {
			return
		}
		if aerr := store.Abort(context.WithoutCancel(ctx), ref); aerr != nil && !errdefs.IsNotFound(aerr) {
			c.d.o.Log.Warn("unfinished content stays", "ref", ref, "error", aerr)
		}
	}()
	if !own { // whatever an earlier attempt wrote is begun anew
		if err := w.Truncate(0); err != nil {
			return none, fmt.Errorf("content %s: %w", ref, err)
		}
	}
	out := &countingWriter{w: w, hash: digest.SHA256.Digester()}
	res, err := c.tar(ctx, out)
	if err != nil {
		return none, err
	}
	desc := ocispec.Descriptor{MediaType: c.config.MediaType, Size: out.n, Digest: out.hash.Digest()}
	marks := c.labels(res.DiffID)
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(marks))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return none, fmt.Errorf("content %s: %w", desc.Digest, err)
	}
	committed = err == nil
	if err != nil {
		err = c.mark(ctx, desc.Digest, marks)
	}
	c.d.o.Transferred("diff", res.Size)
	return desc, err
}

// tar writes the changes, compressed.
func (c *comparison) tar(ctx context.Context, w *countingWriter) (layer.TarResult, error) {
	b := bufio.NewWriterSize(w, transferSize)
	z, err := layer.NewCompressor(b, c.compression)
	if err != nil {
		return layer.TarResult{}, err
	}
	o := layer.TarOptions{
		SkipWhiteoutNames: c.d.o.SkipWhiteoutNames,
		Skipped: func(path, reason string) {
			c.d.o.Log.Info("left out of a diff", "path", path, "reason", reason)
		},
	}
	changes := noLater(c.d.o.Store.DiffMounts(ctx, c.lower, c.upper), c.config.SourceDateEpoch)
	res, err := layer.WriteTar(ctx, z, changes, o)
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = b.Flush()
	}
	return res, err
}

// labels are those that the request has for the blob, and its DiffID where the
// blob's digest is another.
func (c *comparison) labels(diffID digest.Digest) map[string]string {
	l := maps.Clone(c.config.Labels)
	if c.compression == layer.None {
		return l
	}
	if l == nil {
		l = map[string]string{}
	}
	l[labels.LabelUncompressed] = diffID.String()
	return l
}

// mark gives a blob that was there already the labels that it lacks.
func (c *comparison) mark(ctx context.Context, blob digest.Digest, marks map[string]string) error {
	info, err := c.d.o.Content.Info(ctx, blob)
	if err != nil {
		return fmt.Errorf("content %s: %w", blob, err)
	}
	var fields []string
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	for name, value := range marks {
		if info.Labels[name] == "" {
			info.Labels[name] = value
			fields = append(fields, "labels."+name)
		}
	}
	if len(fields) == 0 {
		return nil
	}
	if _, err := c.d.o.Content.Update(ctx, info, fields...); err != nil {
		return fmt.Errorf("labels of content %s: %w", blob, err)
	}
	return nil
}

// countingWriter counts and hashes what goes to the content store.
type countingWriter struct {
	w    content.Writer
	hash digest.Digester
	n    int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.hash.Hash().Write(p[:n])
	c.n += int64(n)
	return n, err
}
