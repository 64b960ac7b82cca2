package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/snapshot"
)

// TestErrors: which sentinel each wrong call gets, as containerd's metadata
// store gives them.
func TestErrors(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		ctx := t.Context()
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		_, err := v.Prepare(ctx, "act", "base")
		must(t, err)
		_, err = v.View(ctx, "ro", "base")
		must(t, err)
		prepare := func(key, parent string) error { _, err := v.Prepare(ctx, key, parent); return err }
		for _, c := range []struct {
			name string
			err  error
			want error
		}{
			{"prepare an existing key", prepare("act", ""), errdefs.ErrAlreadyExists},
			{"prepare a committed key", prepare("base", ""), errdefs.ErrAlreadyExists},
			{"prepare without key", prepare("", ""), errdefs.ErrInvalidArgument},
			{"prepare an endless key", prepare(strings.Repeat("k", 1<<15), ""), errdefs.ErrInvalidArgument},
			{"prepare on nothing", prepare("x", "nothing"), errdefs.ErrNotFound},
			{"prepare on an active", prepare("x", "act"), errdefs.ErrInvalidArgument},
			{"commit nothing", v.Commit(ctx, "x", "nothing"), errdefs.ErrNotFound},
			{"commit to an existing name", v.Commit(ctx, "base", "act"), errdefs.ErrAlreadyExists},
			{"commit to its own name", v.Commit(ctx, "act", "act"), errdefs.ErrAlreadyExists},
			{"commit a view", v.Commit(ctx, "x", "ro"), errdefs.ErrFailedPrecondition},
			{"commit a committed", v.Commit(ctx, "x", "base"), errdefs.ErrFailedPrecondition},
			{"commit without name", v.Commit(ctx, "", "act"), errdefs.ErrInvalidArgument},
			{"commit under another parent", v.Commit(ctx, "x", "act", snapshots.WithParent("ro")), errdefs.ErrInvalidArgument},
			{"remove nothing", v.Remove(ctx, "nothing"), errdefs.ErrNotFound},
			{"remove a parent", v.Remove(ctx, "base"), errdefs.ErrFailedPrecondition},
			{"stat nothing", second(v.Stat(ctx, "nothing")), errdefs.ErrNotFound},
			{"usage of nothing", second(v.Usage(ctx, "nothing")), errdefs.ErrNotFound},
			{"mounts of nothing", second(v.Mounts(ctx, "nothing")), errdefs.ErrNotFound},
			{"mounts of a committed", second(v.Mounts(ctx, "base")), errdefs.ErrFailedPrecondition},
			{"update nothing", second(v.Update(ctx, snapshots.Info{Name: "nothing"})), errdefs.ErrNotFound},
			{"update the kind", second(v.Update(ctx, snapshots.Info{Name: "base"}, "kind")), errdefs.ErrInvalidArgument},
			{"apply onto nothing", v.Apply(ctx, "nothing", strings.NewReader(""), applyOptions), errdefs.ErrNotFound},
			{"apply onto a committed", v.Apply(ctx, "base", strings.NewReader(""), applyOptions), errdefs.ErrFailedPrecondition},
			{"apply onto a view", v.Apply(ctx, "ro", strings.NewReader(""), applyOptions), errdefs.ErrFailedPrecondition},
		} {
			if !errors.Is(c.err, c.want) {
				t.Errorf("%s: got %v, want %q", c.name, c.err, c.want)
			}
		}
		err = v.Remove(ctx, "base")
		if !strings.Contains(fmt.Sprint(err), `"act", "ro"`) {
			t.Errorf("the dependants are not named: %v", err)
		}
		equal(t, "keys", keys(t, v), []string{"act", "base", "ro"})
	})
}

func second[T any](_ T, err error) error { return err }

// TestRebase: a snapshot prepared without a parent gets one at Commit, where
// the driver can.
func TestRebase(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		ctx := t.Context()
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		_, err := v.Prepare(ctx, "act", "")
		must(t, err)
		write(t, v, "act", map[string]string{"b": "2"})
		wants(t, v.Commit(ctx, "top", "act", snapshots.WithParent("nothing")), errdefs.ErrNotFound)
		wants(t, v.Commit(ctx, "top", "act", snapshots.WithParent("act")), errdefs.ErrFailedPrecondition)
		wants(t, second(s.Driver(ctx, v.Name())), errdefs.ErrNotFound) // a view is no driver
		rec, err := v.Record(ctx, "act")
		must(t, err)
		d, err := s.Driver(ctx, rec.Driver)
		must(t, err)
		err = v.Commit(ctx, "top", "act", snapshots.WithParent("base"))
		if !d.Capabilities().Rebase {
			wants(t, err, errdefs.ErrFailedPrecondition)
			return
		}
		must(t, err)
		_, err = v.View(ctx, "look", "top")
		must(t, err)
		var names []string
		for c, err := range v.Contents(ctx, "look") {
			must(t, err)
			names = append(names, c.Entry.Path)
		}
		if !slices.Contains(names, "a") || !slices.Contains(names, "b") {
			t.Errorf("rebased tree has %v", names)
		}
		wants(t, v.Remove(ctx, "base"), errdefs.ErrFailedPrecondition)
		if d := diff(t, v, "", "top"); !slices.Contains(d, "A b") || slices.Contains(d, "D a") {
			t.Errorf("diff %v", d)
		}
	})
}

