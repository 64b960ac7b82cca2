package testimage

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layout is an OCI image layout in memory, to be broken at will before it is
// written.
type Layout struct {
	Blobs map[digest.Digest][]byte
	Index ocispec.Index
	// Extra holds further files by name; "oci-layout" is made if it is not there.
	Extra map[string][]byte
}

// NewLayout returns an empty layout.
func NewLayout() *Layout {
	return &Layout{Blobs: map[digest.Digest][]byte{}, Extra: map[string][]byte{},
		Index: ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}}
}

// Add adds a blob.
func (l *Layout) Add(mediaType string, b []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	l.Blobs[d.Digest] = b
	return d
}

// AddJSON adds a document.
func (l *Layout) AddJSON(mediaType string, v any) ocispec.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // a value that tests made
	}
	return l.Add(mediaType, b)
}

// List lists a descriptor in index.json under a name; "" for none.
func (l *Layout) List(name string, d ocispec.Descriptor) {
	if name != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: name}
	}
	l.Index.Manifests = append(l.Index.Manifests, d)
}

// Image is what an image consists of.
type Image struct {
	Target ocispec.Descriptor
	Doc    ocispec.Manifest
	Config ocispec.Image
	Tars   [][]byte // the layers, uncompressed
}

// Platform is the platform of images that say no other.
var Platform = ocispec.Platform{OS: "linux", Architecture: "amd64"}

// AddImage makes an image of layers, each compressed as how says in turn (its
// last counts for the rest; none at all is gzip), and adds its blobs.
func (l *Layout) AddImage(t testing.TB, p ocispec.Platform, layers []Layer, how ...string) Image {
	t.Helper()
	img := Image{Config: ocispec.Image{Platform: p, Created: &Epoch, RootFS: ocispec.RootFS{Type: "layers"}}}
	img.Config.Config.Env = []string{"PATH=/bin"}
	img.Config.Config.Cmd = []string{"/bin/sh"}
	var descs []ocispec.Descriptor
	for i, layer := range layers {
		comp := "gzip"
		if len(how) > 0 {
			comp = how[min(i, len(how)-1)]
		}
		b := layer.Tar(t)
		img.Tars = append(img.Tars, b)
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, digest.FromBytes(b))
		img.Config.History = append(img.Config.History, ocispec.History{Created: &Epoch, CreatedBy: "testimage"})
		descs = append(descs, l.Add(mediaTypes[comp], Compress(t, b, comp)))
	}
	img.Doc = ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: l.AddJSON(ocispec.MediaTypeImageConfig, img.Config), Layers: descs}
	img.Target = l.AddJSON(ocispec.MediaTypeImageManifest, img.Doc)
	return img
}

var mediaTypes = map[string]string{
	"none": ocispec.MediaTypeImageLayer,
	"gzip": ocispec.MediaTypeImageLayerGzip,
	"zstd": ocispec.MediaTypeImageLayerZstd,
}

// Files returns the layout's files by name.
func (l *Layout) Files(t testing.TB) map[string][]byte {
	t.Helper()
	idx, err := json.Marshal(l.Index)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"index.json": idx, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	maps.Copy(files, l.Extra)
	for d, b := range l.Blobs {
		files["blobs/"+d.Algorithm().String()+"/"+d.Encoded()] = b
	}
	return files
}

// Dir writes the layout to a directory of the test.
func (l *Layout) Dir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	WriteFiles(t, dir, l.Files(t))
	return dir
}

// WriteFiles writes files below dir.
func WriteFiles(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Tar returns the layout as an oci-archive.
func (l *Layout) Tar(t testing.TB) []byte {
	t.Helper()
	return TarFiles(t, l.Files(t))
}

// TarFiles returns files as a tar, by name.
func TarFiles(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var layer Layer
	for _, name := range slices.Sorted(maps.Keys(files)) {
		layer = append(layer, File(name, string(files[name])))
	}
	return layer.Tar(t)
}

// TempFile writes b to a file of the test.
func TempFile(t testing.TB, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "archive.tar")
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

// TarEntries lists the names of a tar, in order.
func TarEntries(t testing.TB, b []byte) []string {
	t.Helper()
	var names []string
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err != nil {
			return names
		}
		names = append(names, h.Name)
	}
}
