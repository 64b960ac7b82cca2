package snapshot_test

import (
	"bufio"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestWaitIsTold: a process that holds the database and does not move makes
// others say whom they wait for, lets them give up, and blocks nobody once it is
// gone.
func TestWaitIsTold(t *testing.T) {
	root := seedStore(t, "native")
	cmd := job{Name: "hold", Root: root, Driver: "native"}.command()
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	_, err = bufio.NewReader(out).ReadString('\n')
	must(t, err)
	stopped(t, cmd.Process.Pid)

	var said logs
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
	defer cancel()
	_, err = snapshot.Open(ctx, root, snapshot.Options{Registry: registry(), Log: said.add})
	wants(t, err, context.DeadlineExceeded)
	pid := fmt.Sprintf("process %d", cmd.Process.Pid)
	if !strings.Contains(fmt.Sprint(err), pid) {
		t.Errorf("the error does not name %s: %v", pid, err)
	}
	if !slices.ContainsFunc(said.all(), func(m string) bool { return strings.Contains(m, pid) }) {
		t.Errorf("the log does not name %s: %q", pid, said.all())
	}
	must(t, cmd.Process.Kill())
	clean(t, reopen(t, root))
}

// stopped waits until a process is stopped.
func stopped(t *testing.T, pid int) {
	t.Helper()
	var ws syscall.WaitStatus
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if _, err := syscall.Wait4(pid, &ws, syscall.WUNTRACED|syscall.WNOHANG, nil); err == nil && ws.Stopped() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the process does not stop")
}

// TestTwoStores: two Stores of one root see each other's snapshots at once and
// keep out of each other's way.
func TestTwoStores(t *testing.T) {
	root := testenv.Scratch(t)
	a := open(t, root)
	b := reopen(t, root) // nothing to recover although a lives
	va, vb := view(t, a, "v", "native"), view(t, b, "v", "native")
	layerOf(t, va, "base", "", map[string]string{"a": "1"})
	equal(t, "keys seen by the other", keys(t, vb), []string{"base"})
	var wg sync.WaitGroup
	for w, v := range []*snapshot.View{va, vb, va, vb} {
		wg.Go(func() {
			for i := range 12 {
				key := fmt.Sprintf("%d-%d", w, i)
				_, err := v.Prepare(t.Context(), key, "base")
				if err == nil {
					err = v.Commit(t.Context(), key+"c", key)
				}
				if err == nil {
					err = v.Remove(t.Context(), key+"c")
				}
				if err == nil {
					err = v.Cleanup(t.Context())
				}
				if err != nil {
					t.Errorf("%s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	must(t, a.FinishListings(t.Context()))
	clean(t, b)
}

// TestOneWinner: of many who want one key, in two Stores, one gets it, and
// nothing is left of the others' tries.
func TestOneWinner(t *testing.T) {
	root := testenv.Scratch(t)
	a, b := open(t, root), open(t, root)
	va, vb := view(t, a, "v", "native"), view(t, b, "v", "native")
	for i := range 10 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		won := 0
		for _, v := range []*snapshot.View{va, vb, va, vb} {
			wg.Go(func() {
				if _, err := v.Prepare(t.Context(), fmt.Sprint(i), ""); err == nil {
					mu.Lock()
					won++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Errorf("%d winners", won)
		}
	}
	clean(t, a)
}

// TestLeaseOfTheLivingIsLeftAlone: an open of the store while another makes a
// layer does not take the layer for garbage.
func TestLeaseOfTheLivingIsLeftAlone(t *testing.T) {
	root := seedStore(t, "native")
	a := open(t, root)
	v := view(t, a, "v", "native")
	tried := 0
	ctx := withHook(t.Context(), func(step string) error {
		if step == "store: create: made" {
			tried++
			b := open(t, root)
			clean(t, b)
			must(t, second(b.Check(t.Context(), snapshot.CheckOptions{Repair: true})))
		}
		return nil
	})
	must(t, second(v.Prepare(ctx, "x", "base")))
	if tried != 1 {
		t.Fatal("the hook was not called")
	}
	clean(t, a)
}

// TestCommitKeepsOthersOut: while a layer is being committed in one Store,
// another waits for it, and its caller may give up.
func TestCommitKeepsOthersOut(t *testing.T) {
	root := seedStore(t, "native")
	a, b := open(t, root), open(t, root)
	va, vb := view(t, a, "v", "native"), view(t, b, "v", "native")
	must(t, second(va.Prepare(t.Context(), "act", "base")))
	tried := false
	ctx := withHook(t.Context(), func(step string) error {
		if step != "store: commit: intended" {
			return nil
		}
		tried = true
		short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		wants(t, second(vb.Mounts(short, "act")), context.DeadlineExceeded)
		wants(t, vb.Commit(short, "other", "act"), context.DeadlineExceeded)
		wants(t, vb.Remove(short, "act"), context.DeadlineExceeded)
		wants(t, second(vb.Prepare(short, "done", "")), context.DeadlineExceeded)
		c := open(t, root) // and recovery leaves it alone
		must(t, c.Close())
		return nil
	})
	must(t, va.Commit(ctx, "done", "act"))
	if !tried {
		t.Fatal("the hook was not called")
	}
	wants(t, second(vb.Mounts(t.Context(), "act")), errdefs.ErrNotFound)
	must(t, a.FinishListings(t.Context()))
	clean(t, b)
}

// TestParentStaysWhileUsed: a parent that is removed while a child is being made
// keeps its bytes until that has failed.
func TestParentStaysWhileUsed(t *testing.T) {
	root := seedStore(t, "native")
	a, b := open(t, root), open(t, root)
	va, vb := view(t, a, "v", "native"), view(t, b, "v", "native")
	ctx := withHook(t.Context(), func(step string) error {
		if step == "store: create: made" {
			must(t, vb.Remove(t.Context(), "base"))
			r, err := b.GC(t.Context())
			must(t, err)
			if len(r.Left) != 1 || r.Layers != 0 {
				t.Errorf("gc while the parent is used: %+v", r)
			}
		}
		return nil
	})
	wants(t, second(va.Prepare(ctx, "x", "base")), errdefs.ErrNotFound)
	r, err := b.GC(t.Context())
	must(t, err)
	if r.Layers != 1 {
		t.Errorf("gc after: %+v", r)
	}
	clean(t, a)
}
