package image_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/testimage"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// loadStd loads the standard image.
func loadStd(t testing.TB, s *image.Store, how ...string) (image.Image, testimage.Image) {
	t.Helper()
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t), how...)
	l.List("std", std.Target)
	r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return r.Images[0], std
}

func unpack(t testing.TB, s *image.Store, v image.Snapshots, img image.Image) image.Unpacked {
	t.Helper()
	u, err := s.Unpack(t.Context(), v, img, image.UnpackOptions{Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// TestUnpack: a snapshot for each layer, named by ChainID, once; the tree is the
// one that the layers say.
func TestUnpack(t *testing.T) {
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		s := newStore(t)
		img, std := loadStd(t, s, "gzip", "zstd", "none")
		var events []image.Event
		u, err := s.Unpack(t.Context(), v, img, image.UnpackOptions{Progress: func(e image.Event) { events = append(events, e) }})
		if err != nil {
			t.Fatal(err)
		}
		if u.Layers != 3 || u.New != 3 || u.ChainID != layer.ChainID(std.Config.RootFS.DiffIDs) {
			t.Fatalf("%+v", u)
		}
		if last := events[len(events)-1]; last.Index != 2 || last.Count != 3 || last.Done != last.Total || last.Item != std.Config.RootFS.DiffIDs[2] {
			t.Errorf("progress %+v", last)
		}
		r, err := v.Record(t.Context(), u.ChainID.String())
		if err != nil || r.Labels[image.LabelBlob] != std.Doc.Layers[2].Digest.String() || r.Labels[image.LabelDiffID] != std.Config.RootFS.DiffIDs[2].String() {
			t.Errorf("labels %v %v", r.Labels, err)
		}
		checkStd(t, listSnapshot(t, v, u.ChainID.String()))
		if again := unpack(t, s, v, img); again.New != 0 || again.ChainID != u.ChainID {
			t.Errorf("again: %+v", again)
		}
		if n := len(keys(t, v)); n != 3 {
			t.Errorf("%d snapshots: %v", n, keys(t, v))
		}
	})
}

// checkStd looks for what the standard image's upper layers did.
func checkStd(t *testing.T, listing string) {
	t.Helper()
	for path, want := range map[string]bool{
		"./etc/new": true, "./etc/old": false, "./usr/share/doc/README": true, "./usr/share/doc/a": false,
		"./usr/was-file/now": true, "./usr/was-dir/in": false, "./srv/fifo": false, "./srv/hard2": true,
	} {
		if got := strings.Contains(listing, `"`+path+`" `); got != want {
			t.Errorf("%s: there %v, want %v", path, got, want)
		}
	}
	if !strings.Contains(listing, "= ./srv/data") || !strings.Contains(listing, "user.test=0x76616c7565") || !strings.Contains(listing, ".1234567890 ") {
		t.Errorf("hard links, xattrs or nanoseconds are missing:\n%s", listing)
	}
}

// TestUnpackShares: images with layers in common share their snapshots.
func TestUnpackShares(t *testing.T) {
	l := testimage.NewLayout()
	layers := testimage.Layers(t)
	l.List("two", l.AddImage(t, testimage.Platform, layers[:2]).Target)
	l.List("three", l.AddImage(t, testimage.Platform, layers, "zstd").Target)
	s, v := newStore(t), newView(t, "native")
	r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if u := unpack(t, s, v, r.Images[0]); u.New != 2 {
		t.Errorf("%+v", u)
	}
	if u := unpack(t, s, v, r.Images[1]); u.New != 1 {
		t.Errorf("other compression, same DiffIDs: %+v", u)
	}
}

// TestUnpackSharesWithAnotherView: layers unpacked to one view get names in
// another, and the bytes stay one; a layer there that Unpack did not make is not
// taken for one.
func TestUnpackSharesWithAnotherView(t *testing.T) {
	s := newStore(t)
	img, _ := loadStd(t, s)
	root := testenv.Scratch(t)
	first := openView(t, root, "native")
	u := unpack(t, s, first, img)
	second, err := first.Store().View("second", "native")
	if err != nil {
		t.Fatal(err)
	}
	shared, err := s.Unpack(t.Context(), second, img, image.UnpackOptions{Share: []*snapshot.View{first}})
	if err != nil || shared.New != 0 || shared.ChainID != u.ChainID {
		t.Fatalf("%+v %v", shared, err)
	}
	a, aerr := first.Record(t.Context(), u.ChainID.String())
	b, berr := second.Record(t.Context(), u.ChainID.String())
	if aerr != nil || berr != nil || a.ID != b.ID || b.Labels[image.LabelDiffID] != a.Labels[image.LabelDiffID] {
		t.Errorf("%+v %v, %+v %v", a, aerr, b, berr)
	}
	other, err := first.Store().View("other", "overlay")
	if err != nil {
		t.Fatal(err)
	}
	if o, err := s.Unpack(t.Context(), other, img, image.UnpackOptions{Share: []*snapshot.View{first}}); err != nil || o.New != u.Layers {
		t.Errorf("by another driver: %+v %v", o, err)
	}
}

// TestUnpackRefuses: a layer that is not what the config or the manifest says
// leaves no snapshot, and those below it whole.
func TestUnpackRefuses(t *testing.T) {
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		wrong := digest.FromString("something else")
		for _, c := range []struct {
			name  string
			spoil func(t *testing.T, s *image.Store, std testimage.Image)
			is    func(error) bool
			says  string
		}{
			{"rotten blob", func(t *testing.T, s *image.Store, std testimage.Image) {
				flip(t, blobFile(s, std.Doc.Layers[1].Digest))
			}, errdefs.IsDataLoss, "layer 2 of 3"},
			{"short blob", func(t *testing.T, s *image.Store, std testimage.Image) {
				cut(t, blobFile(s, std.Doc.Layers[1].Digest), 100)
			}, errdefs.IsDataLoss, "100 bytes"},
			{"no blob", func(t *testing.T, s *image.Store, std testimage.Image) {
				os.Remove(blobFile(s, std.Doc.Layers[1].Digest))
			}, errdefs.IsNotFound, "layer 2 of 3"},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := newStore(t)
				img, std := loadStd(t, s)
				c.spoil(t, s, std)
				u, err := s.Unpack(t.Context(), v, img, image.UnpackOptions{})
				if !c.is(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), std.Doc.Layers[1].Digest.String()) {
					t.Errorf("%v", err)
				}
				if k := keys(t, v); len(k) != 1 || k[0] != std.Config.RootFS.DiffIDs[0].String() || u.ChainID.String() != k[0] {
					t.Errorf("snapshots %v, %+v", k, u)
				}
			})
		}
		t.Run("wrong DiffID", func(t *testing.T) {
			l := testimage.NewLayout()
			std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
			std.Config.RootFS.DiffIDs[1] = wrong
			std.Doc.Config = l.AddJSON(std.Doc.Config.MediaType, std.Config)
			l.List("std", l.AddJSON(std.Target.MediaType, std.Doc))
			s := newStore(t)
			r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Unpack(t.Context(), v, r.Images[0], image.UnpackOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), wrong.String()) {
				t.Error(err)
			}
			if k := keys(t, v); len(k) != 1 {
				t.Errorf("snapshots %v", k)
			}
		})
	})
}

