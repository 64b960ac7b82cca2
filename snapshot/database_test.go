package snapshot_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestBurstSharesFlushes: updates that come while another Store has the
// database are one transaction, and each gets its own outcome.
func TestBurstSharesFlushes(t *testing.T) {
	root := seedStore(t, "native")
	a, b := open(t, root), open(t, root)
	va := view(t, a, "v", "native")
	for i := range 50 {
		must(t, second(va.Prepare(t.Context(), fmt.Sprint(i), "")))
	}
	before := a.Batches()
	var wg sync.WaitGroup
	must(t, b.Pause(func() {
		for i := range 100 {
			wg.Go(func() {
				_, err := va.Update(t.Context(), snapshots.Info{Name: fmt.Sprint(i), Labels: map[string]string{"l": "x"}})
				if i < 50 && err != nil {
					t.Error(err)
				} else if i >= 50 {
					wants(t, err, errdefs.ErrNotFound)
				}
			})
		}
		time.Sleep(100 * time.Millisecond) // for them to queue; too short makes more batches, not a wrong result
	}))
	wg.Wait()
	if n := a.Batches() - before; n > 20 {
		t.Errorf("%d transactions for a burst of 100 updates", n)
	}
	for i := range 50 {
		if info, err := va.Stat(t.Context(), fmt.Sprint(i)); err != nil || info.Labels["l"] != "x" {
			t.Errorf("%d: %v, %v", i, info.Labels, err)
		}
	}
}

// TestUpdateTakenBack: a call that gives up while it waits for the database has
// not happened.
func TestUpdateTakenBack(t *testing.T) {
	root := seedStore(t, "native")
	a, b := open(t, root), open(t, root)
	v := view(t, a, "v", "native")
	must(t, b.Pause(func() {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		wants(t, second(v.Stat(ctx, "base")), context.DeadlineExceeded)
		wants(t, second(v.Update(ctx, snapshots.Info{Name: "base", Labels: map[string]string{"l": "x"}})), context.DeadlineExceeded)
	}))
	info, err := v.Stat(t.Context(), "base")
	must(t, err)
	if len(info.Labels) != 0 {
		t.Errorf("labels %v", info.Labels)
	}
}

// TestHandOver: a Store whose reads never pause lets another have the database.
func TestHandOver(t *testing.T) {
	root := seedStore(t, "native")
	a, b := open(t, root), open(t, root)
	va, vb := view(t, a, "v", "native"), view(t, b, "v", "native")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := va.Stat(t.Context(), "base"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 50 {
		must(t, second(vb.Stat(t.Context(), "base")))
	}
	stop()
	wg.Wait()
}

// TestCloseWithCallsInFlight: they end in success or ErrUnavailable.
func TestCloseWithCallsInFlight(t *testing.T) {
	root := testenv.Scratch(t)
	s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: registry()})
	must(t, err)
	v := view(t, s, "v", "native")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				_, err := v.Prepare(t.Context(), fmt.Sprintf("%d-%d", w, i), "")
				if err != nil {
					wants(t, err, errdefs.ErrUnavailable)
					return
				}
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	must(t, s.Close())
	wg.Wait()
	clean(t, reopen(t, root))
}
