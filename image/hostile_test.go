package image_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
)

// bad is an image that must be refused.
type bad struct {
	name string
	// spoil breaks a whole layout.
	spoil func(t *testing.T, l *testimage.Layout, std testimage.Image)
	is    func(error) bool
	says  string // part of the message; "%s" stands for what names returns
	names func(std testimage.Image) digest.Digest
	lim   image.Limits
}

func layerOf(i int) func(testimage.Image) digest.Digest {
	return func(std testimage.Image) digest.Digest { return std.Doc.Layers[i].Digest }
}

func configOf(std testimage.Image) digest.Digest   { return std.Doc.Config.Digest }
func manifestOf(std testimage.Image) digest.Digest { return std.Target.Digest }

// relist replaces the only entry of index.json.
func relist(l *testimage.Layout, d ocispec.Descriptor) {
	l.Index.Manifests = nil
	l.List("std", d)
}

// remake replaces the manifest by one that f changed.
func remake(l *testimage.Layout, std testimage.Image, f func(*ocispec.Manifest)) {
	f(&std.Doc)
	relist(l, l.AddJSON(ocispec.MediaTypeImageManifest, std.Doc))
}

func index(l *testimage.Layout, ds ...ocispec.Descriptor) ocispec.Descriptor {
	return l.AddJSON(ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: l.Index.Versioned, MediaType: ocispec.MediaTypeImageIndex, Manifests: ds})
}

