package drivertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

var parallelCases = []testCase{
	{"many IDs at once", manyAtOnce},
	{"mounts, usage and diff of one ID at once", overlapping},
	{"calls with a cancelled context", cancelledCalls},
	{"a context that ends during a call", cancelledDuring},
}

// manyAtOnce takes many layers through their whole life at the same time.
func manyAtOnce(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		w := &work{TB: k, dir: dir}
		for i := range 50 {
			w.file(fmt.Sprintf("d%d/f", i), itoa(i))
		}
	})
	want := k.tree(base)
	errs := make(chan error)
	const workers, lives = 8, 3
	for n := range workers {
		first := k.next + drivers.ID(n*lives)
		dir := k.dir()
		go func() { errs <- lives3(k, base, first, lives, dir) }()
	}
	k.next += workers * lives
	for range workers {
		if err := <-errs; err != nil {
			k.Error(err)
		}
	}
	if ids := k.ids(); len(ids) != 1 && !k.Failed() {
		k.Errorf("IDs() %v, want the parent alone", ids)
	}
	k.same("the parent of them all", k.tree(base), want)
}

// lives3 makes, changes, commits, diffs and removes layers, one after another.
func lives3(k *kit, base drivers.Ref, first drivers.ID, n int, dir string) error {
	for i := range n {
		r := drivers.Ref{ID: first + drivers.ID(i) + 1, Parents: append([]drivers.ID{base.ID}, base.Parents...)}
		if err := life(k, base, r, dir); err != nil {
			return fmt.Errorf("life of %s: %w", r.ID, err)
		}
	}
	return nil
}

func life(k *kit, base, r drivers.Ref, dir string) error {
	d, ctx := k.driver, k.ctx
	if err := d.Create(ctx, r, drivers.CreateOptions{Volatile: true}); err != nil {
		return err
	}
	ms, err := d.Mounts(ctx, r, drivers.MountOptions{})
	if err != nil {
		return err
	}
	if err := mount.All(ctx, ms, dir); err != nil {
		return err
	}
	err = os.WriteFile(dir+"/own", []byte(r.ID.String()), 0o644)
	// A process that another goroutine is just starting has our descriptors until its exec.
	gone := mount.UnmountOptions{Wait: 10 * time.Second}
	if err := errors.Join(err, os.Remove(dir+"/d7/f"), mount.Unmount(dir, gone)); err != nil {
		return err
	}
	if _, err := d.Commit(ctx, r, drivers.CommitOptions{Volatile: r.ID%2 == 0}); err != nil {
		return err
	}
	if err := lifeChanges(k, base, r); err != nil {
		return err
	}
	return d.Remove(ctx, r.ID)
}

// lifeChanges checks that the changes of a life are its own.
func lifeChanges(k *kit, base, r drivers.Ref) error {
	differ, ok := k.driver.(drivers.Differ)
	if !ok {
		return nil
	}
	c, err := Collect(k.ctx, differ.Diff(k.ctx, base, r))
	if err != nil {
		return err
	}
	want := []string{"C . (time)", "C d7 (time)", "D d7/f", "A own"}
	if d := difference(c.Lines, want); d != "" {
		return fmt.Errorf("its changes (- wanted, + got):\n%s", d)
	}
	return nil
}

// overlapping calls what the contract lets overlap on one ID.
func overlapping(k *kit) {
	refs := k.three()
	var wg sync.WaitGroup
	for range 4 {
		for _, r := range refs {
			wg.Go(func() {
				for range 5 {
					if _, err := k.driver.Mounts(k.ctx, r, drivers.MountOptions{}); err != nil {
						k.Error(err)
					}
					if _, err := k.driver.Usage(k.ctx, r); err != nil {
						k.Error(err)
					}
					if d, ok := k.driver.(drivers.Differ); ok {
						if err := lastError(d.Diff(k.ctx, drivers.Ref{}, r)); err != nil {
							k.Error(err)
						}
					}
				}
			})
		}
	}
	wg.Wait()
}

// cancelledOrDone accepts both outcomes of a call whose context has ended.
func (k *kit) cancelledOrDone(what string, err error) {
	k.Helper()
	if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		k.Errorf("%s: %v, want the context's error", what, err)
	}
}

func cancelledCalls(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/f", []byte("x"), 0o644)) })
	want := k.tree(base)
	ctx := k.cancelled()
	r := k.ref(base)
	k.cancelledOrDone("create", k.driver.Create(ctx, r, drivers.CreateOptions{}))
	k.check(k.driver.Remove(k.ctx, r.ID))
	writable := k.create(base, drivers.CreateOptions{})
	_, err := k.driver.Mounts(ctx, writable, drivers.MountOptions{})
	k.cancelledOrDone("mounts", err)
	_, err = k.driver.Usage(ctx, writable)
	k.cancelledOrDone("usage", err)
	if d, ok := k.driver.(drivers.Differ); ok {
		k.cancelledOrDone("diff", lastError(d.Diff(ctx, drivers.Ref{}, base)))
	}
	if _, err = k.driver.Commit(ctx, writable, drivers.CommitOptions{}); err != nil {
		k.cancelledOrDone("commit", err)
		k.commit(writable)
	}
	k.cancelledOrDone("remove", k.driver.Remove(ctx, writable.ID))
	k.check(k.driver.Remove(k.ctx, writable.ID))
	for id, err := range k.driver.IDs(ctx) {
		if err != nil {
			k.cancelledOrDone("ids", err)
		} else if id != base.ID {
			k.Errorf("IDs() has %s", id)
		}
	}
	k.same("the parent", k.tree(base), want)
}

// cancelledDuring ends the context at many moments of a long Apply and Create.
func cancelledDuring(k *kit) {
	base := k.layer(drivers.Ref{}, func(dir string) {
		w := &work{TB: k, dir: dir}
		for i := range 300 {
			w.file(fmt.Sprintf("d%d/f%d", i%20, i), itoa(i))
		}
	})
	tar := k.walkDiff(drivers.Ref{}, base).Tar
	want := k.tree(base)
	for after := 100 * time.Microsecond; after < 50*time.Millisecond; after *= 3 {
		r := k.ref(base)
		ctx, cancel := context.WithTimeout(k.ctx, after)
		err := k.driver.Create(ctx, r, drivers.CreateOptions{})
		k.cancelledOrDone("create", err)
		if err == nil {
			k.same("a child made in time", k.tree(r), want)
		}
		k.check(k.driver.Remove(k.ctx, r.ID))
		cancel()
		k.cancelledApply(tar, after)
	}
	k.same("the parent", k.tree(base), want)
}

func (k *kit) cancelledApply(tar []byte, after time.Duration) {
	k.Helper()
	a, ok := k.driver.(drivers.Applier)
	if !ok {
		return
	}
	r := k.create(drivers.Ref{}, drivers.CreateOptions{})
	ctx, cancel := context.WithTimeout(k.ctx, after)
	defer cancel()
	k.cancelledOrDone("apply", a.Apply(ctx, r, newReader(tar), layer.ApplyOptions{}))
	k.check(k.driver.Remove(k.ctx, r.ID))
}
