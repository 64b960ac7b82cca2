package snapshot_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

func check(t *testing.T, s *snapshot.Store, o snapshot.CheckOptions) []snapshot.Finding {
	t.Helper()
	found, err := s.Check(t.Context(), o)
	must(t, err)
	return found
}

func problems(found []snapshot.Finding) (ps []snapshot.Problem) {
	for _, f := range found {
		ps = append(ps, f.Problem)
	}
	return ps
}

// TestCheckFindsDamage breaks one thing after the other.
func TestCheckFindsDamage(t *testing.T) {
	root := testenv.Scratch(t)
	s := open(t, root)
	v := view(t, s, "v", "native")
	ctx := t.Context()
	layerOf(t, v, "base", "", map[string]string{"a": "1", "d/b": "2"})
	layerOf(t, v, "top", "base", map[string]string{"c": "3"})
	clean(t, s)
	base, err := v.Record(ctx, "base")
	must(t, err)
	top, err := v.Record(ctx, "top")
	must(t, err)
	listing := filepath.Join(root, "listings", top.ID.String())

	t.Run("rotten file", func(t *testing.T) {
		ms, err := v.MountsWith(ctx, "top", drivers.MountOptions{})
		must(t, err)
		file := filepath.Join(ms[0].Source, "c")
		i, err := os.Stat(file)
		must(t, err)
		must(t, os.WriteFile(file, []byte("X"), 0o644))
		must(t, os.Chtimes(file, i.ModTime(), i.ModTime()))
		equal(t, "quick", problems(check(t, s, snapshot.CheckOptions{Quick: true})), nil)
		found := check(t, s, snapshot.CheckOptions{})
		equal(t, "found", problems(found), []snapshot.Problem{snapshot.ContentDamaged})
		if len(found) > 0 && (found[0].Object != "v/top" || !strings.Contains(found[0].Detail, "c: content")) {
			t.Errorf("the file is not named: %v", found[0])
		}
		must(t, os.WriteFile(file, []byte("3"), 0o644))
		must(t, os.Chtimes(file, i.ModTime(), i.ModTime()))
		clean(t, s)
	})
	t.Run("damaged listing", func(t *testing.T) {
		must(t, os.Truncate(listing, 20))
		equal(t, "found", problems(check(t, s, snapshot.CheckOptions{Quick: true})), []snapshot.Problem{snapshot.ListingDamaged})
		found := check(t, s, snapshot.CheckOptions{Repair: true})
		if len(found) != 1 || !found[0].Repaired {
			t.Errorf("repair: %v", found)
		}
		clean(t, s)
	})
	t.Run("lost listing", func(t *testing.T) {
		must(t, os.Remove(listing))
		equal(t, "found", problems(check(t, s, snapshot.CheckOptions{Quick: true})), []snapshot.Problem{snapshot.ListingMissing})
		check(t, s, snapshot.CheckOptions{Repair: true})
		clean(t, s)
	})
	t.Run("stray listing", func(t *testing.T) {
		must(t, os.WriteFile(filepath.Join(root, "listings", "zzz"), nil, 0o644))
		equal(t, "found", problems(check(t, s, snapshot.CheckOptions{Quick: true, Repair: true})), []snapshot.Problem{snapshot.ListingStray})
		clean(t, s)
	})
	outer := t
	t.Run("orphan", func(t *testing.T) {
		d, err := s.Driver(ctx, "native")
		must(t, err)
		must(t, d.Create(ctx, drivers.Ref{ID: 12345}, drivers.CreateOptions{}))
		found := check(t, s, snapshot.CheckOptions{Quick: true})
		equal(t, "found", problems(found), []snapshot.Problem{snapshot.OrphanLayer})
		must(t, s.Close())
		s = open(outer, root) // an open never removes what no lease explains
		v = view(t, s, "v", "native")
		equal(t, "found again", problems(check(t, s, snapshot.CheckOptions{Quick: true})), []snapshot.Problem{snapshot.OrphanLayer})
		check(t, s, snapshot.CheckOptions{Quick: true, Repair: true})
		clean(t, s)
	})
	t.Run("stray layer in the way", func(t *testing.T) {
		must(t, second(v.Prepare(ctx, "probe", "")))
		r, err := v.Record(ctx, "probe")
		must(t, err)
		d, err := s.Driver(ctx, "native")
		must(t, err)
		for id := r.ID + 1; id < r.ID+100; id++ {
			must(t, d.Create(ctx, drivers.Ref{ID: id}, drivers.CreateOptions{}))
		}
		must(t, second(v.Prepare(ctx, "passes", "")))
		after, err := v.Record(ctx, "passes")
		must(t, err)
		if after.ID < r.ID+100 {
			t.Errorf("ID %s was taken by a stray layer", after.ID)
		}
		check(t, s, snapshot.CheckOptions{Quick: true, Repair: true})
		clean(t, s)
	})
	t.Run("missing layer", func(t *testing.T) {
		d, err := s.Driver(ctx, "native")
		must(t, err)
		must(t, d.Remove(ctx, top.ID))
		found := check(t, s, snapshot.CheckOptions{Repair: true})
		equal(t, "found", problems(found), []snapshot.Problem{snapshot.LayerMissing})
		if b, err := json.Marshal(found); err != nil || !strings.Contains(string(b), `"object":"v/top"`) {
			t.Errorf("as JSON: %s, %v", b, err)
		}
		must(t, v.Remove(ctx, "top"))
		must(t, v.Cleanup(ctx))
		clean(t, s)
	})
	if base.TreeDigest == "" || base.TreeDigest == top.TreeDigest {
		t.Errorf("tree digests %q and %q", base.TreeDigest, top.TreeDigest)
	}
}

