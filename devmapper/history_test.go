package devmapper

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/layerctl/layerctl/devmapper/ext4"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// TestDiffEqualsTheWalkOverRandomHistories: between any two of several layers that
// random operations made, the changeset found by their blocks is, as a tar, the one of
// the exact walk over both trees, whatever sizes they have. LAYERCTL_SEED gives the first seed,
// LAYERCTL_HISTORIES how many.
func TestDiffEqualsTheWalkOverRandomHistories(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	d, err := Open(t.Context(), drivers.Config{Root: testenv.FS(t, "ext4", testenv.Size(1<<30)) + "/r", Options: map[string]string{"size": "256MiB"}})
	if err != nil {
		t.Fatal(err)
	}
	h := &history{T: t, d: d.(*driver)}
	run := drivertest.History{
		Layer:   h.layer,
		Differs: h.differs,
		Remove:  func(id drivers.ID) { h.must(d.Remove(t.Context(), id)) },
	}
	first := testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1)
	for i := range testenv.Number(t, "LAYERCTL_HISTORIES", 4) {
		run.Run(t, first+i)
	}
	if h.byBlocks != h.all {
		t.Errorf("only %d of %d diffs were by blocks", h.byBlocks, h.all)
	}
	t.Logf("%d diffs", h.all)
	h.must(d.Close())
}

// history makes layers and compares their diffs.
type history struct {
	*testing.T
	d             *driver
	next          drivers.ID
	all, byBlocks int
}

func (h *history) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// layer makes a layer by operations in its mount.
func (h *history) layer(parent drivers.Ref, ops []treegen.Op, commit bool) drivers.Ref {
	h.Helper()
	h.next++
	r := drivers.Ref{ID: h.next}
	if parent.ID != 0 {
		r.Parents = append([]drivers.ID{parent.ID}, parent.Parents...)
	}
	o := drivers.CreateOptions{}
	if h.next%3 == 0 { // it is larger than its parent
		o.Quota = 512*mib + int64(h.next)*64*mib
	}
	h.must(h.d.Create(h.Context(), r, o))
	ms, err := h.d.Mounts(h.Context(), r, drivers.MountOptions{})
	h.must(err)
	dir := h.TempDir()
	h.must(mount.All(h.Context(), ms, dir))
	_, err = treegen.Apply(dir, ops)
	testenv.Unmount(h, dir)
	h.must(err)
	if commit {
		_, err := h.d.Commit(h.Context(), r, drivers.CommitOptions{})
		h.must(err)
	}
	return r
}

// differs says in what a diff is another than the walk's.
func (h *history) differs(from, to drivers.Ref) (msg string) {
	h.Helper()
	ctx := h.Context()
	got, err := drivertest.Collect(ctx, h.d.Diff(ctx, from, to))
	if err != nil {
		return "diff: " + err.Error()
	}
	h.must(h.d.lookAt(ctx, from, func(below seen) error {
		return h.d.lookAt(ctx, to, func(above seen) error {
			h.all++
			_, err := h.d.candidates(ctx, below.volume, above.volume)
			switch { // a diff that quietly walked would prove nothing
			case err == nil:
				h.byBlocks++
			case !errors.Is(err, ext4.ErrCannotTell):
				return err
			default:
				h.Logf("%v", err)
			}
			want, err := drivertest.Collect(ctx, layer.DiffTrees(ctx, below.path, above.path, layer.DiffOptions{}))
			msg = got.Differs(want)
			return err
		})
	}))
	return msg
}
