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
	for _, d := range list {
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
}

func newDockerArchive(ctx context.Context, a *archive, lim Limits) (*dockerArchive, error) {
	d := &dockerArchive{archive: a, lim: lim, docs: map[digest.Digest][]byte{}, files: map[digest.Digest]entry{}}
	if !a.has(dockerManifest) {
		return d, d.addLegacy(ctx)
	}
	b, err := a.readFile(dockerManifest, lim.Document)
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
	b, err := d.readFile(img.Config, d.lim.Document)
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
	e, err := d.lookup(name)
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
		desc.Digest, err = d.hash(ctx, e)
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
	z, comp, err := layer.Decompress(io.NewSectionReader(r, 0, 4<<10))
	if err != nil {
		return "", err
	}
	return comp, z.Close()
}