// TestViewsAreSeparate: a key belongs to one view, whatever another does.
func TestViewsAreSeparate(t *testing.T) {
	s := open(t, testenv.Scratch(t))
	a, b := view(t, s, "a", "native"), view(t, s, "b", "native")
	layerOf(t, a, "base", "", map[string]string{"f": "a"})
	_, err := b.Prepare(t.Context(), "x", "base")
	wants(t, err, errdefs.ErrNotFound)
	layerOf(t, b, "base", "", map[string]string{"f": "b"})
	equal(t, "keys of a", keys(t, a), []string{"base"})
	must(t, a.Remove(t.Context(), "base"))
	equal(t, "keys of b", keys(t, b), []string{"base"})
	views, err := s.Views(t.Context())
	must(t, err)
	equal(t, "views", views, []string{"b"})
	for _, bad := range []string{"", "x/y", "x\x00"} {
		_, err := s.View(bad, "")
		wants(t, err, errdefs.ErrInvalidArgument)
	}
	clean(t, s)
}

// TestSeveralDrivers: one view holds snapshots of two drivers; a child is its
// parent's driver's; a diff across drivers is exact.
func TestSeveralDrivers(t *testing.T) {
	testenv.Root(t)
	s := open(t, testenv.Scratch(t))
	ctx := t.Context()
	layerOf(t, view(t, s, "v", "native"), "n", "", map[string]string{"same": "1", "differs": "n"})
	layerOf(t, view(t, s, "v", "overlay"), "o", "", map[string]string{"same": "1", "differs": "o"})
	v := view(t, s, "v", "")
	for key, driver := range map[string]string{"n": "native", "o": "overlay"} {
		_, err := v.Prepare(ctx, "on-"+key, key)
		must(t, err)
		r, err := v.Record(ctx, "on-"+key)
		must(t, err)
		if r.Driver != driver {
			t.Errorf("child of %s is %s's", key, r.Driver)
		}
	}
	_, err := view(t, s, "v", "native").Prepare(ctx, "x", "o")
	wants(t, err, errdefs.ErrInvalidArgument)
	for _, line := range diff(t, v, "n", "o") {
		if strings.HasSuffix(line, "differs") {
			return
		}
	}
	t.Error("diff across drivers misses a file")
}

func TestLabelsAndTimes(t *testing.T) {
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "native")
	ctx := t.Context()
	label := map[string]string{"containerd.io/snapshot/x": "1", "other": "2", "empty": ""}
	_, err := v.Prepare(ctx, "act", "", snapshots.WithLabels(label))
	must(t, err)
	i, err := v.Stat(ctx, "act")
	must(t, err)
	if !maps.Equal(i.Labels, map[string]string{"containerd.io/snapshot/x": "1", "other": "2"}) {
		t.Errorf("labels %v", i.Labels)
	}
	must(t, v.Commit(ctx, "c", "act", snapshots.WithLabels(map[string]string{"third": "3"})))
	c, err := v.Stat(ctx, "c")
	must(t, err)
	if !maps.Equal(c.Labels, map[string]string{"third": "3"}) {
		t.Errorf("labels after commit %v: they are replaced, not inherited", c.Labels)
	}
	if c.Created.Before(i.Created) || c.Created != c.Updated {
		t.Errorf("times: active made %v, committed %v, updated %v", i.Created, c.Created, c.Updated)
	}
	c.Labels = map[string]string{"third": "", "fourth": "4"}
	u, err := v.Update(ctx, c, "labels.third", "labels.fourth")
	must(t, err)
	if !maps.Equal(u.Labels, map[string]string{"fourth": "4"}) {
		t.Errorf("updated labels %v", u.Labels)
	}
}

// TestRemovedWhileMounted: busy is a debt, never the client's error.
func TestRemovedWhileMounted(t *testing.T) {
	testenv.Root(t)
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		ctx := t.Context()
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		must(t, s.FinishListings(ctx)) // a listing in progress uses its layer, too
		_, err := v.Prepare(ctx, "act", "base")
		must(t, err)
		dir := t.TempDir()
		ms, err := v.Mounts(ctx, "act")
		must(t, err)
		must(t, mount.All(ctx, ms, dir))
		where, err := s.Mounted(ctx)
		must(t, err)
		if len(where) != 1 || where[0].Key != "act" || where[0].Target != dir {
			t.Errorf("mounted: %+v, want act at %s", where, dir)
		}
		must(t, v.Remove(ctx, "act"))
		must(t, v.Remove(ctx, "base"))
		must(t, v.Cleanup(ctx))
		r, err := s.GC(ctx)
		must(t, err)
		if len(r.Left) != 1 || r.Layers != 0 {
			t.Errorf("gc with a mount: %+v", r)
		}
		if _, err := os.Stat(filepath.Join(dir, "a")); err != nil {
			t.Errorf("the mount lost its parent: %v", err)
		}
		_, err = v.Prepare(ctx, "act", "")
		must(t, err) // the key is free at once
		testenv.Unmount(t, dir)
		r, err = s.GC(ctx)
		must(t, err)
		if len(r.Left) != 0 || r.Layers != 2 || r.Bytes == 0 {
			t.Errorf("gc after umount: %+v", r)
		}
	})
}

