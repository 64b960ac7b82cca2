package devmapper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/layerctl/layerctl/devmapper/ext4"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// number is what the environment says, or a default.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDiffEqualsTheWalkOverRandomHistories: between any two of several layers that
// random operations made, the changeset found by their blocks is, as a tar, the one of
// the exact walk over both trees. LAYERCTL_SEED gives the first seed,
// LAYERCTL_HISTORIES how many.
func TestDiffEqualsTheWalkOverRandomHistories(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	d, err := Open(t.Context(), drivers.Config{Root: testenv.FS(t, "ext4", testenv.Size(1<<30)) + "/r", Options: map[string]string{"size": "256MiB"}})
	if err != nil {
		t.Fatal(err)
	}
	h := &history{T: t, d: d.(*driver)}
	first := number(t, "LAYERCTL_SEED", rand.Uint64()>>1)
	for i := range number(t, "LAYERCTL_HISTORIES", 4) {
		h.run(first + i)
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

// run makes a base, a child, two grandchildren of which one stays active, and a layer
// beside the child, and compares pairs of them.
func (h *history) run(seed uint64) {
	h.Helper()
	rnd := rand.New(rand.NewPCG(seed, 5))
	g := treegen.New(rnd, treegen.Config{Root: true, Sockets: true})
	base := h.layer(drivers.Ref{}, g.Ops(10+rnd.IntN(60)), true)
	child := h.layer(base, g.Ops(1+rnd.IntN(40)), true)
	grand := h.layer(child, g.Ops(rnd.IntN(40)), true)
	active := h.layer(child, g.Ops(1+rnd.IntN(20)), false)
	beside := h.layer(base, g.Ops(1+rnd.IntN(30)), true)
	for _, p := range [][2]drivers.Ref{{base, child}, {child, base}, {base, grand}, {child, active}, {active, grand}, {beside, grand}} {
		if msg := h.differs(p[0], p[1]); msg != "" {
			h.Fatalf("LAYERCTL_SEED=%d, from %s to %s (layers %s %s %s %s %s): %s", seed, p[0].ID, p[1].ID, base.ID, child.ID, grand.ID, active.ID, beside.ID, msg)
		}
	}
	for _, r := range []drivers.Ref{beside, active, grand, child, base} {
		h.must(h.d.Remove(h.Context(), r.ID))
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
	h.must(h.d.Create(h.Context(), r, drivers.CreateOptions{}))
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
	got, gotLines, err := tarOf(ctx, h.d.Diff(ctx, from, to))
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
			want, wantLines, err := tarOf(ctx, layer.DiffTrees(ctx, below.path, above.path, layer.DiffOptions{}))
			if err == nil && (!bytes.Equal(got, want) || gotLines != wantLines) {
				msg = fmt.Sprintf("the walk says\n%sand the diff\n%s", wantLines, gotLines)
			}
			return err
		})
	}))
	return msg
}

// tarOf writes a diff as a tar, and its changes as text.
func tarOf(ctx context.Context, changes iter.Seq2[layer.Change, error]) (tar []byte, lines string, err error) {
	var b, text bytes.Buffer
	noted := func(yield func(layer.Change, error) bool) {
		for c, err := range changes {
			if err == nil {
				fmt.Fprintln(&text, c)
			}
			if !yield(c, err) {
				return
			}
		}
	}
	_, err = layer.WriteTar(ctx, &b, noted, layer.TarOptions{})
	return b.Bytes(), text.String(), err
}
