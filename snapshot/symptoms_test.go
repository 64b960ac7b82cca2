package snapshot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestOpenOfANewStoreByManyAtOnce: each of them gets the store.
func TestOpenOfANewStoreByManyAtOnce(t *testing.T) {
	for range 30 {
		root := filepath.Join(testenv.Scratch(t), "new")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if err := openErr(root); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		left, err := filepath.Glob(filepath.Join(root, "store.json.*"))
		must(t, err)
		equal(t, "left", left, nil)
	}
}

// TestLostDatabaseIsNotAnEmptyStore: a check with repair would take every layer
// for an orphan.
func TestLostDatabaseIsNotAnEmptyStore(t *testing.T) {
	for name, lose := range map[string]func(string) error{
		"removed": os.Remove,
		"emptied": func(p string) error { return os.Truncate(p, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			root := seedStore(t, "native")
			must(t, lose(filepath.Join(root, "db.bolt")))
			wants(t, openErr(root), errdefs.ErrDataLoss)
			wants(t, openErr(root, readOnly), errdefs.ErrDataLoss)
		})
	}
}

// TestReaderThatNeverPausesLetsWritersIn: a store opened read-only gives the
// database up when a writer waits.
func TestReaderThatNeverPausesLetsWritersIn(t *testing.T) {
	root := seedStore(t, "native")
	r, w := open(t, root, readOnly), open(t, root)
	vr, vw := view(t, r, "v", "native"), view(t, w, "v", "native")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := vr.Stat(t.Context(), "base"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for range 20 {
		if _, err := vw.Update(short, snapshots.Info{Name: "base", Labels: map[string]string{"a": "b"}}); err != nil {
			t.Error(err)
			break
		}
	}
	stop()
	wg.Wait()
}

// TestCommitAgainAfterTheNameWasTaken: a process dies when the layer is frozen,
// another takes the name before anybody recovers; the changes are not lost.
func TestCommitAgainAfterTheNameWasTaken(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *snapshot.Store, v *snapshot.View) {
		layerOf(t, v, "base", "", map[string]string{"a": "1"})
		must(t, second(v.Prepare(t.Context(), "act", "base")))
		write(t, v, "act", map[string]string{"f": "kept"})
		j := job{Name: "dieat", Root: s.Root(), Driver: filepath.Base(t.Name()), Step: "store: commit: frozen"}
		if out, err := j.command().CombinedOutput(); err == nil || len(out) > 0 {
			t.Fatalf("was not killed: %v, %s", err, out)
		}
		layerOf(t, v, "taken", "base", map[string]string{"g": "other"})
		again := reopen(t, s.Root())
		va := view(t, again, "v", j.Driver)
		must(t, va.Commit(t.Context(), "mine", "act"))
		must(t, again.FinishListings(t.Context()))
		equal(t, "changes", diff(t, va, "", "mine"), []string{"C .", "A f"})
	})
}

// TestListingThatCannotBeRemovedIsNotForgotten: the debt stays until its listing
// is gone, too, so a GC that dies between leaves nothing stray.
func TestListingThatCannotBeRemovedIsNotForgotten(t *testing.T) {
	s := open(t, testenv.Scratch(t))
	v := view(t, s, "v", "native")
	layerOf(t, v, "x", "", map[string]string{"a": "1"})
	must(t, s.FinishListings(t.Context()))
	r, err := v.Record(t.Context(), "x")
	must(t, err)
	must(t, v.Remove(t.Context(), "x"))
	listing := filepath.Join(s.Root(), "listings", r.ID.String())
	must(t, os.Remove(listing))
	must(t, os.MkdirAll(filepath.Join(listing, "obstacle"), 0o700))
	_, err = s.GC(t.Context())
	wants(t, err, syscall.ENOTEMPTY)
	must(t, os.Remove(filepath.Join(listing, "obstacle")))
	g, err := s.GC(t.Context())
	must(t, err)
	if g.Layers != 1 {
		t.Errorf("second gc: %+v", g)
	}
	clean(t, s)
}