var badLayouts = []bad{
	{name: "missing layer", is: errdefs.IsNotFound, says: "%s", names: layerOf(1),
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			delete(l.Blobs, std.Doc.Layers[1].Digest)
		}},
	{name: "missing config", is: errdefs.IsNotFound, says: "%s", names: configOf,
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) { delete(l.Blobs, std.Doc.Config.Digest) }},
	{name: "missing manifest", is: errdefs.IsNotFound, says: "%s", names: manifestOf,
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) { delete(l.Blobs, std.Target.Digest) }},
	{name: "wrong digest of a layer", is: errdefs.IsDataLoss, says: "%s", names: layerOf(2),
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			l.Blobs[std.Doc.Layers[2].Digest] = bytes.Repeat([]byte{1}, int(std.Doc.Layers[2].Size))
		}},
	{name: "short layer", is: errdefs.IsDataLoss, says: "%s", names: layerOf(0),
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			l.Blobs[std.Doc.Layers[0].Digest] = l.Blobs[std.Doc.Layers[0].Digest][:1000]
		}},
	{name: "wrong digest of the config", is: errdefs.IsDataLoss, says: "%s", names: configOf,
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			l.Blobs[std.Doc.Config.Digest] = bytes.Repeat([]byte{' '}, int(std.Doc.Config.Size))
		}},
	{name: "size of a layer that is not its size", is: errdefs.IsDataLoss, says: "%s", names: layerOf(1),
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers[1].Size++ })
		}},
	{name: "negative size", is: errdefs.IsInvalidArgument, says: "size -1",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers[1].Size = -1 })
		}},
	{name: "digest that is a path", is: errdefs.IsInvalidArgument, says: "../../etc/passwd",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers[1].Digest = "sha256:../../etc/passwd" })
		}},
	{name: "unknown algorithm", is: errdefs.IsInvalidArgument, says: "md5:",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Config.Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" })
		}},
	{name: "unknown media type of a layer", is: errdefs.IsNotImplemented, says: "application/x-squashfs",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers[1].MediaType = "application/x-squashfs" })
		}},
	{name: "encrypted layer", is: errdefs.IsNotImplemented, says: "+encrypted",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers[1].MediaType += "+encrypted" })
		}},
	{name: "artifact", is: errdefs.IsNotImplemented, says: "application/vnd.example",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Config.MediaType = "application/vnd.example+json" })
		}},
	{name: "schema 1", is: errdefs.IsNotImplemented, says: "prettyjws",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			d := std.Target
			d.MediaType = "application/vnd.docker.distribution.manifest.v1+prettyjws"
			relist(l, d)
		}},
	{name: "more layers than DiffIDs", is: errdefs.IsInvalidArgument, says: "4 layers, but 3 DiffIDs",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) })
		}},
	{name: "manifest that is an index too", is: errdefs.IsInvalidArgument, says: "ambiguous",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			var doc map[string]any
			json.Unmarshal(l.Blobs[std.Target.Digest], &doc)
			doc["manifests"] = []any{}
			relist(l, l.AddJSON(ocispec.MediaTypeImageManifest, doc))
		}},
	{name: "manifest of another version", is: errdefs.IsInvalidArgument, says: "schemaVersion 3",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			remake(l, std, func(m *ocispec.Manifest) { m.SchemaVersion = 3 })
		}},
	{name: "manifest that is no JSON", is: errdefs.IsInvalidArgument, says: "JSON",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			relist(l, l.Add(ocispec.MediaTypeImageManifest, []byte("<html>")))
		}},
	{name: "JSON of endless depth", is: errdefs.IsInvalidArgument, says: "depth",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			relist(l, l.Add(ocispec.MediaTypeImageManifest, bytes.Repeat([]byte("["), 1<<20)))
		}},
	{name: "huge manifest", is: errdefs.IsResourceExhausted, says: "JSON document",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			relist(l, l.Add(ocispec.MediaTypeImageManifest, make([]byte, 9<<20)))
		}},
	{name: "manifest of a million empty layers", is: errdefs.IsResourceExhausted, says: "objects",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			b := []byte(`{"schemaVersion":2,"config":{},"layers":[` + strings.Repeat("{},", 1e6) + "{}]}")
			relist(l, l.Add(ocispec.MediaTypeImageManifest, b))
		}},
	{name: "index that claims to hold itself", is: errdefs.IsDataLoss, says: "the bytes have digest",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			self := digest.FromString("self")
			b := fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":`, ocispec.MediaTypeImageIndex, self)
			b = fmt.Appendf(b, "%d}]}", len(b)+6)
			l.Blobs[self] = b
			relist(l, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: self, Size: int64(len(b))})
		}},
	{name: "indexes too deep", is: errdefs.IsResourceExhausted, says: "inside each other",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			d := std.Target
			for range 20 {
				d = index(l, d)
			}
			relist(l, d)
		}},
	{name: "indexes that multiply", is: errdefs.IsResourceExhausted, says: "manifests in all",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			d := std.Target
			for range 4 {
				d = index(l, d, d, d, d, d, d, d, d, d, d)
			}
			relist(l, d)
		}},
	{name: "too many manifests", is: errdefs.IsResourceExhausted, says: "1001 manifests",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			for range 1000 {
				l.List("std", std.Target)
			}
		}},
	{name: "too many layers", is: errdefs.IsResourceExhausted, says: "3 layers, more than 2", lim: image.Limits{Layers: 2},
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {}},
	{name: "no image at all", is: errdefs.IsNotFound, says: "no image",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) { l.Index.Manifests = nil }},
	{name: "no platform of ours", is: errdefs.IsNotFound, says: "linux/s390x",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			d := std.Target
			d.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
			relist(l, index(l, d))
		}},
	{name: "layout of another version", is: errdefs.IsNotImplemented, says: "2.0.0",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			l.Extra["oci-layout"] = []byte(`{"imageLayoutVersion":"2.0.0"}`)
		}},
	{name: "name with a newline", is: errdefs.IsInvalidArgument, says: `"a\nb"`,
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) {
			l.Index.Manifests = nil
			l.List("a\nb", std.Target)
		}},
	{name: "index.json of another type", is: errdefs.IsInvalidArgument, says: "index.json",
		spoil: func(t *testing.T, l *testimage.Layout, std testimage.Image) { l.Extra["index.json"] = []byte(`[1,2]`) }},
}

