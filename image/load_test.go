package image_test

import (
	"bytes"
	"context"
	"errors"
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

// sourceForm is a way in which one image can come.
type sourceForm struct {
	name string
	kind image.Kind
	path func(t testing.TB, l *testimage.Layout, i testimage.Image) string
	// exact: the image keeps its manifest, and so its digest.
	exact bool
}

func archiveForm(compress string) func(testing.TB, *testimage.Layout, testimage.Image) string {
	return func(t testing.TB, l *testimage.Layout, _ testimage.Image) string {
		return testimage.TempFile(t, testimage.Compress(t, l.Tar(t), compress))
	}
}

func dockerForm(o testimage.Docker, compress string) func(testing.TB, *testimage.Layout, testimage.Image) string {
	o.Tags = []string{"localhost/std:latest"}
	return func(t testing.TB, _ *testimage.Layout, i testimage.Image) string {
		return testimage.TempFile(t, testimage.Compress(t, i.DockerTar(t, o), compress))
	}
}

var sourceForms = []sourceForm{
	{"layout", image.KindLayout, func(t testing.TB, l *testimage.Layout, _ testimage.Image) string { return l.Dir(t) }, true},
	{"oci-archive", image.KindLayoutArchive, archiveForm("none"), true},
	{"oci-archive gzip", image.KindLayoutArchive, archiveForm("gzip"), true},
	{"oci-archive zstd", image.KindLayoutArchive, archiveForm("zstd"), true},
	{"docker", image.KindDockerArchive, dockerForm(testimage.Docker{}, "none"), false},
	{"docker links", image.KindDockerArchive, dockerForm(testimage.Docker{Links: true}, "none"), false},
	{"docker gzip", image.KindDockerArchive, dockerForm(testimage.Docker{}, "gzip"), false},
	{"docker zstd of gzip layers", image.KindDockerArchive, dockerForm(testimage.Docker{Compression: "gzip"}, "zstd"), false},
	{"docker gzip layers", image.KindDockerArchive, dockerForm(testimage.Docker{Compression: "gzip"}, "none"), false},
	{"docker legacy", image.KindDockerArchive, dockerForm(testimage.Docker{Legacy: true}, "none"), false},
	{"docker legacy gzip", image.KindDockerArchive, dockerForm(testimage.Docker{Legacy: true, Compression: "gzip"}, "gzip"), false},
}

// TestLoadForms: whatever form an image comes in, by path or as a stream, the
// same layers are there afterwards, under the same DiffIDs.
func TestLoadForms(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t), "gzip", "zstd", "none")
	l.List("localhost/std:latest", std.Target)
	for _, f := range sourceForms {
		t.Run(f.name, func(t *testing.T) {
			testenv.Leaks(t)
			path := f.path(t, l, std)
			s := newStore(t)
			r, err := s.Load(t.Context(), path, image.LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			checkLoaded(t, s, r, f, std)
			if f.kind == image.KindLayout {
				return
			}
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			stream := newStore(t)
			r, err = stream.LoadFrom(t.Context(), io.MultiReader(bytes.NewReader(b)), image.LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			checkLoaded(t, stream, r, f, std)
		})
	}
}

func checkLoaded(t *testing.T, s *image.Store, r image.LoadResult, f sourceForm, std testimage.Image) {
	t.Helper()
	noLeftovers(t, s.Dir())
	if r.Kind != f.kind || len(r.Images) != 1 || r.Images[0].Name != "localhost/std:latest" {
		t.Fatalf("loaded %+v", r)
	}
	img, err := s.Resolve(t.Context(), "localhost/std")
	if err != nil {
		t.Fatal(err)
	}
	if f.exact && img.Target.Digest != std.Target.Digest {
		t.Errorf("digest %s, came as %s", img.Target.Digest, std.Target.Digest)
	}
	m, err := s.Manifest(t.Context(), img, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	var diffIDs []digest.Digest
	for _, l := range m.Layers {
		diffIDs = append(diffIDs, l.DiffID)
	}
	if !slices.Equal(diffIDs, std.Config.RootFS.DiffIDs) {
		t.Errorf("DiffIDs %v, want %v", diffIDs, std.Config.RootFS.DiffIDs)
	}
	if m.Config.Architecture != "amd64" || !slices.Equal(m.Config.Config.Cmd, std.Config.Config.Cmd) {
		t.Errorf("config %+v", m.Config)
	}
	if found, err := s.Check(t.Context(), image.CheckOptions{Platform: "linux/amd64"}); err != nil || len(found) > 0 {
		t.Errorf("check: %v %v", found, err)
	}
}

// TestLoadKeepsDockerConfig: a docker image is known by its config's digest.
func TestLoadKeepsDockerConfig(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	s := newStore(t)
	r, err := s.LoadFrom(t.Context(), bytes.NewReader(std.DockerTar(t, testimage.Docker{Tags: []string{"a:1", "b:2"}})), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Images) != 2 || r.Images[0].Name != "a:1" || r.Images[1].Name != "b:2" {
		t.Fatalf("%+v", r.Images)
	}
	if _, err := os.Stat(filepath.Join(s.Dir(), "blobs/sha256", std.Doc.Config.Digest.Encoded())); err != nil {
		t.Error(err)
	}
}

// TestLoadSelectsAndNames: names as in the source, one of several, another name.
func TestLoadSelectsAndNames(t *testing.T) {
	l := testimage.NewLayout()
	layers := testimage.Layers(t)
	one, all := l.AddImage(t, testimage.Platform, layers[:1]), l.AddImage(t, testimage.Platform, layers)
	l.List("one", one.Target)
	l.List("all", all.Target)
	dir := l.Dir(t)

	s := newStore(t)
	r, err := s.Load(t.Context(), dir, image.LoadOptions{Select: "one", Name: "mine"})
	if err != nil || len(r.Images) != 1 || r.Images[0].Name != "mine" || r.Images[0].Target.Digest != one.Target.Digest {
		t.Fatalf("%+v %v", r, err)
	}
	if n := blobCount(t, s.Dir()); n != 3 {
		t.Errorf("%d blobs of an image of one layer", n)
	}
	if _, err := s.Load(t.Context(), dir, image.LoadOptions{Name: "x"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "one, all") {
		t.Errorf("one name for two images: %v", err)
	}
	if _, err := s.Load(t.Context(), dir, image.LoadOptions{Select: "none"}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "one, all") {
		t.Errorf("no such image: %v", err)
	}
	if r, err = s.Load(t.Context(), dir, image.LoadOptions{}); err != nil || len(r.Images) != 2 {
		t.Fatalf("%+v %v", r, err)
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 3 || list[0].Name != "all" || list[1].Name != "mine" || list[2].Name != "one" {
		t.Fatalf("%+v %v", list, err)
	}
}

// platformsIndex makes an index of one image for two platforms, nested twice,
// with an attestation beside them.
func platformsIndex(t testing.TB, l *testimage.Layout) (amd, arm testimage.Image, top ocispec.Descriptor) {
	layers := testimage.Layers(t)
	armP := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	amd, arm = l.AddImage(t, testimage.Platform, layers[:2]), l.AddImage(t, armP, layers[1:])
	amdDesc, armDesc := amd.Target, arm.Target
	armDesc.Platform = &armP // amd64's is only in its config
	statement := l.Add("application/vnd.in-toto+json", []byte(`{}`))
	attest := l.AddJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: l.Index.Versioned, MediaType: ocispec.MediaTypeImageManifest,
		Config: l.Add(ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":[]}}`)), Layers: []ocispec.Descriptor{statement}})
	attest.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
	index := func(ds ...ocispec.Descriptor) ocispec.Descriptor {
		return l.AddJSON(ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: l.Index.Versioned, MediaType: ocispec.MediaTypeImageIndex, Manifests: ds})
	}
	top = index(attest, index(amdDesc), armDesc)
	return amd, arm, top
}

// TestLoadChoosesPlatform: an index is kept whole, and read by platform.
func TestLoadChoosesPlatform(t *testing.T) {
	l := testimage.NewLayout()
	amd, arm, top := platformsIndex(t, l)
	l.List("multi", top)
	s := newStore(t)
	if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{Platform: "linux/amd64"}); err != nil {
		t.Fatal(err)
	}
	if n := blobCount(t, s.Dir()); n != len(l.Blobs) {
		t.Errorf("%d blobs of %d", n, len(l.Blobs))
	}
	img, err := s.Resolve(t.Context(), "multi")
	if err != nil || img.Target.Digest != top.Digest {
		t.Fatal(img, err)
	}
	for platform, want := range map[string]testimage.Image{"linux/amd64": amd, "linux/arm64": arm} {
		m, err := s.Manifest(t.Context(), img, platform)
		if err != nil || m.Target.Digest != want.Target.Digest {
			t.Errorf("%s: %v %v", platform, m, err)
		}
	}
	if _, err := s.Manifest(t.Context(), img, "linux/s390x"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") &&
		!strings.Contains(err.Error(), "unknown/unknown, linux/amd64, linux/arm64") {
		t.Errorf("no such platform: %v", err)
	}
}

// TestLoadPartOfAnIndex: what is there of other platforms comes along; what is
// asked for must be there.
func TestLoadPartOfAnIndex(t *testing.T) {
	l := testimage.NewLayout()
	_, arm, top := platformsIndex(t, l)
	l.List("multi", top)
	delete(l.Blobs, arm.Doc.Layers[1].Digest)
	dir := l.Dir(t)
	s := newStore(t)
	if _, err := s.Load(t.Context(), dir, image.LoadOptions{Platform: "linux/amd64"}); err != nil {
		t.Fatal(err)
	}
	_, err := newStore(t).Load(t.Context(), dir, image.LoadOptions{Platform: "linux/arm64"})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), arm.Doc.Layers[1].Digest.String()) {
		t.Errorf("missing layer: %v", err)
	}
}

// TestLoadAgainWritesNothing: blobs that are there and right are not written again.
func TestLoadAgainWritesNothing(t *testing.T) {
	s := newStore(t)
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	dir := l.Dir(t)
	if _, err := s.Load(t.Context(), dir, image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	blob := blobFile(s, std.Doc.Layers[0].Digest)
	before, _ := os.Stat(blob)
	if _, err := s.Load(t.Context(), dir, image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	after, _ := os.Stat(blob)
	if !os.SameFile(before, after) || before.ModTime() != after.ModTime() {
		t.Error("written again")
	}
}

// TestLoadAgainHeals: a kept blob that rotted, in size or in content only, is
// replaced by loading the image again, from whatever form; who reads the old one
// goes on reading it.
func TestLoadAgainHeals(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, bulkyLayers(), "none")
	l.List("std", std.Target)
	dir, archive := l.Dir(t), testimage.TempFile(t, l.Tar(t))
	forms := map[string]func(s *image.Store) error{
		"layout":  func(s *image.Store) error { _, err := s.Load(t.Context(), dir, image.LoadOptions{}); return err },
		"archive": func(s *image.Store) error { _, err := s.Load(t.Context(), archive, image.LoadOptions{}); return err },
		"stream": func(s *image.Store) error {
			_, err := s.LoadFrom(t.Context(), bytes.NewReader(l.Tar(t)), image.LoadOptions{})
			return err
		},
	}
	rots := map[string]func(t testing.TB, file string){"content": flip, "size": func(t testing.TB, file string) { cut(t, file, 10) }}
	for form, load := range forms {
		for rot, spoil := range rots {
			s := newStore(t)
			if err := load(s); err != nil {
				t.Fatal(err)
			}
			for _, d := range []digest.Digest{std.Doc.Layers[0].Digest, std.Doc.Config.Digest, std.Target.Digest} {
				spoil(t, blobFile(s, d))
			}
			reader, err := os.Open(blobFile(s, std.Doc.Layers[0].Digest))
			if err != nil {
				t.Fatal(err)
			}
			if err := load(s); err != nil {
				t.Errorf("%s, %s: %v", form, rot, err)
			}
			if _, err := io.Copy(io.Discard, reader); err != nil {
				t.Errorf("%s, %s: the old blob: %v", form, rot, err)
			}
			reader.Close()
			if found, err := s.Check(t.Context(), image.CheckOptions{}); err != nil || len(found) > 0 {
				t.Errorf("%s, %s: %v %v", form, rot, found, err)
			}
			if fi, err := os.Stat(blobFile(s, std.Doc.Layers[0].Digest)); err != nil || fi.Mode().Perm() != 0o444 {
				t.Errorf("%s, %s: %v %v", form, rot, fi.Mode(), err)
			}
			noLeftovers(t, s.Dir())
		}
	}
}

// TestLoadAgainNeverSpoils: an image that comes with wrong bytes replaces
// nothing, neither a good blob nor a rotten one.
func TestLoadAgainNeverSpoils(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t), "none")
	l.List("std", std.Target)
	d := std.Doc.Layers[0].Digest
	for _, rotten := range []bool{false, true} {
		s := newStore(t)
		dir := l.Dir(t)
		if _, err := s.Load(t.Context(), dir, image.LoadOptions{}); err != nil {
			t.Fatal(err)
		}
		if rotten {
			flip(t, blobFile(s, d))
		}
		before, err := os.ReadFile(blobFile(s, d))
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Repeat([]byte{1}, len(before))
		if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), bad, 0o644); err != nil {
			t.Fatal(err)
		}
		_, err = s.Load(t.Context(), dir, image.LoadOptions{})
		if rotten && (!errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), d.String())) || !rotten && err != nil {
			t.Errorf("rotten %v: %v", rotten, err)
		}
		if after, err := os.ReadFile(blobFile(s, d)); err != nil || !bytes.Equal(before, after) {
			t.Errorf("rotten %v: the blob changed: %v", rotten, err)
		}
		noLeftovers(t, s.Dir())
	}
}