// TestListingIsMadeThoughAnotherGaveItUp: a process that has just opened the store takes
// a listing and is closed; the one that committed makes it.
func TestListingIsMadeThoughAnotherGaveItUp(t *testing.T) {
	root := seedStore(t, "native")
	a := open(t, root)
	va := view(t, a, "v", "native")
	must(t, second(va.Prepare(t.Context(), "act", "base")))
	write(t, va, "act", map[string]string{"f": "1"})
	var b *snapshot.Store
	taken, given := make(chan struct{}), make(chan struct{})
	thief := withHook(context.Background(), func(step string) error {
		if step == "store: list: written" {
			close(taken)
			<-given
			return context.Canceled
		}
		return nil
	})
	ctx := withHook(t.Context(), func(step string) (err error) {
		if step == "store: commit: recorded" {
			b, err = snapshot.Open(thief, root, snapshot.Options{Registry: registry()})
			must(t, err)
			time.Sleep(100 * time.Millisecond) // for b to take it; it gets to the layer when this commit is over
		}
		return nil
	})
	must(t, va.Commit(ctx, "c", "act"))
	<-taken
	time.AfterFunc(50*time.Millisecond, func() { close(given) }) // a has looked by then
	must(t, a.FinishListings(t.Context()))
	if r, err := va.Record(t.Context(), "c"); err != nil || r.TreeDigest == "" {
		t.Errorf("no listing: %+v, %v", r, err)
	}
	must(t, b.Close())
}

// TestFullDiskDoesNotKeepTheStoreShut: what cannot be recovered now is told, and
// the store opens, so that room can be made in it.
func TestFullDiskDoesNotKeepTheStoreShut(t *testing.T) {
	testenv.Root(t)
	for _, step := range []string{"store: create: made", "store: commit: frozen", "store: commit: intended"} {
		t.Run(step, func(t *testing.T) {
			dir := testenv.FS(t, "tmpfs", testenv.Size(8<<20))
			root := filepath.Join(dir, "store")
			s := open(t, root)
			v := view(t, s, "v", "native")
			layerOf(t, v, "base", "", map[string]string{"a": "1", "big": strings.Repeat("x", 1<<20)})
			must(t, second(v.Prepare(t.Context(), "act", "base")))
			must(t, s.Close())
			_ = job{Name: "dieat", Root: root, Driver: "native", Step: step}.command().Run()
			ballast := filepath.Join(dir, "ballast")
			fill(t, ballast)
			s = reopen(t, root)
			if len(s.Recovered()) == 0 {
				t.Error("nothing is told")
			}
			must(t, os.Remove(ballast))
			must(t, s.Close())
			again := reopen(t, root)
			clean(t, again)
		})
	}
}

// TestUnknownDriverKeepsItsHalfMadeLayers: a program without the driver does not
// end the lease that says what is half-made.
func TestUnknownDriverKeepsItsHalfMadeLayers(t *testing.T) {
	testenv.Root(t)
	root := seedStore(t, "overlay")
	_ = job{Name: "dieat", Root: root, Driver: "overlay", Step: "store: create: made"}.command().Run()
	s := reopen(t, root, func(o *snapshot.Options) { o.Registry = drivers.NewRegistry(native.Factory()); o.NoListings = true })
	must(t, s.Close())
	s = reopen(t, root)
	if r := s.Recovered(); len(r) != 1 || r[0].Problem != snapshot.OrphanLayer {
		t.Errorf("recovered: %v", r)
	}
	clean(t, s)
}

// dieAtJob prepares "new" on "base" and commits "act", and is killed at a step.
func dieAtJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry(), NoListings: true})
	if err != nil {
		return err
	}
	v, err := s.View("v", j.Driver)
	if err != nil {
		return err
	}
	_, err = v.Prepare(ctx, "new", "base")
	return errors.Join(err, v.Commit(ctx, "taken", "act"))
}

// editDB changes records as rot would. The store must be closed.
func editDB(t *testing.T, root string, change func(tx *bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(root, "db.bolt"), 0o600, nil)
	must(t, err)
	must(t, db.Update(change))
	must(t, db.Close())
}

// TestOneDamagedRecordIsNamedAndHarmsNoOther: check goes on, names it, and with
// repair leaves the indexes alone, which are all that is left of it.
func TestOneDamagedRecordIsNamedAndHarmsNoOther(t *testing.T) {
	for name, damage := range map[string]func(tx *bolt.Tx) error{
		"v/mid": func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("views")).Bucket([]byte("v")).Put([]byte("mid"), []byte("{rot"))
		},
		"layer 2": func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("layers")).Put([]byte("\x00\x00\x00\x00\x00\x00\x00\x02"), []byte("{rot"))
		},
		"v/top": func(tx *bolt.Tx) error { return tx.Bucket([]byte("views")).Bucket([]byte("v")).Delete([]byte("mid")) },
	} {
		t.Run(name, func(t *testing.T) {
			root := testenv.Scratch(t)
			s := open(t, root)
			v := view(t, s, "v", "native")
			layerOf(t, v, "base", "", map[string]string{"a": "1"})
			layerOf(t, v, "mid", "base", map[string]string{"b": "1"})
			layerOf(t, v, "top", "mid", map[string]string{"c": "1"})
			before, err := v.Record(t.Context(), "top")
			must(t, err)
			must(t, s.Close())
			editDB(t, root, damage)
			s = open(t, root)
			found := check(t, s, snapshot.CheckOptions{Repair: true})
			if !slices.ContainsFunc(found, func(f snapshot.Finding) bool { return f.Problem == snapshot.RecordDamaged && f.Object == name }) {
				t.Errorf("%s is not found: %v", name, found)
			}
			after, err := view(t, s, "v", "native").Record(t.Context(), "top")
			must(t, err)
			equal(t, "parents of top", after.Parents, before.Parents)
		})
	}
}