// TestBadLayouts: each is refused by what is wrong with it, as a directory, as
// an archive and as a stream, and leaves nothing.
func TestBadLayouts(t *testing.T) {
	testenv.Slow(t)
	for _, c := range badLayouts {
		t.Run(c.name, func(t *testing.T) {
			l := testimage.NewLayout()
			std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
			l.List("std", std.Target)
			says := c.says
			if c.names != nil {
				says = c.names(std).String()
			}
			c.spoil(t, l, std)
			s := newStore(t)
			check := func(form string, err error) {
				t.Helper()
				if !c.is(err) || !strings.Contains(err.Error(), says) {
					t.Errorf("%s: %v, want %q in it", form, err, says)
				}
				nothingLoaded(t, s)
			}
			_, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{Limits: c.lim})
			check("directory", err)
			b := l.Tar(t)
			_, err = s.Load(t.Context(), testimage.TempFile(t, b), image.LoadOptions{Limits: c.lim})
			check("archive", err)
			_, err = s.LoadFrom(t.Context(), bytes.NewReader(b), image.LoadOptions{Limits: c.lim})
			check("stream", err)
		})
	}
}

// TestArtifactBesideImages: what is no image is passed by and told, where there
// is an image beside it.
func TestArtifactBesideImages(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	l.List("artifact", l.Add("application/vnd.example.thing", []byte("x")))
	r, err := newStore(t).Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil || len(r.Images) != 1 || len(r.Skipped) != 1 || !strings.Contains(r.Skipped[0], "vnd.example.thing") {
		t.Errorf("%+v %v", r, err)
	}
}

// TestLayoutDirectoryTricks: what stands where a blob should be is not followed
// out of the layout, and does not hang the reader.
func TestLayoutDirectoryTricks(t *testing.T) {
	for name, put := range map[string]func(blob string) error{
		"symlink out":     func(p string) error { return os.Symlink("../../../secret", p) },
		"absolute":        func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":            func(p string) error { return syscall.Mkfifo(p, 0o644) },
		"directory":       func(p string) error { return os.Mkdir(p, 0o755) },
		"symlink to self": func(p string) error { return os.Symlink(filepath.Base(p), p) },
	} {
		t.Run(name, func(t *testing.T) {
			l := testimage.NewLayout()
			std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
			l.List("std", std.Target)
			dir := l.Dir(t)
			layer := std.Doc.Layers[0].Digest
			blob := filepath.Join(dir, "blobs/sha256", layer.Encoded())
			if err := os.Rename(blob, filepath.Join(dir, "../secret")); err != nil {
				t.Fatal(err)
			}
			if err := put(blob); err != nil {
				t.Fatal(err)
			}
			s := newStore(t)
			if _, err := s.Load(t.Context(), dir, image.LoadOptions{}); err == nil || !strings.Contains(err.Error(), layer.String()) {
				t.Error(err)
			}
			nothingLoaded(t, s)
		})
	}
}

