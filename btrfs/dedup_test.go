package btrfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

func noise(seed uint64, size int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// dedupLayers makes two layers that have nothing to do with each other and hold
// the same files, among others.
func dedupLayers(h *history) (refs []drivers.Ref, tars [][]byte) {
	h.Helper()
	for i, extra := range []uint64{100, 101} {
		r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		dir := tree + "/" + string(rune('a'+i))
		h.must(os.Mkdir(dir, 0o755))
		h.must(os.WriteFile(dir+"/same", noise(1, 1<<20), 0o444))
		h.must(os.WriteFile(dir+"/odd", noise(2, 20_000_001), 0o600)) // two calls, and no whole block at the end
		h.must(os.WriteFile(dir+"/same size", noise(extra, 1<<20), 0o644))
		h.must(os.WriteFile(dir+"/small", []byte("inline"), 0o644))
		h.must(os.WriteFile(dir+"/empty", nil, 0o644))
		h.must(os.Truncate(dir+"/empty", 1<<20))
		h.commit(r)
		refs = append(refs, r)
		tars = append(tars, h.tar(r))
	}
	return refs, tars
}

func (h *history) tar(r drivers.Ref) []byte {
	h.Helper()
	c, err := drivertest.Collect(h.ctx, layer.DiffTrees(h.ctx, "", h.d.treePath(r.ID, committed), layer.DiffOptions{}))
	h.must(err)
	return c.Tar
}

func TestDedup(t *testing.T) {
	for name, opts := range map[string][]testenv.Option{"plain": nil, "zstd": {testenv.MountOptions("compress-force=zstd")}} {
		t.Run(name, func(t *testing.T) {
			h := fixture(t, opts...)
			refs, tars := dedupLayers(h)
			const same = 1<<20 + 20_000_001
			want := drivers.DedupReport{Layers: 2, Files: 6, Equal: 2, Bytes: same}
			for _, dry := range []bool{true, false} {
				got, err := h.d.Dedup(h.ctx, refs, drivers.DedupOptions{DryRun: dry})
				if err != nil || got != want {
					t.Errorf("dry run %t: %+v, %v; want %+v", dry, got, err, want)
				}
			}
			got, err := h.d.Dedup(h.ctx, refs, drivers.DedupOptions{})
			if want.Equal, want.Bytes = 0, 0; err != nil || got != want {
				t.Errorf("again: %+v, %v; want %+v", got, err, want)
			}
			for i, r := range refs {
				if !bytes.Equal(h.tar(r), tars[i]) {
					t.Errorf("layer %s is another", r.ID)
				}
			}
		})
	}
}

// The space of one of the two is free afterwards.
func TestDedupFreesSpace(t *testing.T) {
	h := fixture(t)
	refs, _ := dedupLayers(h)
	used := func() int64 {
		h.must(h.d.SyncUsage(h.ctx))
		h.must(h.d.WaitFreed(h.ctx))
		return statfsUsed(h)
	}
	before := used()
	_, err := h.d.Dedup(h.ctx, refs, drivers.DedupOptions{})
	h.must(err)
	if after := used(); before-after < 20<<20 {
		t.Errorf("%d bytes used, %d before", after, before)
	}
}

// A layer of a child counts as its own only what it wrote, and what is not there
// or not committed is passed over.
func TestDedupPassesOver(t *testing.T) {
	h := fixture(t)
	refs, _ := dedupLayers(h)
	active, tree := h.create(refs[0], drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/same", noise(1, 1<<20), 0o644))
	all := append(refs, active, drivers.Ref{ID: 999})
	got, err := h.d.Dedup(h.ctx, all, drivers.DedupOptions{DryRun: true})
	if err != nil || got.Layers != 2 || got.Equal != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	h.commit(active)
	got, err = h.d.Dedup(h.ctx, []drivers.Ref{refs[0], active}, drivers.DedupOptions{})
	if err != nil || got != (drivers.DedupReport{Layers: 2, Files: 4, Equal: 1, Bytes: 1 << 20}) {
		t.Errorf("child: %+v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(h.ctx)
	cancel()
	if _, err := h.d.Dedup(ctx, refs, drivers.DedupOptions{}); !errdefs.IsCanceled(err) {
		t.Errorf("cancelled: %v", err)
	}
}

// One file that the kernel does not share, or a diff at work, ended the run.
func TestDedupPassesOverWhatTheKernelRefuses(t *testing.T) {
	h := fixture(t)
	var refs []drivers.Ref
	for range 2 {
		refs = append(refs, h.script(drivers.Ref{}, `
			head -c 300000 /dev/zero | tr '\0' i >immutable
			touch nocow; test -e ../../../second && chattr +C nocow || touch ../../../second; head -c 300001 /dev/zero | tr '\0' n >>nocow
			head -c 300002 /dev/zero | tr '\0' p >plain
			chattr +i immutable`))
	}
	release := sending(h, h.d.treePath(refs[1].ID, committed))
	got, err := h.d.Dedup(h.ctx, refs, drivers.DedupOptions{})
	if err != nil || got.Files != 6 || got.Equal != 0 {
		t.Errorf("while a layer is sent: %+v, %v", got, err)
	}
	release()
	got, err = h.d.Dedup(h.ctx, refs, drivers.DedupOptions{})
	if err != nil || got.Files != 6 || got.Equal != 1 || got.Bytes != 300002 {
		t.Errorf("%+v, %v; want the plain one", got, err)
	}
}

// Layers that go while they are looked at are no error.
func TestDedupWhileLayersAreRemoved(t *testing.T) {
	h := fixture(t)
	for range 3 {
		var refs []drivers.Ref
		for range 6 {
			refs = append(refs, h.script(drivers.Ref{}, `for i in 1 2 3 4 5 6 7 8; do head -c 100000 /dev/zero | tr '\0' $i >$i; done`))
		}
		var g errgroup.Group
		g.Go(func() error {
			_, err := h.d.Dedup(h.ctx, refs, drivers.DedupOptions{})
			return err
		})
		for _, r := range refs[1:] {
			h.must(h.d.Remove(h.ctx, r.ID))
		}
		h.must(g.Wait())
		h.must(h.d.Remove(h.ctx, refs[0].ID))
	}
}