// TestTruncatedDatabaseIsAnError: reading what is missing would end the process.
func TestTruncatedDatabaseIsAnError(t *testing.T) {
	root := seedStore(t, "native")
	file := filepath.Join(root, "db.bolt")
	i, err := os.Stat(file)
	must(t, err)
	for _, n := range []int64{i.Size() / 2, 5 << 12, 4 << 12, 2 << 12, 100} {
		must(t, os.Truncate(file, n))
		if err := openErr(root); err != nil {
			wants(t, err, errdefs.ErrDataLoss)
		}
	}
}

// TestDriverDirectoryDeletedUnderTheStore: check says so and goes on.
func TestDriverDirectoryDeletedUnderTheStore(t *testing.T) {
	root := seedStore(t, "native")
	s := open(t, root)
	must(t, second(s.Driver(t.Context(), "native")))
	must(t, os.RemoveAll(filepath.Join(root, "drivers")))
	if found := check(t, s, snapshot.CheckOptions{Repair: true}); len(found) == 0 || found[0].Problem != snapshot.DriverBroken {
		t.Errorf("found %v", found)
	}
}

// TestCloseKeepsOthersFromWhatIsStillWritten: a call that outlives its Store keeps its
// locks until it is done.
func TestCloseKeepsOthersFromWhatIsStillWritten(t *testing.T) {
	root := seedStore(t, "native")
	a, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: registry()})
	must(t, err)
	va := view(t, a, "v", "native")
	must(t, va.Create(t.Context(), "act", "base", snapshot.CreateOptions{}))
	begun, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error)
	ctx := withHook(t.Context(), func(step string) error {
		if step == "store: apply: begun" {
			close(begun)
			<-goOn
		}
		return nil
	})
	go func() { done <- va.Apply(ctx, "act", tarOf(t, "g"), applyOptions) }()
	<-begun
	must(t, a.Close())
	vb := view(t, open(t, root), "v", "native")
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wants(t, vb.Commit(short, "c", "act"), context.DeadlineExceeded)
	close(goOn)
	wants(t, <-done, errdefs.ErrUnavailable)
	must(t, vb.Commit(t.Context(), "c", "act"))
	wants(t, second(va.Mounts(t.Context(), "c")), errdefs.ErrUnavailable)
}

// TestRemovedLayerIsNotInUseByItsOwnListing: what was removed right after its commit
// stayed until another GC came: its listing was being computed for nobody.
func TestRemovedLayerIsNotInUseByItsOwnListing(t *testing.T) {
	reached, release := make(chan struct{}), make(chan struct{})
	ctx := withHook(t.Context(), func(step string) error {
		if step == "store: list: written" {
			close(reached)
			<-release
		}
		return nil
	})
	s, err := snapshot.Open(ctx, testenv.Scratch(t), snapshot.Options{Registry: registry()})
	must(t, err)
	v := view(t, s, "v", "native")
	must(t, v.Create(t.Context(), "work", "", snapshot.CreateOptions{}))
	write(t, v, "work", map[string]string{"f": "1"})
	must(t, v.Commit(t.Context(), "done", "work"))
	<-reached
	must(t, v.Remove(t.Context(), "done"))
	collected := make(chan snapshot.GCReport, 1)
	go func() {
		r, err := s.GC(t.Context())
		if err != nil {
			t.Error(err)
		}
		collected <- r
	}()
	var r snapshot.GCReport
	select {
	case r = <-collected:
		close(release)
	case <-time.After(200 * time.Millisecond): // it waits for the listing, which was told to stop
		close(release)
		r = <-collected
	}
	if r.Layers != 1 || len(r.Left) > 0 {
		t.Errorf("%+v, want the layer removed", r)
	}
	clean(t, s)
	must(t, s.Close())
}
