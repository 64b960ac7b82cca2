package image_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testimage"
)

// TestOpen: a store is made where there is none, completed where making it was
// interrupted, and nothing else is taken for one.
func TestOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "images")
	for range 2 {
		s, err := image.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		noLeftovers(t, dir)
		if list, err := s.List(t.Context()); err != nil || len(list) > 0 {
			t.Error(list, err)
		}
		s.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	os.Remove(dir + "/oci-layout") // it is written last
	if s, err := image.Open(dir); err != nil {
		t.Error(err)
	} else {
		s.Close()
	}
	other := t.TempDir()
	os.WriteFile(other+"/mine", nil, 0o644)
	if _, err := image.Open(other); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a folder of something else: %v", err)
	}
	os.WriteFile(dir+"/oci-layout", []byte(`{"imageLayoutVersion":"9.0.0"}`), 0o644)
	if _, err := image.Open(dir); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "9.0.0") {
		t.Errorf("a newer layout: %v", err)
	}
	if _, err := image.Open(filepath.Join(t.TempDir(), "no", "parent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no parent: %v", err)
	}
}

// TestNames: tags move, names and digests resolve, removing takes what was
// named.
func TestNames(t *testing.T) {
	ctx := t.Context()
	s := newStore(t)
	l := testimage.NewLayout()
	layers := testimage.Layers(t)
	one, two := l.AddImage(t, testimage.Platform, layers[:1]), l.AddImage(t, testimage.Platform, layers[:2])
	l.List("localhost/one:latest", one.Target)
	l.List("", two.Target)
	if _, err := s.Load(ctx, l.Dir(t), image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	want := func(ref string, d digest.Digest) {
		t.Helper()
		if img, err := s.Resolve(ctx, ref); err != nil || img.Target.Digest != d {
			t.Errorf("%s: %v %v", ref, img, err)
		}
	}
	want("localhost/one", one.Target.Digest)
	want(one.Target.Digest.String(), one.Target.Digest)
	want(two.Target.Digest.Encoded()[:12], two.Target.Digest)
	for _, ref := range []string{"", "one", "sha256:", two.Target.Digest.Encoded()[:3]} {
		if _, err := s.Resolve(ctx, ref); !errdefs.IsNotFound(err) {
			t.Errorf("%q: %v", ref, err)
		}
	}
	for _, step := range []error{s.Tag(ctx, two.Target.Digest.String(), "two"), s.Tag(ctx, "localhost/one", "two"), s.Tag(ctx, "two", "three")} {
		if step != nil {
			t.Fatal(step)
		}
	}
	want("two", one.Target.Digest)
	want("three", one.Target.Digest)
	if _, err := s.Resolve(ctx, two.Target.Digest.String()); !errdefs.IsNotFound(err) {
		t.Errorf("its only name moved away: %v", err)
	}
	if err := s.Tag(ctx, "two", "bad name"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if gone, err := s.Remove(ctx, "two"); err != nil || len(gone) != 1 {
		t.Error(gone, err)
	}
	want("three", one.Target.Digest)
	if gone, err := s.Remove(ctx, one.Target.Digest.String()); err != nil || len(gone) != 2 {
		t.Error(gone, err)
	}
	if _, err := s.Remove(ctx, "three"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// TestAmbiguousPrefix: a prefix of two digests names the candidates.
func TestAmbiguousPrefix(t *testing.T) {
	l := testimage.NewLayout()
	seen := map[string]testimage.Image{}
	for i := 0; ; i++ { // until two digests begin alike: some 300 tries
		img := l.AddImage(t, testimage.Platform, []testimage.Layer{{testimage.File("n", strings.Repeat("x", i))}})
		prefix := img.Target.Digest.Encoded()[:4]
		first, ok := seen[prefix]
		if !ok {
			seen[prefix] = img
			continue
		}
		l.List("first", first.Target)
		l.List("second", img.Target)
		s := newStore(t)
		if _, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := s.Resolve(t.Context(), prefix)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "first") || !strings.Contains(err.Error(), "second") {
			t.Errorf("%s: %v", prefix, err)
		}
		return
	}
}

// TestGC: what no image needs goes, what one needs stays, leftovers go.
func TestGC(t *testing.T) {
	ctx := t.Context()
	s := newStore(t)
	l := testimage.NewLayout()
	layers := testimage.Layers(t)
	l.List("two", l.AddImage(t, testimage.Platform, layers[:2]).Target)
	three := l.AddImage(t, testimage.Platform, layers)
	l.List("three", three.Target)
	if _, err := s.Load(ctx, l.Dir(t), image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if r, err := s.GC(ctx); err != nil || r != (image.GCReport{}) {
		t.Errorf("nothing to do: %+v %v", r, err)
	}
	s.Remove(ctx, "three")
	os.MkdirAll(s.Dir()+"/ingest/load-123/x", 0o755)
	os.WriteFile(s.Dir()+"/blobs/sha256/not-a-blob", nil, 0o644)
	r, err := s.GC(ctx)
	if err != nil || r.Blobs != 3 || r.Bytes != three.Target.Size+three.Doc.Config.Size+three.Doc.Layers[2].Size || r.Ingests != 1 {
		t.Errorf("%+v %v", r, err)
	}
	if found, err := s.Check(ctx, image.CheckOptions{}); err != nil || len(found) > 0 {
		t.Error(found, err)
	}
	if _, err := os.Stat(s.Dir() + "/blobs/sha256/not-a-blob"); err != nil {
		t.Error("gc removed what is no blob")
	}
}

// TestGCKeepsWhatItCannotRead: with an image whose manifest is gone or rotten it
// is not known what is needed, so nothing is removed.
func TestGCKeepsWhatItCannotRead(t *testing.T) {
	for name, spoil := range map[string]func(path string){
		"gone":   func(p string) { os.Remove(p) },
		"rotten": func(p string) { flip(t, p) },
	} {
		s := newStore(t)
		_, std := loadStd(t, s)
		spoil(blobFile(s, std.Target.Digest))
		before := blobCount(t, s.Dir())
		if r, err := s.GC(t.Context()); err == nil || !strings.Contains(err.Error(), std.Target.Digest.String()) {
			t.Errorf("%s: %+v %v", name, r, err)
		}
		if n := blobCount(t, s.Dir()); n != before {
			t.Errorf("%s: %d blobs of %d", name, n, before)
		}
	}
}

// TestCheck finds what rots and what is missing, names the image, and repairs so
// that loading again makes it whole.
func TestCheck(t *testing.T) {
	ctx := t.Context()
	s := newStore(t)
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	dir := l.Dir(t)
	if _, err := s.Load(ctx, dir, image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	flip(t, blobFile(s, std.Doc.Layers[0].Digest))
	os.Remove(blobFile(s, std.Doc.Layers[1].Digest))
	found, err := s.Check(ctx, image.CheckOptions{})
	if err != nil || len(found) != 2 {
		t.Fatal(found, err)
	}
	for i, want := range []struct {
		is func(error) bool
		d  digest.Digest
	}{{errdefs.IsDataLoss, std.Doc.Layers[0].Digest}, {errdefs.IsNotFound, std.Doc.Layers[1].Digest}} {
		if f := found[i]; !want.is(f.Err) || f.Blob != want.d || f.Image != "std" || f.Repaired || !strings.Contains(f.String(), want.d.String()) {
			t.Errorf("%+v", f)
		}
	}
	if quick, err := s.Check(ctx, image.CheckOptions{Quick: true}); err != nil || len(quick) != 2 {
		// The layers of this image are small enough to be read anyway.
		t.Errorf("quick: %v %v", quick, err)
	}
	if found, err = s.Check(ctx, image.CheckOptions{Repair: true}); err != nil || len(found) != 2 || !found[0].Repaired {
		t.Errorf("repair: %v %v", found, err)
	}
	if _, err := s.Load(ctx, dir, image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	if found, err := s.Check(ctx, image.CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("after loading again: %v %v", found, err)
	}
	flip(t, blobFile(s, std.Doc.Config.Digest))
	if found, err = s.Check(ctx, image.CheckOptions{}); err != nil || len(found) == 0 || found[0].Blob != std.Doc.Config.Digest {
		t.Errorf("rotten config: %v %v", found, err)
	}
}

// TestConcurrentChanges: many load, tag and remove at once, in stores of their
// own on one folder; no change is lost.
func TestConcurrentChanges(t *testing.T) {
	ctx := t.Context()
	dir := newStore(t).Dir()
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	l.List("std", std.Target)
	from := l.Dir(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			s, err := image.Open(dir)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			name := "n" + strings.Repeat("i", i)
			if _, err := s.Load(ctx, from, image.LoadOptions{Name: name}); err != nil {
				t.Error(err)
			}
			if err := s.Tag(ctx, name, name+"2"); err != nil {
				t.Error(err)
			}
			if _, err := s.GC(ctx); err != nil {
				t.Error(err)
			}
			if _, err := s.Remove(ctx, name); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s, err := image.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if list, err := s.List(ctx); err != nil || len(list) != 8 {
		t.Errorf("%v %v", list, err)
	}
	if found, err := s.Check(ctx, image.CheckOptions{}); err != nil || len(found) > 0 {
		t.Error(found, err)
	}
	noLeftovers(t, dir)
}
