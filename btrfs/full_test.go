package btrfs

import (
	"errors"
	"os"
	"strconv"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
)

// TestFullFileSystem: on a file system without a block left for data, or for
// metadata, a call works or says ErrResourceExhausted; what was committed and what
// is being written stay as they are; and a removal makes room.
func TestFullFileSystem(t *testing.T) {
	testenv.Slow(t)
	for name, fill := range map[string]func(dir string) error{"data": fillData, "metadata": fillMetadata} {
		t.Run(name, func(t *testing.T) { fullFileSystem(t, fill) })
	}
}

func fullFileSystem(t *testing.T, fill func(dir string) error) {
	testenv.Leaks(t)
	dir := testenv.FS(t, "btrfs", testenv.Size(48<<20), testenv.MkfsArgs("-m", "single", "--mixed", "-n", "4096"))
	h := newHistory(t, dir+"/r")
	base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/kept", noise(1, 1<<20), 0o644))
	h.commit(base)
	before := h.tar(base)
	active, tree := h.create(base, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/new", noise(2, 1<<20), 0o644))
	h.must(h.d.SyncUsage(h.ctx))
	waste, wasteTree := h.create(base, drivers.CreateOptions{})
	if err := fill(wasteTree); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("filling ended with %v, want ENOSPC", err)
	}
	exhausted := func(what string, err error) {
		if err != nil && !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: %v, want it to work or ErrResourceExhausted", what, err)
		}
	}
	h.next++
	late := drivers.Ref{ID: h.next, Parents: []drivers.ID{base.ID}}
	exhausted("create", h.d.Create(h.ctx, late, drivers.CreateOptions{}))
	if msg := h.differs(base, active); msg != "" { // there may be no room for a snapshot
		t.Error(msg)
	}
	_, err := h.d.Commit(h.ctx, active, drivers.CommitOptions{})
	exhausted("commit", err)
	committedAtOnce := err == nil
	for _, id := range []drivers.ID{late.ID, waste.ID} {
		removeFull(h, id)
	}
	h.must(h.d.WaitFreed(h.ctx))
	if !committedAtOnce {
		h.commit(active)
	}
	if msg := h.compare(base, active); msg != "" {
		t.Error(msg)
	}
	if got, err := os.ReadFile(h.d.treePath(active.ID, committed) + "/new"); err != nil || string(got) != string(noise(2, 1<<20)) {
		t.Errorf("what was being written: %d bytes, %v", len(got), err)
	}
	if string(h.tar(base)) != string(before) {
		t.Error("a committed layer is another")
	}
}

// removeFull removes as the store does: a full btrfs may want a flush between.
func removeFull(h *history, id drivers.ID) {
	h.Helper()
	err := h.d.Remove(h.ctx, id)
	if errdefs.IsResourceExhausted(err) {
		h.must(h.d.SyncUsage(h.ctx))
		err = h.d.Remove(h.ctx, id)
	}
	h.must(err)
}

func fillData(dir string) error {
	f, err := os.Create(dir + "/fill")
	if err != nil {
		return err
	}
	defer f.Close()
	for b := noise(3, 1<<20); ; {
		if _, err := f.Write(b); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
}

func fillMetadata(dir string) error {
	b := noise(4, 2000) // inline
	for i := 0; ; i++ {
		if err := os.WriteFile(dir+"/"+strconv.Itoa(i), b, 0o600); err != nil {
			return err
		}
	}
}
