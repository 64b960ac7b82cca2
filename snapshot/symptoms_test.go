package snapshot_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/faults"
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
		j := job{Name: "freeze", Root: s.Root(), Driver: filepath.Base(t.Name())}
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

// freezeJob commits "act" as "taken" and dies when the driver has frozen it.
func freezeJob(ctx context.Context, j job) error {
	s, err := snapshot.Open(ctx, j.Root, snapshot.Options{Registry: registry()})
	if err != nil {
		return err
	}
	v, err := s.View("v", j.Driver)
	if err != nil {
		return err
	}
	return v.Commit(faults.With(ctx, func(step string) error {
		if step == "store: commit: frozen" {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}), "taken", "act")
}
