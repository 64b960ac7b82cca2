package image

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// The files of a docker-archive (`docker save`), and of the form that it had
// before docker 1.10, which is a folder per layer.
const (
	dockerManifest     = "manifest.json"
	dockerRepositories = "repositories"
	dockerLegacyLayer  = "layer.tar"
	dockerLegacyJSON   = "json"
)

// dockerImage is one entry of a docker-archive's manifest.json.
type dockerImage struct {
	Config   string   // name of the config in the archive
	RepoTags []string // names of the image
	Layers   []string // names of the layers, base first
}

// parseDockerManifest reads manifest.json.
func parseDockerManifest(b []byte, lim Limits) ([]dockerImage, error) {
	var list []dockerImage
	if err := unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", dockerManifest, err)
	}
	if over(len(list), lim.Manifests) {
		return nil, fmt.Errorf("%s: %d images, more than %d: %w", dockerManifest, len(list), lim.Manifests, errdefs.ErrResourceExhausted)
	}
	names := 0
	for _, d := range list {
		if names += len(d.RepoTags); over(names, lim.Manifests) {
			return nil, fmt.Errorf("%s: more than %d names of images: %w", dockerManifest, lim.Manifests, errdefs.ErrResourceExhausted)
		}
		if over(len(d.Layers), lim.Layers) {
			return nil, fmt.Errorf("%s: %d layers, more than %d: %w", dockerManifest, len(d.Layers), lim.Layers, errdefs.ErrResourceExhausted)
		}
		for _, name := range append([]string{d.Config}, d.Layers...) {
			if _, err := cleanName(name); err != nil || name == "" {
				return nil, fmt.Errorf("%s: name %q: %w", dockerManifest, name, errdefs.ErrInvalidArgument)
			}
		}
	}
	return list, nil
}

// dockerArchive shows a docker-archive as OCI images: configs as they are,
// layers as they are (a plain layer's digest is its DiffID), and a manifest made
// for each. It is a content.Provider and an adopter.
type dockerArchive struct {
	*archive
	lim   Limits
	index ocispec.Index
	docs  map[digest.Digest][]byte // configs and made manifests
	files map[digest.Digest]entry  // layers

	// What few bytes name many times over is dealt with once: by the file's name
	// in the archive, the digest of its bytes, and that of the tar in it.
	sums, diffs map[string]digest.Digest
	read        int64 // bytes of documents, read or made, each time
	unpacked    int64 // bytes that layers were decompressed to
}

// maxDocuments is how many documents of the largest size an archive may make
// this package read or keep.
const maxDocuments = 16

// spend counts bytes of documents.
func (d *dockerArchive) spend(b []byte) error {
	if d.read += int64(len(b)); over(d.read, d.lim.Document*maxDocuments) {
		return fmt.Errorf("documents of more than %d bytes in all: %w", d.lim.Document*maxDocuments, errdefs.ErrResourceExhausted)
	}
	return nil
}

// document reads a JSON document of the archive.
func (d *dockerArchive) document(name string) ([]byte, error) {
	b, err := d.readFile(name, d.lim.Document)
	if err != nil {
		return nil, err
	}
	return b, d.spend(b)
}

func newDockerArchive(ctx context.Context, a *archive, lim Limits) (*dockerArchive, error) {
	d := &dockerArchive{archive: a, lim: lim, docs: map[digest.Digest][]byte{}, files: map[digest.Digest]entry{},
		sums: map[string]digest.Digest{}, diffs: map[string]digest.Digest{}}
	if !a.has(dockerManifest) {
		return d, d.addLegacy(ctx)
	}
	b, err := d.document(dockerManifest)
	if err != nil {
		return nil, err
	}
	list, err := parseDockerManifest(b, lim)
	if err != nil {
		return nil, err
	}
	for _, img := range list {
		if err := d.add(ctx, img); err != nil {
			return nil, fmt.Errorf("config %s: %w", img.Config, err)
		}
	}
	return d, nil
}

