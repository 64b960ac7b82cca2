package snapshot_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestAdopt: a layer under names in two views is one layer. Each view sees its own
// records, removal in one takes nothing from the other, and the bytes go with the
// last name.
func TestAdopt(t *testing.T) {
	testenv.Root(t)
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			root := testenv.Scratch(t)
			s := open(t, root)
			a, b := view(t, s, "a", driver), view(t, s, "b", driver)
			layerOf(t, a, "base", "", map[string]string{"f": "1"})
			layerOf(t, a, "top", "base", map[string]string{"g": "2"})
			must(t, s.FinishListings(t.Context()))

			wants(t, b.Adopt(t.Context(), "top", a, "top", nil), errdefs.ErrNotFound) // its parent is not here
			must(t, b.Adopt(t.Context(), "low", a, "base", map[string]string{"l": "x"}))
			must(t, b.Adopt(t.Context(), "high", a, "top", nil))
			wants(t, b.Adopt(t.Context(), "high", a, "top", nil), errdefs.ErrAlreadyExists)
			wants(t, b.Adopt(t.Context(), "again", a, "top", nil), errdefs.ErrAlreadyExists)
			equal(t, "keys of b", keys(t, b), []string{"high", "low"})
			i, err := b.Stat(t.Context(), "high")
			must(t, err)
			if i.Parent != "low" || i.Kind != snapshots.KindCommitted {
				t.Errorf("%+v", i)
			}
			clean(t, s)

			// Removal in one view, dependants and all, is nothing to the other.
			must(t, second(b.Prepare(t.Context(), "w", "high")))
			wants(t, b.Remove(t.Context(), "high"), errdefs.ErrFailedPrecondition)
			must(t, a.Remove(t.Context(), "top"))
			must(t, a.Remove(t.Context(), "base"))
			r, err := s.GC(t.Context())
			must(t, err)
			equal(t, "layers freed", []int64{r.Layers}, []int64{0})
			equal(t, "keys of a", keys(t, a), nil)
			equal(t, "content of w", contents(t, b, "w", "f", "g"), []string{"1", "2"})
			clean(t, s)
			must(t, s.Close())

			s = reopen(t, root)
			b = view(t, s, "b", driver)
			for _, k := range []string{"w", "high", "low"} {
				must(t, b.Remove(t.Context(), k))
			}
			r, err = s.GC(t.Context())
			must(t, err)
			equal(t, "layers freed", []int64{r.Layers}, []int64{3})
			clean(t, s)
		})
	}
}

func contents(t *testing.T, v *snapshot.View, key string, files ...string) (all []string) {
	ms, err := v.MountsWith(t.Context(), key, drivers.MountOptions{})
	must(t, err)
	dir, done, err := reach(t.Context(), ms)
	must(t, err)
	defer done()
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f))
		must(t, err)
		all = append(all, string(b))
	}
	return all
}

// TestAdoptRefuses what is no committed snapshot of the same driver and store.
func TestAdoptRefuses(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	a := view(t, s, "a", "native")
	layerOf(t, a, "base", "", map[string]string{"f": "1"})
	must(t, second(a.Prepare(t.Context(), "w", "base")))
	b := view(t, s, "b", "native")
	wants(t, b.Adopt(t.Context(), "x", a, "nothing", nil), errdefs.ErrNotFound)
	wants(t, b.Adopt(t.Context(), "x", a, "w", nil), errdefs.ErrInvalidArgument)
	wants(t, b.Adopt(t.Context(), "", a, "base", nil), errdefs.ErrInvalidArgument)
	wants(t, view(t, s, "c", "overlay").Adopt(t.Context(), "x", a, "base", nil), errdefs.ErrInvalidArgument)
	wants(t, a.Adopt(t.Context(), "x", a, "base", nil), errdefs.ErrAlreadyExists)
	other := view(t, open(t, testenv.Scratch(t)), "b", "native")
	wants(t, other.Adopt(t.Context(), "x", a, "base", nil), errdefs.ErrInvalidArgument)
	must(t, view(t, s, "any", "").Adopt(t.Context(), "x", a, "base", nil))
	clean(t, s)
}