// TestLoadCancelled: a load that is interrupted lists nothing and leaves nothing
// in ingest.
func TestLoadCancelled(t *testing.T) {
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t), "none")
	l.List("std", std.Target)
	b := l.Tar(t)
	for _, cut := range []int{0, 600, len(b) / 2, len(b) - 2000} {
		s := newStore(t)
		ctx, cancel := context.WithCancel(t.Context())
		r := io.MultiReader(bytes.NewReader(b[:cut]), readerFunc(func([]byte) (int, error) { cancel(); return 0, io.EOF }), bytes.NewReader(b[cut:]))
		if _, err := s.LoadFrom(ctx, r, image.LoadOptions{}); !errors.Is(err, context.Canceled) {
			t.Errorf("cut at %d: %v", cut, err)
		}
		nothingLoaded(t, s)
	}
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := s.Load(ctx, l.Dir(t), image.LoadOptions{Progress: func(image.Event) { cancel() }}); !errors.Is(err, context.Canceled) {
		t.Errorf("in the middle of copying: %v", err)
	}
	nothingLoaded(t, s)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func nothingLoaded(t *testing.T, s *image.Store) {
	t.Helper()
	if list, err := s.List(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("listed: %v %v", list, err)
	}
	noLeftovers(t, s.Dir())
}

