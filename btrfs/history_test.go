package btrfs

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/layerctl/layerctl/layer"
)

// histories is how many random histories a run compares: a few dozen, or
// LAYERCTL_HISTORIES.
func histories(t *testing.T) int {
	t.Helper()
	s := os.Getenv("LAYERCTL_HISTORIES")
	if s == "" && testing.Short() {
		return 12
	}
	if s == "" {
		return 48
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDiffEqualsTheWalkOverRandomHistories: between any two of several layers
// that random operations made, the changeset found by SEND is, as a tar, the one
// of the exact walk over both trees. LAYERCTL_SEED gives the first seed.
func TestDiffEqualsTheWalkOverRandomHistories(t *testing.T) {
	first := rand.Uint64() >> 1
	if s := os.Getenv("LAYERCTL_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	n := histories(t)
	each := (n + 2) / 3
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
				h.run(first + uint64(i*each+j))
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

// run makes a base, a child, two grandchildren of which one stays active, and
// a layer beside the child, and compares pairs of them.
func (h *history) run(seed uint64) {
	h.Helper()
	rnd := rand.New(rand.NewPCG(seed, 4))
	g := treegen.New(rnd, treegen.Config{Root: true, Sockets: true})
	base := h.layer(drivers.Ref{}, g.Ops(10+rnd.IntN(60)), true)
	child := h.layer(base, g.Ops(1+rnd.IntN(40)), true)
	grand := h.layer(child, g.Ops(rnd.IntN(40)), true)
	active := h.layer(child, g.Ops(1+rnd.IntN(20)), false)
	beside := h.layer(base, g.Ops(1+rnd.IntN(30)), true)
	for _, p := range [][2]drivers.Ref{{base, child}, {child, base}, {child, grand}, {base, grand}, {grand, base}, {child, active}, {active, grand}, {beside, grand}, {base, active}} {
		if msg := h.compare(p[0], p[1]); msg != "" {
			h.Fatalf("LAYERCTL_SEED=%d, from %s to %s (layers %s %s %s %s %s): %s", seed, p[0].ID, p[1].ID, base.ID, child.ID, grand.ID, active.ID, beside.ID, msg)
		}
	}
	h.twins(base, g, rnd.Uint64(), 1+rnd.IntN(15), seed)
	for _, r := range []drivers.Ref{beside, active, grand, child, base} {
		h.must(h.d.Remove(h.ctx, r.ID))
	}
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
	want, wantLines, err := tarOf(h.ctx, layer.DiffTrees(h.ctx, path(from), path(to), layer.DiffOptions{}))
	if err != nil {
		return "walk: " + err.Error()
	}
	got, gotLines, err := tarOf(h.ctx, h.d.Diff(h.ctx, from, to))
	if err != nil {
		return "diff: " + err.Error()
	}
	if !bytes.Equal(got, want) || gotLines != wantLines {
		return fmt.Sprintf("the walk says\n%sand the diff\n%s", wantLines, gotLines)
	}
	return ""
}

// sendable reports whether SEND says what changed: a diff that quietly walked
// would prove nothing.
func (h *history) sendable(from, to drivers.Ref) bool {
	h.Helper()
	a, err := h.d.still(h.ctx, from, true)
	h.must(err)
	defer a.close()
	b, err := h.d.still(h.ctx, to, true)
	h.must(err)
	defer b.close()
	_, err = touched(h.ctx, a.fd, b.fd)
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
