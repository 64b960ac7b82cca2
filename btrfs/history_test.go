package btrfs

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
)

// histories is how many random histories a run compares: a few dozen, or
// LAYERCTL_HISTORIES.
func histories(t *testing.T) uint64 {
	if testing.Short() {
		return testenv.Number(t, "LAYERCTL_HISTORIES", 12)
	}
	return testenv.Number(t, "LAYERCTL_HISTORIES", 48)
}

// TestDiffEqualsTheWalkOverRandomHistories: between any two of several layers
// that random operations made, the changeset found by SEND is, as a tar, the one
// of the exact walk over both trees. LAYERCTL_SEED gives the first seed.
func TestDiffEqualsTheWalkOverRandomHistories(t *testing.T) {
	first := testenv.Number(t, "LAYERCTL_SEED", rand.Uint64()>>1)
	each := (histories(t) + 2) / 3
	for i, o := range []struct {
		name string
		opts []testenv.Option
	}{
		{"16 KiB nodes", []testenv.Option{testenv.MkfsArgs("-n", "16384", "-m", "single")}},
		{"4 KiB nodes, DUP", []testenv.Option{testenv.MkfsArgs("-n", "4096", "-m", "dup")}},
		{"zstd", []testenv.Option{testenv.MountOptions("compress-force=zstd")}},
	} {
		t.Run(o.name, func(t *testing.T) {
			testenv.Leaks(t)
			dir := testenv.FS(t, "btrfs", append(o.opts, testenv.Size(512<<20))...)
			h := newHistory(t, dir+"/r")
			for j := range each {
				h.run(first + uint64(i)*each + j)
			}
			h.done()
		})
	}
}

// history makes layers and compares their diffs.
type history struct {
	*testing.T
	ctx  context.Context
	d    *driver
	next drivers.ID
	sent int // diffs by SEND
	all  int
}

func newHistory(t *testing.T, root string) *history {
	t.Helper()
	d, err := open(t.Context(), drivers.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return &history{T: t, ctx: t.Context(), d: d}
}

func (h *history) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

// run compares the layers of one random history.
func (h *history) run(seed uint64) {
	h.Helper()
	drivertest.History{
		Layer:   h.layer,
		Differs: h.compare,
		Remove:  func(id drivers.ID) { h.must(h.d.Remove(h.ctx, id)) },
		Beside: func(base drivers.Ref, g *treegen.Gen, rnd *rand.Rand) {
			h.twins(base, g, rnd.Uint64(), 1+rnd.IntN(15), seed)
		},
	}.Run(h.T, seed)
}

// twins compares two layers on which the same happens at the same time, but for
// what is written: files of one number, one transaction and one moment.
func (h *history) twins(base drivers.Ref, g *treegen.Gen, other uint64, n int, seed uint64) {
	h.Helper()
	ops := g.Ops(n)
	a, aTree := h.create(base, drivers.CreateOptions{})
	b, bTree := h.create(base, drivers.CreateOptions{})
	for i := range ops {
		_, err := treegen.Apply(aTree, ops[i:i+1])
		h.must(err)
		o := ops[i]
		if o.Seed != 0 {
			o.Seed ^= other
		}
		_, err = treegen.Apply(bTree, []treegen.Op{o})
		h.must(err)
	}
	for _, p := range [][2]drivers.Ref{{a, b}, {b, a}} {
		if msg := h.differs(p[0], p[1]); msg != "" {
			h.Fatalf("LAYERCTL_SEED=%d, twins: %s", seed, msg)
		}
	}
	h.must(h.d.Remove(h.ctx, a.ID))
	h.must(h.d.Remove(h.ctx, b.ID))
}

// layer makes a layer by operations on its subvolume.
func (h *history) layer(parent drivers.Ref, ops []treegen.Op, commit bool) drivers.Ref {
	h.Helper()
	h.next++
	r := drivers.Ref{ID: h.next}
	if parent.ID != 0 {
		r.Parents = append([]drivers.ID{parent.ID}, parent.Parents...)
	}
	h.must(h.d.Create(h.ctx, r, drivers.CreateOptions{}))
	_, err := treegen.Apply(h.d.treePath(r.ID, writable), ops)
	h.must(err)
	if commit {
		_, err := h.d.Commit(h.ctx, r, drivers.CommitOptions{})
		h.must(err)
	}
	return r
}

func (h *history) compare(from, to drivers.Ref) string {
	h.Helper()
	msg := h.differs(from, to)
	if msg == "" {
		h.all++
		if h.sendable(from, to) {
			h.sent++
		}
	}
	return msg
}

// differs says in what a diff is another than the walk's.
func (h *history) differs(from, to drivers.Ref) string {
	h.Helper()
	path := func(r drivers.Ref) string {
		l, err := h.d.layer(r.ID)
		h.must(err)
		defer l.Close()
		return h.d.treePath(r.ID, l.kind)
	}
	want, err := drivertest.Collect(h.ctx, layer.DiffTrees(h.ctx, path(from), path(to), layer.DiffOptions{}))
	if err != nil {
		return "walk: " + err.Error()
	}
	got, err := drivertest.Collect(h.ctx, h.d.Diff(h.ctx, from, to))
	if err != nil {
		return "diff: " + err.Error()
	}
	return got.Differs(want)
}

// sendTrees are the trees of two layers, such as can be sent, until done.
func (h *history) sendTrees(from, to drivers.Ref) (a, b *stillTree, done func()) {
	h.Helper()
	a, err := h.d.still(h.ctx, from, true)
	h.must(err)
	b, err = h.d.still(h.ctx, to, true)
	if err != nil {
		a.close()
		h.Fatal(err)
	}
	return a, b, func() { b.close(); a.close() }
}

// sendable reports whether SEND says what changed: a diff that quietly walked
// would prove nothing.
func (h *history) sendable(from, to drivers.Ref) bool {
	h.Helper()
	a, b, done := h.sendTrees(from, to)
	defer done()
	_, err := touched(h.ctx, a.fd, b.fd)
	if err != nil && !cannotSend(err) {
		h.Fatal(err)
	}
	return err == nil
}

func (h *history) done() {
	h.Helper()
	if h.sent*10 < h.all*9 {
		h.Errorf("only %d of %d diffs were by SEND", h.sent, h.all)
	}
	h.Logf("%d of %d diffs were by SEND", h.sent, h.all)
	h.must(h.d.Close())
}
