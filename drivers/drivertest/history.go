package drivertest

import (
	"math/rand/v2"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/treegen"
)

// History is what random histories need of a driver whose Diff has a way of its own
// to find what changed.
type History struct {
	// Layer makes a layer by operations on its tree, and commits it or not.
	Layer func(parent drivers.Ref, ops []treegen.Op, commit bool) drivers.Ref
	// Differs says in what the driver's diff is another than the exact walk's; "" for
	// in nothing.
	Differs func(from, to drivers.Ref) string
	// Remove removes a layer.
	Remove func(drivers.ID)
	// Beside, if not nil, is called when all pairs were compared.
	Beside func(base drivers.Ref, g *treegen.Gen, rnd *rand.Rand)
}

// Run makes a base, a child, two grandchildren of which one stays active, and a layer
// beside the child, by operations that the seed gives, compares pairs of them, and
// removes them.
func (h History) Run(t *testing.T, seed uint64) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(seed, 4))
	g := treegen.New(rnd, treegen.Config{Root: true, Sockets: true})
	base := h.Layer(drivers.Ref{}, g.Ops(10+rnd.IntN(60)), true)
	child := h.Layer(base, g.Ops(1+rnd.IntN(40)), true)
	grand := h.Layer(child, g.Ops(rnd.IntN(40)), true)
	active := h.Layer(child, g.Ops(1+rnd.IntN(20)), false)
	beside := h.Layer(base, g.Ops(1+rnd.IntN(30)), true)
	for _, p := range [][2]drivers.Ref{{base, child}, {child, base}, {child, grand}, {base, grand}, {grand, base}, {child, active}, {active, grand}, {beside, grand}, {base, active}} {
		if msg := h.Differs(p[0], p[1]); msg != "" {
			t.Fatalf("LAYERCTL_SEED=%d, from %s to %s (layers %s %s %s %s %s): %s", seed, p[0].ID, p[1].ID, base.ID, child.ID, grand.ID, active.ID, beside.ID, msg)
		}
	}
	if h.Beside != nil {
		h.Beside(base, g, rnd)
	}
	for _, r := range []drivers.Ref{beside, active, grand, child, base} {
		h.Remove(r.ID)
	}
}