// badArchives are archives that are refused as such.
var badArchives = []struct {
	name string
	make func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte
	is   func(error) bool
	says string
	lim  image.Limits
}{
	{"truncated in a layer", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte { b := l.Tar(t); return b[:len(b)/2] },
		errdefs.IsInvalidArgument, "unexpected EOF", image.Limits{}},
	{"no archive", func(*testing.T, *testimage.Layout, testimage.Image) []byte {
		return bytes.Repeat([]byte("no tar "), 1000)
	},
		errdefs.IsInvalidArgument, "invalid tar header", image.Limits{}},
	{"empty", func(*testing.T, *testimage.Layout, testimage.Image) []byte { return nil },
		errdefs.IsInvalidArgument, "neither an OCI layout nor a docker-archive", image.Limits{}},
	{"tar of something else", func(t *testing.T, _ *testimage.Layout, _ testimage.Image) []byte {
		return testimage.TarFiles(t, map[string][]byte{"etc/passwd": nil})
	}, errdefs.IsInvalidArgument, "neither an OCI layout nor a docker-archive", image.Limits{}},
	{"xz", func(*testing.T, *testimage.Layout, testimage.Image) []byte { return []byte("\xfd7zXZ\x00\x00\x04") },
		errdefs.IsNotImplemented, "xz", image.Limits{}},
	{"name that leads out", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte {
		return withEntry(t, l, testimage.File("blobs/../../out", "x"))
	}, errdefs.IsInvalidArgument, `"blobs/../../out"`, image.Limits{}},
	{"link that leads out", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte {
		return withEntry(t, l, testimage.Symlink("blobs/x", "../../etc/passwd"))
	}, errdefs.IsInvalidArgument, `"blobs/x"`, image.Limits{}},
	{"hard link that leads out", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte {
		return withEntry(t, l, testimage.Hardlink("blobs/x", "../etc/passwd"))
	}, errdefs.IsInvalidArgument, `"blobs/x"`, image.Limits{}},
	{"index.json is a link to itself", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte {
		return withEntry(t, l, testimage.Symlink("index.json", "index.json"))
	}, errdefs.IsInvalidArgument, "links", image.Limits{}},
	{"too many entries", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte { return l.Tar(t) },
		errdefs.IsResourceExhausted, "more than 3 entries", image.Limits{Entries: 3}},
	{"too many bytes", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte { return l.Tar(t) },
		errdefs.IsResourceExhausted, "10000 bytes", image.Limits{Size: 10000}},
	{"docker layer that is not the config's", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		std.Tars[1] = bytes.Clone(std.Tars[1])
		std.Tars[1][0] ^= 1
		return std.DockerTar(t, testimage.Docker{})
	}, errdefs.IsDataLoss, "the bytes have digest", image.Limits{}},
	{"docker layer missing", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return dockerWith(t, std, func(m map[string]any) { m["Layers"].([]any)[1] = "nowhere.tar" })
	}, errdefs.IsNotFound, "nowhere.tar", image.Limits{}},
	{"docker layer outside", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return dockerWith(t, std, func(m map[string]any) { m["Layers"].([]any)[1] = "../../../etc/shadow" })
	}, errdefs.IsInvalidArgument, "etc/shadow", image.Limits{}},
	{"docker config missing", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return dockerWith(t, std, func(m map[string]any) { m["Config"] = "nothing.json" })
	}, errdefs.IsNotFound, "nothing.json", image.Limits{}},
	{"docker with a layer less", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return dockerWith(t, std, func(m map[string]any) { m["Layers"] = m["Layers"].([]any)[:2] })
	}, errdefs.IsInvalidArgument, "2 layers, but 3 DiffIDs", image.Limits{}},
	{"legacy layer that is its own parent", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return testimage.TarFiles(t, map[string][]byte{"repositories": []byte(`{"a":{"b":"x"}}`), "x/json": []byte(`{"parent":"y"}`), "y/json": []byte(`{"parent":"x"}`)})
	}, errdefs.IsInvalidArgument, "its own ancestor", image.Limits{}},
	{"names that fill the memory", func(t *testing.T, l *testimage.Layout, _ testimage.Image) []byte {
		var entries testimage.Layer
		for i := range 40 {
			entries = append(entries, testimage.File(strings.Repeat("n", 1000)+fmt.Sprint(i), ""))
		}
		return entries.Tar(t)
	}, errdefs.IsResourceExhausted, "names of more than 32000 bytes", image.Limits{Entries: 100}},
	{"docker image of too many names", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return dockerWith(t, std, func(m map[string]any) { m["RepoTags"] = slices.Repeat([]string{"a:b"}, 1001) })
	}, errdefs.IsResourceExhausted, "more than 1000 names", image.Limits{}},
	{"one docker image over and over", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		files := untar(t, std.DockerTar(t, testimage.Docker{}))
		var m []map[string]any
		if err := json.Unmarshal(files["manifest.json"], &m); err != nil {
			t.Fatal(err)
		}
		config := m[0]["Config"].(string)
		files[config] = append(files[config], bytes.Repeat([]byte(" "), 20<<10)...)
		files["manifest.json"], _ = json.Marshal(slices.Repeat(m, 60))
		return testimage.TarFiles(t, files)
	}, errdefs.IsResourceExhausted, "documents of more than 524288 bytes", image.Limits{Document: 32 << 10}},
	{"legacy image of too many names", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		files := untar(t, std.DockerTar(t, testimage.Docker{Legacy: true, Tags: []string{"a:b"}}))
		files["repositories"] = bytes.Replace(files["repositories"], []byte(`"b":`), []byte(`"c":"x","d":"x","b":`), 1)
		return testimage.TarFiles(t, files)
	}, errdefs.IsResourceExhausted, "more than 1 names", image.Limits{Manifests: 1}},
	{"legacy layers that explode", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		bomb := testimage.Compress(t, make([]byte, 1<<20), "gzip")
		return testimage.TarFiles(t, map[string][]byte{"repositories": []byte(`{"a":{"b":"x"}}`),
			"x/json": []byte(`{"parent":"y"}`), "y/json": []byte(`{}`), "x/layer.tar": bomb, "y/layer.tar": bomb})
	}, errdefs.IsResourceExhausted, "layers of more than 1500000 bytes", image.Limits{Size: 1_500_000}},
	{"docker layer through a link that leads out", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return linkedLayer(t, std, testimage.Symlink("l/layer.tar", "../../shadow"))
	}, errdefs.IsInvalidArgument, `"l/layer.tar"`, image.Limits{}},
	{"docker layer through an absolute link", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return linkedLayer(t, std, testimage.Symlink("l/layer.tar", "/etc/passwd"))
	}, errdefs.IsNotFound, "l/layer.tar", image.Limits{}},
	{"docker layer through links in a circle", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return linkedLayer(t, std, testimage.Symlink("l/layer.tar", "../m/layer.tar"), testimage.Symlink("m/layer.tar", "../l/layer.tar"))
	}, errdefs.IsInvalidArgument, "links", image.Limits{}},
	{"docker layer that is a directory", func(t *testing.T, l *testimage.Layout, std testimage.Image) []byte {
		return linkedLayer(t, std, testimage.Dir("l/layer.tar"))
	}, errdefs.IsNotFound, "l/layer.tar", image.Limits{}},
}

