package image

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// tarWriter writes the entries of an archive, the same bytes for the same
// images: owner 0, one mode, one time.
type tarWriter struct {
	tw  *tar.Writer
	err error // the first error; later calls do nothing
}

func newTarWriter(w io.Writer) *tarWriter { return &tarWriter{tw: tar.NewWriter(w)} }

func (t *tarWriter) header(typ byte, name string, mode, size int64) {
	if t.err == nil {
		t.err = t.tw.WriteHeader(&tar.Header{Typeflag: typ, Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0)})
	}
}

func (t *tarWriter) dir(name string) { t.header(tar.TypeDir, name+"/", 0o755, 0) }

func (t *tarWriter) file(name string, b []byte) {
	t.header(tar.TypeReg, name, 0o444, int64(len(b)))
	if t.err == nil {
		_, t.err = t.tw.Write(b)
	}
}

func (t *tarWriter) json(name string, v any) {
	b, err := marshal(v)
	if err != nil && t.err == nil {
		t.err = err
	}
	t.file(name, b)
}

// copy writes a file of which all is known before.
func (t *tarWriter) copy(ctx context.Context, name string, size int64, r io.Reader) {
	t.header(tar.TypeReg, name, 0o444, size)
	if t.err == nil {
		_, t.err = io.CopyBuffer(onlyWriter{t.tw}, ctxReader{ctx, r}, make([]byte, copyBuffer))
	}
}

func (t *tarWriter) close() error {
	if t.err != nil {
		return t.err
	}
	return t.tw.Close()
}

// writeArchive writes an oci-archive: a layout as a tar, documents before what
// they name.
func (k *sink) writeArchive(ctx context.Context, w io.Writer, img Image, blobs []ocispec.Descriptor, required map[digest.Digest]bool, o SaveOptions) error {
	t := newTarWriter(w)
	t.json(ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	t.json(ocispec.ImageIndexFile, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{indexEntry(img)},
	})
	t.dir(ocispec.ImageBlobsDir)
	m := newMeter(o.Progress, Event{Step: "save", Total: total(blobs)})
	dirs := map[digest.Algorithm]bool{}
	for _, d := range reversed(blobs) {
		if alg := d.Digest.Algorithm(); !dirs[alg] {
			dirs[alg] = true
			t.dir(ocispec.ImageBlobsDir + "/" + alg.String())
		}
		err := k.writeBlob(ctx, t, d, m)
		if errdefs.IsNotFound(err) && !required[d.Digest] {
			continue
		}
		if err != nil {
			return err
		}
	}
	return t.close()
}

// writeBlob writes one blob and verifies it on the way: a rotten one must not
// leave as if it were whole.
func (k *sink) writeBlob(ctx context.Context, t *tarWriter, d ocispec.Descriptor, m *meter) error {
	ra, err := k.ReaderAt(ctx, d)
	if err != nil {
		return err
	}
	defer ra.Close()
	if err := checkSize(d, ra.Size()); err != nil {
		return err
	}
	v := d.Digest.Algorithm().Digester()
	r := io.TeeReader(&progressReader{content.NewReader(ra), m.add}, v.Hash())
	t.copy(ctx, blobPath(d.Digest), d.Size, r)
	if t.err == nil && v.Digest() != d.Digest {
		t.err = wrongDigest(d.Digest, v.Digest())
	}
	return t.err
}

// writeDocker writes a docker-archive of one image: its config byte for byte,
// which is the image's identity there, and its layers uncompressed.
func (k *sink) writeDocker(ctx context.Context, w io.Writer, img Image, o SaveOptions) error {
	match, err := matcher(o.Platform)
	if err != nil {
		return err
	}
	m, err := (&walker{p: k, lim: kept}).manifest(ctx, img.Target, match)
	if err != nil {
		return err
	}
	t := newTarWriter(w)
	entry := dockerImage{Config: m.config.Digest.Encoded() + ".json", RepoTags: []string{}, Layers: []string{}}
	written := map[digest.Digest]bool{}
	for i, l := range m.Layers {
		name := l.DiffID.Encoded() + ".tar"
		entry.Layers = append(entry.Layers, name)
		if written[l.DiffID] {
			continue
		}
		written[l.DiffID] = true
		e := Event{Step: "save", Item: l.DiffID, Index: i, Count: len(m.Layers)}
		if err := k.writePlain(ctx, t, name, l, layer.Limits{Window: o.Window}, newMeter(o.Progress, e)); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
		}
	}
	if img.Name != "" {
		entry.RepoTags = append(entry.RepoTags, dockerName(img.Name))
	}
	t.file(entry.Config, m.raw)
	t.json(dockerManifest, []dockerImage{entry})
	return t.close()
}

// writePlain writes a layer uncompressed. A tar says the size first, so it is
// read twice: once for its length, once, verified, for its bytes.
func (k *sink) writePlain(ctx context.Context, t *tarWriter, name string, l Layer, lim layer.Limits, m *meter) error {
	ra, err := k.ReaderAt(ctx, l.Blob)
	if err != nil {
		return err
	}
	defer ra.Close()
	size, err := plainSize(ctx, ra, lim)
	if err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob.Digest, err)
	}
	blob := io.NewSectionReader(ra, 0, ra.Size())
	br, err := layer.NewBlobReader(blob, layer.Blob{Digest: l.Blob.Digest, Size: l.Blob.Size, DiffID: l.DiffID}, lim)
	if err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob.Digest, err)
	}
	defer br.Close()
	m.event.Total = size
	t.copy(ctx, name, size, &progressReader{br, m.add})
	if t.err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob.Digest, t.err)
	}
	return nil
}

// plainSize returns the uncompressed length of a blob.
func plainSize(ctx context.Context, ra content.ReaderAt, lim layer.Limits) (int64, error) {
	r, comp, err := layer.Decompress(ctxReader{ctx, io.NewSectionReader(ra, 0, ra.Size())}, lim)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	if comp == layer.None {
		return ra.Size(), nil
	}
	return io.CopyBuffer(onlyWriter{io.Discard}, r, make([]byte, copyBuffer))
}