// TestLoadReadOnlyStore: a store on a read-only file system can be read, and
// loading into it says so.
func TestLoadReadOnlyStore(t *testing.T) {
	testenv.Root(t)
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	s := newStore(t)
	if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount(s.Dir(), s.Dir(), "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(s.Dir(), syscall.MNT_DETACH) })
	if err := syscall.Mount("", s.Dir(), "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	ro, err := image.Open(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if found, err := ro.Check(t.Context(), image.CheckOptions{}); err != nil || len(found) > 0 {
		t.Error(found, err)
	}
	other := testimage.NewLayout()
	other.List("other", other.AddImage(t, testimage.Platform, testimage.Layers(t)[1:]).Target)
	if _, err := ro.Load(t.Context(), other.Dir(t), image.LoadOptions{}); !errors.Is(err, syscall.EROFS) {
		t.Errorf("load: %v", err)
	}
}

// TestFullDisk: loading into a full store and unpacking onto a full disk are
// errors with their errno, and leave nothing half-made.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	l := testimage.NewLayout()
	l.List("std", l.AddImage(t, testimage.Platform, testimage.Layers(t), "none").Target)
	small := testenv.FS(t, "tmpfs", testenv.Size(1<<20))
	s, err := image.Open(small + "/images")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("by path: %v", err)
	}
	nothingLoaded(t, s)
	if _, err := s.LoadFrom(t.Context(), bytes.NewReader(l.Tar(t)), image.LoadOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("as a stream: %v", err)
	}
	nothingLoaded(t, s)
}

// TestUnpackOntoFullDisk: no room is an error with its errno; with room again,
// the next unpack clears what could not be cleared then, and finishes.
func TestUnpackOntoFullDisk(t *testing.T) {
	testenv.Root(t)
	s := newStore(t)
	img, _ := loadStd(t, s)
	root := testenv.FS(t, "tmpfs", testenv.Size(12<<20)) // 4 of it are the store's reserve
	v := openView(t, root+"/store", "overlay")
	ballast := root + "/ballast"
	if err := os.WriteFile(ballast, make([]byte, 7<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Unpack(t.Context(), v, img, image.UnpackOptions{}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("unpack: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if u := unpack(t, s, v, img); u.Layers != 3 {
		t.Errorf("%+v", u)
	}
	if k := keys(t, v); len(k) != 3 {
		t.Errorf("snapshots %v", k)
	}
}