func blobFile(s *image.Store, d digest.Digest) string {
	return filepath.Join(s.Dir(), "blobs", d.Algorithm().String(), d.Encoded())
}

// cut shortens a file, which may be read-only.
func cut(t testing.TB, path string, size int64) {
	t.Helper()
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// flip changes one byte in the middle of a file.
func flip(t testing.TB, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	os.Remove(path)
	if err := os.WriteFile(path, b, 0o444); err != nil {
		t.Fatal(err)
	}
}

// TestUnpackCancelled: interrupted at any layer, the layers that were done are
// whole and the one that was not is gone; going on finishes it.
func TestUnpackCancelled(t *testing.T) {
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		s := newStore(t)
		img, _ := loadStd(t, s)
		for stop := range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			_, err := s.Unpack(ctx, v, img, image.UnpackOptions{Progress: func(e image.Event) {
				if e.Index == stop {
					cancel()
				}
			}})
			// The last bytes may have been read when cancel comes: then it is done.
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			for _, k := range keys(t, v) {
				if strings.HasPrefix(k, "unpack-") {
					t.Errorf("left after stopping in layer %d: %s", stop, k)
				}
			}
		}
		if u := unpack(t, s, v, img); u.Layers != 3 {
			t.Errorf("%+v", u)
		}
		checkStd(t, listSnapshot(t, v, unpack(t, s, v, img).ChainID.String()))
	})
}