// TestConcurrent: many calls of all kinds at once, on many keys and on the same
// ones; each ends in success or in an error that the order of calls explains.
func TestConcurrent(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() { churn(t, s, v, w) })
		}
		wg.Wait()
		_, err := s.GC(t.Context())
		must(t, err)
	})
}

func churn(t *testing.T, s *snapshot.Store, v *snapshot.View, w int) {
	ctx := t.Context()
	fine := func(err error) {
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err) && !errdefs.IsFailedPrecondition(err) {
			t.Error(err)
		}
	}
	for i := range 10 {
		own, shared := fmt.Sprintf("own-%d-%d", w, i), fmt.Sprintf("shared-%d", i%3)
		_, err := v.Prepare(ctx, own, "base")
		if err != nil {
			t.Error(err)
			continue
		}
		fine(second(v.Prepare(ctx, shared, "base")))
		fine(second(v.Mounts(ctx, shared)))
		fine(second(v.Usage(ctx, shared)))
		if err := v.Commit(ctx, own+"-c", own); err != nil {
			t.Error(err)
		}
		fine(v.Commit(ctx, shared+"-c", shared))
		fine(v.Remove(ctx, shared+"-c"))
		fine(v.Remove(ctx, shared))
		if err := v.Remove(ctx, own+"-c"); err != nil {
			t.Error(err)
		}
		if i%4 == 0 {
			fine(v.Cleanup(ctx))
		}
	}
}

// TestStatInDiffAndWalk: callbacks may call the store.
func TestStatInDiffAndWalk(t *testing.T) {
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "native")
	layerOf(t, v, "base", "", map[string]string{"a": "1", "b": "2"})
	must(t, v.Walk(t.Context(), func(ctx context.Context, i snapshots.Info) error {
		return second(v.Update(ctx, i))
	}))
	for _, err := range v.Diff(t.Context(), "", "base") {
		must(t, err)
		must(t, second(v.MountsWith(t.Context(), "base", drivers.MountOptions{})))
	}
}

func TestCancelled(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		_, err := v.Prepare(t.Context(), "act", "base")
		must(t, err)
		wants(t, second(v.Prepare(ctx, "x", "base")), context.Canceled)
		wants(t, v.Commit(ctx, "x", "act"), context.Canceled)
		wants(t, v.Remove(ctx, "act"), context.Canceled)
		wants(t, second(s.GC(ctx)), context.Canceled)
		equal(t, "keys", keys(t, v), []string{"act", "base"})
		must(t, v.Commit(t.Context(), "x", "act"))
	})
}

// TestIDsAreNeverReused: across removal, restart and many leases.
func TestIDsAreNeverReused(t *testing.T) {
	root := testenv.Scratch(t)
	var last drivers.ID
	for range 4 {
		s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: registry(), Volatile: true})
		must(t, err)
		v := view(t, s, "v", "native")
		for i := range 9 {
			must(t, second(v.Prepare(t.Context(), fmt.Sprint(i), "")))
			r, err := v.Record(t.Context(), fmt.Sprint(i))
			must(t, err)
			if r.ID <= last {
				t.Fatalf("ID %s after %s", r.ID, last)
			}
			last = r.ID
			must(t, v.Remove(t.Context(), fmt.Sprint(i)))
		}
		must(t, v.Cleanup(t.Context()))
		must(t, s.Close())
	}
	clean(t, open(t, root))
}

// TestPrepareIsOneTransaction: once a process has made its second snapshot, every
// further one is one transaction, the record's, which takes new IDs with it.
func TestPrepareIsOneTransaction(t *testing.T) {
	s, err := snapshot.Open(t.Context(), testenv.Scratch(t), snapshot.Options{Registry: registry(), Volatile: true})
	must(t, err)
	v := view(t, s, "v", "native")
	prepare := func(i int) int {
		before := s.Batches()
		must(t, second(v.Prepare(t.Context(), fmt.Sprint(i), "")))
		return s.Batches() - before
	}
	equal(t, "the first two", []int{prepare(0), prepare(1)}, []int{2, 2}) // no more IDs than one who makes one needs
	for i := range 30 {                                                   // through the blocks of 4 and of 16
		if n := prepare(2 + i); n != 1 {
			t.Fatalf("prepare %d: %d transactions", 2+i, n)
		}
	}
	must(t, s.Close())
}
