package image_test

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testimage"
)

// names lists the images of a store as NAME DIGEST.
func names(t *testing.T, s *image.Store) (all []string) {
	t.Helper()
	list, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		all = append(all, i.Name+" "+i.Target.Digest.String())
	}
	return all
}

// brokenLayout has an image "std" whose last DiffID is not that of its layer.
func brokenLayout(t *testing.T) string {
	t.Helper()
	l := testimage.NewLayout()
	std := l.AddImage(t, testimage.Platform, testimage.Layers(t))
	std.Config.RootFS.DiffIDs[2] = digest.FromString("something else")
	std.Doc.Config = l.AddJSON(std.Doc.Config.MediaType, std.Config)
	l.List("std", l.AddJSON(std.Target.MediaType, std.Doc))
	return l.Dir(t)
}

// TestTakeBack: an image that was listed and could not be unpacked goes from the
// list, and so do the layers that were made of it; a name that it took from
// another image goes back; what others need stays.
func TestTakeBack(t *testing.T) {
	broken := brokenLayout(t)
	fail := func(t *testing.T, s *image.Store, v image.Snapshots) {
		t.Helper()
		r, err := s.Load(t.Context(), broken, image.LoadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		u, err := s.Unpack(t.Context(), v, r.Images[0], image.UnpackOptions{})
		if !errdefs.IsDataLoss(err) {
			t.Fatalf("%v", err)
		}
		if err := s.TakeBack(t.Context(), r, r.Images...); err != nil {
			t.Error(err)
		}
		if err := s.Discard(t.Context(), v, r.Images[0], u, ""); err != nil {
			t.Error(err)
		}
	}
	t.Run("nothing was there", func(t *testing.T) {
		s, v := newStore(t), newView(t, "native")
		fail(t, s, v)
		if n, k := names(t, s), keys(t, v); len(n) != 0 || len(k) != 0 {
			t.Errorf("images %v, snapshots %v", n, k)
		}
	})
	t.Run("another had the name", func(t *testing.T) {
		s, v := newStore(t), newView(t, "native")
		img, _ := loadStd(t, s)
		unpack(t, s, v, img)
		before, had := names(t, s), keys(t, v)
		fail(t, s, v)
		if n, k := names(t, s), keys(t, v); !slices.Equal(n, before) || len(k) != len(had) {
			t.Errorf("images %v, were %v; snapshots %v, were %v", n, before, k, had)
		}
	})
	t.Run("another needs a layer", func(t *testing.T) {
		s, v := newStore(t), newView(t, "native")
		l := testimage.NewLayout()
		l.List("first", l.AddImage(t, testimage.Platform, testimage.Layers(t)[:1]).Target)
		r, err := s.Load(t.Context(), l.Dir(t), image.LoadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		unpack(t, s, v, r.Images[0])
		fail(t, s, v)
		if n, k := names(t, s), keys(t, v); len(n) != 1 || len(k) != 1 {
			t.Errorf("images %v, snapshots %v", n, k)
		}
	})
	t.Run("it was listed before", func(t *testing.T) {
		s, v := newStore(t), newView(t, "native")
		if _, err := s.Load(t.Context(), broken, image.LoadOptions{}); err != nil {
			t.Fatal(err)
		}
		before := names(t, s)
		fail(t, s, v)
		if n := names(t, s); !slices.Equal(n, before) {
			t.Errorf("images %v, were %v", n, before)
		}
	})
	t.Run("somebody else is at work", func(t *testing.T) {
		s, v := newStore(t), newView(t, "native")
		r, err := s.Load(t.Context(), broken, image.LoadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		u, err := s.Unpack(t.Context(), v, r.Images[0], image.UnpackOptions{})
		if !errdefs.IsDataLoss(err) {
			t.Fatalf("%v", err)
		}
		if err := s.TakeBack(t.Context(), r, r.Images...); err != nil {
			t.Error(err)
		}
		l, err := sys.WaitLock(s.Dir()+"/blobs", sys.O_RDONLY, sys.LockShared)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := s.Discard(t.Context(), v, r.Images[0], u, ""); err != nil {
			t.Error(err)
		}
		if k := keys(t, v); len(k) != 2 {
			t.Errorf("snapshots %v", k)
		}
	})
}
