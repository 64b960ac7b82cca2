package image_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testimage"
)

// TestTagBringsBackRemovedImage: an image that is removed while Tag waits for
// index.json is not listed again: GC may have taken its blobs meanwhile, and
// refuses to work where a listed image's documents are gone.
func TestTagBringsBackRemovedImage(t *testing.T) {
	ctx := t.Context()
	s := newStore(t)
	index := filepath.Join(s.Dir(), "index.json")
	empty, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	l := testimage.NewLayout()
	l.List("std", l.AddImage(t, testimage.Platform, testimage.Layers(t)).Target)
	if _, err := s.Load(ctx, l.Dir(t), image.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	dir, err := sys.OpenDir(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	held, err := dir.TryLock(sys.LockExclusive)
	if err != nil {
		t.Fatal(err)
	}
	tagged := make(chan error, 1)
	go func() { tagged <- s.Tag(ctx, "std", "again") }()
	time.Sleep(100 * time.Millisecond) // Tag waits for the lock, or has not begun: it must not matter
	if err := os.WriteFile(index, empty, 0o644); err != nil {
		t.Fatal(err)
	}
	held.Close()
	if err := <-tagged; !errdefs.IsNotFound(err) {
		t.Errorf("tag of what was removed: %v", err)
	}
	if list, err := s.List(ctx); err != nil || len(list) != 0 {
		t.Errorf("listed: %v %v", list, err)
	}
}