// TestUnpackSweepsLeftovers: what a killed unpack left goes with the next one,
// and with GC, but not while somebody else may be unpacking.
func TestUnpackSweepsLeftovers(t *testing.T) {
	s, v := newStore(t), newView(t, "native")
	img, _ := loadStd(t, s)
	leave := func() {
		o := snapshot.CreateOptions{Labels: map[string]string{"io.github.layerctl.unpack": "sha256:x"}}
		if err := v.Create(t.Context(), "unpack-LEFT", "", o); err != nil {
			t.Fatal(err)
		}
	}
	leave()
	if err := v.Create(t.Context(), "work", "", snapshot.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	unpack(t, s, v, img)
	if n := len(keys(t, v)); n != 4 {
		t.Errorf("after unpack: %v", keys(t, v))
	}
	leave()
	r, err := s.GC(t.Context(), v)
	if err != nil || r.Unpacked != 1 || r.Blobs != 0 || len(keys(t, v)) != 4 {
		t.Errorf("%+v %v: %v", r, err, keys(t, v))
	}
}

// TestUnpackTogether: several unpack the same image into one view at once; each
// layer is there once.
func TestUnpackTogether(t *testing.T) {
	eachDriver(t, func(t *testing.T, v *snapshot.View) {
		s := newStore(t)
		img, std := loadStd(t, s)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if u, err := s.Unpack(t.Context(), v, img, image.UnpackOptions{}); err != nil || u.ChainID != layer.ChainID(std.Config.RootFS.DiffIDs) {
					t.Errorf("%+v %v", u, err)
				}
			})
		}
		wg.Wait()
		if k := keys(t, v); len(k) != 3 {
			t.Errorf("snapshots %v", k)
		}
	})
}

// TestDropLayers: the blobs of layers go, the image stays and is saved from its
// snapshots; blobs that others need stay.
func TestDropLayers(t *testing.T) {
	testenv.Leaks(t)
	s, v := newStore(t), newView(t, "native")
	img, std := loadStd(t, s)
	u := unpack(t, s, v, img)
	before := listSnapshot(t, v, u.ChainID.String())
	freed, err := s.DropLayers(t.Context(), "std")
	if err != nil || freed != std.Doc.Layers[0].Size+std.Doc.Layers[1].Size+std.Doc.Layers[2].Size {
		t.Fatal(freed, err)
	}
	if found, err := s.Check(t.Context(), image.CheckOptions{}); err != nil || len(found) > 0 {
		t.Errorf("check: %v %v", found, err)
	}
	if _, err := s.GC(t.Context()); err != nil {
		t.Error(err)
	}
	img, _ = s.Resolve(t.Context(), "std")
	dest := filepath.Join(t.TempDir(), "out")
	if _, err := s.Save(t.Context(), img, image.Destination{Path: dest}, image.SaveOptions{}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), u.ChainID.String()) {
		t.Errorf("save without layers: %v", err)
	}
	if _, err := os.Stat(dest); err == nil {
		t.Error("a destination of nothing")
	}
	desc, err := s.Save(t.Context(), img, image.Destination{Path: dest}, image.SaveOptions{Name: "again", Snapshots: v})
	if err != nil {
		t.Fatal(err)
	}
	same, err := s.SaveSnapshot(t.Context(), v, u.ChainID.String(), image.Destination{Path: t.TempDir()}, image.SaveOptions{Name: "again"})
	if err != nil || same.Digest != desc.Digest {
		t.Errorf("saved as a snapshot: %v %v, as an image %v", same, err, desc)
	}
	s2, v2 := newStore(t), newView(t, "native")
	r, err := s2.Load(t.Context(), dest, image.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	u2 := unpack(t, s2, v2, r.Images[0])
	if d := diffLines(before, listSnapshot(t, v2, u2.ChainID.String())); d != "" {
		t.Errorf("saved from snapshots:\n%s", d)
	}
	m, err := s2.Manifest(t.Context(), r.Images[0], "")
	if err != nil || len(m.Config.History) != 3 || m.Config.Config.Cmd[0] != "/bin/sh" {
		t.Errorf("config %+v %v", m.Config, err)
	}
	// Loading again brings the layers back, under every name.
	for _, o := range []image.LoadOptions{{Name: "std"}, {Name: "other"}} {
		if _, err := s.DropLayers(t.Context(), "std"); err != nil {
			t.Fatal(err)
		}
		l := testimage.NewLayout()
		l.List("std", l.AddImage(t, testimage.Platform, testimage.Layers(t)).Target)
		if _, err := s.Load(t.Context(), l.Dir(t), o); err != nil {
			t.Fatal(err)
		}
		if img, err := s.Resolve(t.Context(), "std"); err != nil || img.LayersDropped {
			t.Errorf("%+v %v", img, err)
		}
		if r, err := s.GC(t.Context()); err != nil || r.Blobs > 0 {
			t.Errorf("gc after loading again: %+v %v", r, err)
		}
	}
}