// add makes the OCI form of one image.
func (d *dockerArchive) add(ctx context.Context, img dockerImage) error {
	b, err := d.document(img.Config)
	if err != nil {
		return err
	}
	c, err := parseConfig(b, d.lim)
	if err != nil {
		return err
	}
	if len(c.RootFS.DiffIDs) != len(img.Layers) {
		return fmt.Errorf("%d layers, but %d DiffIDs: %w", len(img.Layers), len(c.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	var layers []ocispec.Descriptor
	for i, name := range img.Layers {
		desc, err := d.layer(ctx, name, c.RootFS.DiffIDs[i])
		if err != nil {
			return fmt.Errorf("layer %d %s: %w", i+1, name, err)
		}
		layers = append(layers, desc)
	}
	return d.addManifest(b, layers, img.RepoTags)
}

// addManifest makes the manifest of a config and its layers, and lists it under
// each of its names.
func (d *dockerArchive) addManifest(config []byte, layers []ocispec.Descriptor, names []string) error {
	b, err := marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    d.addDoc(ocispec.MediaTypeImageConfig, config),
		Layers:    append([]ocispec.Descriptor{}, layers...),
	})
	if err != nil {
		return err
	}
	if err := d.spend(b); err != nil {
		return err
	}
	desc := d.addDoc(ocispec.MediaTypeImageManifest, b)
	if len(names) == 0 {
		d.index.Manifests = append(d.index.Manifests, desc)
	}
	for _, name := range names {
		named := desc
		named.Annotations = map[string]string{ocispec.AnnotationRefName: name}
		d.index.Manifests = append(d.index.Manifests, named)
	}
	return nil
}

func (d *dockerArchive) addDoc(mediaType string, b []byte) ocispec.Descriptor {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	d.docs[desc.Digest] = b
	return desc
}

// layer returns the descriptor of a layer in the archive. Of a plain one the
// digest is the DiffID, verified when it is copied; a compressed one is hashed.
func (d *dockerArchive) layer(ctx context.Context, name string, diffID digest.Digest) (ocispec.Descriptor, error) {
	file, e, err := d.resolve(name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	comp, err := d.sniff(e)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: layer.MediaType(comp), Digest: diffID, Size: e.size}
	switch {
	case comp != layer.None:
		desc.Digest, err = once(d.sums, file, func() (digest.Digest, error) { return d.hash(ctx, e) })
	case e.digest != "" && e.digest != diffID:
		err = wrongDigest(diffID, e.digest)
	}
	d.files[desc.Digest] = e
	return desc, err
}

// sniff tells how an entry is compressed, by its first bytes.
func (d *dockerArchive) sniff(e entry) (layer.Compression, error) {
	ra, err := d.open(e)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	return sniff(ra)
}

// once is what f says of key, asked once.
func once(known map[string]digest.Digest, key string, f func() (digest.Digest, error)) (digest.Digest, error) {
	if d, ok := known[key]; ok {
		return d, nil
	}
	d, err := f()
	if err == nil {
		known[key] = d
	}
	return d, err
}

// hash returns the digest of an entry as it is.
func (d *dockerArchive) hash(ctx context.Context, e entry) (digest.Digest, error) {
	if e.digest != "" {
		return e.digest, nil
	}
	ra, err := d.open(e)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	return digest.FromReader(ctxReader{ctx, content.NewReader(ra)})
}

// ReaderAt implements content.Provider.
func (d *dockerArchive) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if b, ok := d.docs[desc.Digest]; ok {
		return section{io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b)))}, nil
	}
	if e, ok := d.files[desc.Digest]; ok {
		return d.open(e)
	}
	return nil, missing(desc.Digest)
}

// adopt implements adopter.
func (d *dockerArchive) adopt(dg digest.Digest, size int64) string {
	return d.files[dg].adoptable(dg, size)
}

// sniff tells how a file is compressed by its first bytes, and refuses what no
// layer is compressed with by name.
func sniff(r io.ReaderAt) (layer.Compression, error) {
	z, comp, err := layer.Decompress(io.NewSectionReader(r, 0, 4<<10), layer.Limits{})
	if err != nil {
		return "", err
	}
	return comp, z.Close()
}