// linkedLayer is a docker-archive whose second layer is l/layer.tar, which the
// entries make.
func linkedLayer(t *testing.T, std testimage.Image, entries ...testimage.Entry) []byte {
	b := dockerWith(t, std, func(m map[string]any) { m["Layers"].([]any)[1] = "l/layer.tar" })
	var all testimage.Layer
	for name, b := range untar(t, b) {
		all = append(all, testimage.File(name, string(b)))
	}
	return append(all, entries...).Tar(t)
}

// TestDockerLayersByLink: old docker saves a layer that it has already saved as a
// symlink; a hard link is the same file, too, and may come before it.
func TestDockerLayersByLink(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	layer := testimage.File("other/layer.tar", string(std.Tars[1]))
	for name, entries := range map[string][]testimage.Entry{
		"symlink":            {layer, testimage.Symlink("l/layer.tar", "../other/layer.tar")},
		"link of a link":     {testimage.Symlink("l/layer.tar", "/k"), layer, testimage.Symlink("k", "./other/layer.tar")},
		"hard link":          {layer, testimage.Hardlink("l/layer.tar", "other/layer.tar")},
		"hard link, forward": {testimage.Hardlink("l/layer.tar", "./other/layer.tar"), layer},
	} {
		s := newStore(t)
		b := linkedLayer(t, std, entries...)
		if _, err := s.Load(t.Context(), testimage.TempFile(t, b), image.LoadOptions{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := newStore(t).LoadFrom(t.Context(), bytes.NewReader(b), image.LoadOptions{}); err != nil {
			t.Errorf("%s, stream: %v", name, err)
		}
	}
}

func withEntry(t *testing.T, l *testimage.Layout, e testimage.Entry) []byte {
	var entries testimage.Layer
	for name, b := range l.Files(t) {
		entries = append(entries, testimage.File(name, string(b)))
	}
	return append(entries, e).Tar(t)
}

// dockerWith changes manifest.json of a docker-archive.
func dockerWith(t *testing.T, std testimage.Image, f func(map[string]any)) []byte {
	files := untar(t, std.DockerTar(t, testimage.Docker{}))
	var m []map[string]any
	if err := json.Unmarshal(files["manifest.json"], &m); err != nil {
		t.Fatal(err)
	}
	f(m[0])
	files["manifest.json"], _ = json.Marshal(m)
	return testimage.TarFiles(t, files)
}

func untar(t *testing.T, b []byte) map[string][]byte {
	files := map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name], _ = io.ReadAll(tr)
	}
}