// TestTreeDigestIsTheSameOnEveryDriver: equal trees, equal digests.
func TestTreeDigestIsTheSameOnEveryDriver(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	digests := map[string]string{}
	for _, driver := range []string{"native", "overlay"} {
		v := view(t, s, driver, driver)
		must(t, v.Create(t.Context(), "act", "", snapshot.CreateOptions{}))
		must(t, v.Apply(t.Context(), "act", tarOf(t, "a", "b"), applyOptions))
		must(t, v.Commit(t.Context(), "base", "act"))
		must(t, v.Create(t.Context(), "act", "base", snapshot.CreateOptions{}))
		must(t, v.Apply(t.Context(), "act", tarOf(t, "b", ".wh.a", "c"), applyOptions))
		must(t, v.Commit(t.Context(), "top", "act"))
		r, err := v.Record(t.Context(), "top")
		must(t, err)
		digests[driver] = string(r.TreeDigest)
	}
	if digests["native"] != digests["overlay"] || digests["native"] == "" {
		t.Errorf("digests %v", digests)
	}
	clean(t, s)
}

// examined is a driver that finds what it is told, or does not open.
type examined struct {
	drivers.Driver
	found *[]drivers.Finding
}

func (e examined) Examine(_ context.Context, o drivers.ExamineOptions) ([]drivers.Finding, error) {
	if o.Note != nil {
		o.Note("looked")
	}
	for i := range *e.found {
		if o.Repair {
			(*e.found)[i].Done = "mended"
		}
	}
	return *e.found, nil
}

// TestCheckAsksTheDriver: what a driver finds in what it keeps layers in is a finding, and
// a driver that does not open may say more of it.
func TestCheckAsksTheDriver(t *testing.T) {
	var found []drivers.Finding
	var broken error
	f := native.Factory()
	open := f.Open
	f.Open = func(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
		d, err := open(ctx, c)
		return examined{d, &found}, errors.Join(err, broken)
	}
	f.Examine = func(_ context.Context, c drivers.Config, _ drivers.ExamineOptions) ([]drivers.Finding, error) {
		return []drivers.Finding{{Fault: drivers.StorageDamaged, Object: filepath.Base(c.Root)}}, io.ErrUnexpectedEOF
	}
	root := testenv.Scratch(t)
	reopen := func() *snapshot.Store {
		s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: drivers.NewRegistry(f)})
		must(t, err)
		t.Cleanup(func() { must(t, s.Close()) })
		return s
	}
	s := reopen()
	layerOf(t, view(t, s, "v", "native"), "base", "", map[string]string{"a": "1"})
	clean(t, s)
	found = []drivers.Finding{{Fault: drivers.OrphanDevice, Object: "device x", Detail: "is nobody's", Suggestion: "do"}}
	var notes []string
	o := snapshot.CheckOptions{Note: func(text string) { notes = append(notes, text) }}
	equal(t, "found", check(t, s, o), []snapshot.Finding{{Problem: snapshot.OrphanDevice, Object: "native: device x", Detail: "is nobody's", Suggestion: "do"}})
	equal(t, "notes", notes, []string{"native: looked"})
	o.Repair = true
	equal(t, "repaired", check(t, s, o), []snapshot.Finding{{Problem: snapshot.OrphanDevice, Object: "native: device x", Detail: "is nobody's", Suggestion: "do", Repaired: true, Done: "mended"}})
	must(t, s.Close())
	broken = errors.New("broken")
	got := problems(check(t, reopen(), snapshot.CheckOptions{Quick: true}))
	equal(t, "of one that does not open", got, []snapshot.Problem{snapshot.DriverBroken, snapshot.StorageDamaged, snapshot.DriverBroken})
}

// TestCheckBesideAListing: a listing that another process finishes while Check looks at its
// layer was told as one that nobody had computed.
func TestCheckBesideAListing(t *testing.T) {
	testenv.Root(t)
	root := seedStore(t, "native")
	written, goOn := make(chan struct{}), make(chan struct{})
	ctx := faults.With(t.Context(), func(step string) error {
		if step == "store: list: written" {
			close(written)
			<-goOn
		}
		return nil
	})
	s, err := snapshot.Open(ctx, root, snapshot.Options{Registry: registry()})
	must(t, err)
	defer s.Close()
	layerOf(t, view(t, s, "v", "native"), "one", "base", map[string]string{"f": "1"})
	<-written
	other := open(t, root, func(o *snapshot.Options) { o.NoListings = true })
	seen := false
	found, err := other.Check(t.Context(), snapshot.CheckOptions{Progress: func(p snapshot.CheckProgress) {
		if p.Object == "v/one" && !seen {
			seen = true
			close(goOn)
			must(t, s.FinishListings(t.Context()))
		}
	}})
	must(t, err)
	if !seen || len(found) > 0 {
		t.Errorf("looked at it: %v; found %v", seen, found)
	}
}