// TestBadArchives: each is refused by what is wrong with it, as a file, as a
// stream and compressed, and leaves nothing.
func TestBadArchives(t *testing.T) {
	testenv.Slow(t)
	for _, c := range badArchives {
		t.Run(c.name, func(t *testing.T) {
			testenv.Leaks(t)
			l := testimage.NewLayout()
			std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
			l.List("std", std.Target)
			b := c.make(t, l, std)
			s := newStore(t)
			forms := map[string][]byte{"plain": b}
			if c.name != "xz" {
				forms["zstd"] = testimage.Compress(t, b, "zstd")
			}
			for form, b := range forms {
				_, err := s.Load(t.Context(), testimage.TempFile(t, b), image.LoadOptions{Limits: c.lim})
				if !c.is(err) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s file: %v", form, err)
				}
				_, err = s.LoadFrom(t.Context(), bytes.NewReader(b), image.LoadOptions{Limits: c.lim})
				if !c.is(err) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%s stream: %v", form, err)
				}
			}
			nothingLoaded(t, s)
		})
	}
}

// TestTruncatedAnywhere: an archive cut at any block is an error and never an
// image.
func TestTruncatedAnywhere(t *testing.T) {
	testenv.Slow(t)
	l := testimage.NewLayout()
	small := l.AddImage(t, testimage.Platform, []testimage.Layer{{testimage.File("a", "a")}})
	l.List("small", small.Target)
	s := newStore(t)
	for form, b := range map[string][]byte{"oci": l.Tar(t), "docker": small.DockerTar(t, testimage.Docker{Tags: []string{"a:b"}})} {
		whole := len(b) - 1536 // the end marker and padding may be missing: nothing of the image is
		for cut := 0; cut < whole; cut += 256 {
			if _, err := s.LoadFrom(t.Context(), bytes.NewReader(b[:cut]), image.LoadOptions{}); err == nil {
				t.Fatalf("%s cut at %d of %d loads", form, cut, len(b))
			}
		}
	}
	nothingLoaded(t, s)
}

// TestDockerLayersTwice: a layer listed twice, by two names of one file, is one
// blob and two layers; of two entries with one name the later wins.
func TestDockerLayersTwice(t *testing.T) {
	l := testimage.NewLayout()
	layers := testimage.Layers(t)
	twice := l.AddImage(t, testimage.Platform, []testimage.Layer{layers[0], layers[1], layers[1]})
	files := untar(t, twice.DockerTar(t, testimage.Docker{Tags: []string{"t:1"}}))
	var entries testimage.Layer
	for name, b := range files {
		entries = append(entries, testimage.File(name, "wrong"), testimage.File("./"+name, string(b)))
	}
	s := newStore(t)
	r, err := s.LoadFrom(t.Context(), bytes.NewReader(entries.Tar(t)), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Manifest(t.Context(), r.Images[0], "")
	if err != nil || len(m.Layers) != 3 || m.Layers[1].Blob.Digest != m.Layers[2].Blob.Digest || m.Layers[1].ChainID == m.Layers[2].ChainID {
		t.Errorf("%+v %v", m, err)
	}
	if u := unpack(t, s, newView(t, "native"), r.Images[0]); u.New != 3 {
		t.Errorf("%+v", u)
	}
}

// TestLoadIsNoPath: a path that is nothing, or cannot be an image.
func TestLoadIsNoPath(t *testing.T) {
	s := newStore(t)
	if _, err := s.Load(t.Context(), "/no/such/thing", image.LoadOptions{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/no/such/thing") {
		t.Error(err)
	}
	if _, err := s.Load(t.Context(), t.TempDir(), image.LoadOptions{}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "oci-layout") {
		t.Error(err)
	}
}
