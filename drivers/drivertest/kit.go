package drivertest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/mount"
)

// kit is what a case works with: a driver on a root of its own, directories
// beside it, and helpers that end the test on an error. For one goroutine.
type kit struct {
	*testing.T
	fs     *fsys
	ctx    context.Context
	driver drivers.Driver
	caps   drivers.Capabilities
	root   string   // the driver's
	beside string   // a directory of the same file system
	mounts []string // targets, newest last
	*counts
}

// counts are shared by all kits of a case.
type counts struct {
	next drivers.ID // the last ID that was given out
	dirs int
}

func newKit(t *testing.T, f *fsys) *kit {
	t.Helper()
	dir, err := os.MkdirTemp(f.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	// The driver's root has a short name: paths of many lowers share one page.
	k := &kit{T: t, fs: f, ctx: t.Context(), root: dir + "/r", beside: dir + "/b", counts: new(counts)}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	// Other users come by: an id-mapped mount is written to by a mapped one.
	k.check(errors.Join(os.Chmod(dir, 0o755), os.Mkdir(k.beside, 0o755)))
	k.driver = k.open(k.root)
	k.caps = k.driver.Capabilities()
	t.Cleanup(k.clean)
	return k
}

// open opens a driver at root.
func (k *kit) open(root string) drivers.Driver {
	k.Helper()
	d, err := k.fs.cfg.Factory.Open(context.WithoutCancel(k.ctx), drivers.Config{Root: root, Options: k.fs.cfg.Options})
	if err != nil {
		k.Fatalf("open %s: %v", root, err)
	}
	return d
}

// clean unmounts and removes what the case left, and checks that the driver
// then has nothing and lets go of everything.
func (k *kit) clean() {
	for len(k.mounts) > 0 {
		k.umount(k.mounts[len(k.mounts)-1])
	}
	for _, id := range slices.Backward(k.ids()) {
		if err := k.removeSoon(id); err != nil {
			k.Errorf("after the case: remove %s: %v", id, err)
		}
	}
	if left := k.ids(); len(left) > 0 && !k.Failed() {
		k.Errorf("IDs() after everything was removed: %v", left)
	}
	if err := k.driver.Close(); err != nil {
		k.Errorf("close: %v", err)
	}
}

// sub runs a counted subtest with a kit of its own on the same driver.
func (k *kit) sub(name string, f func(k *kit)) {
	k.fs.count.run(k.T, name, func(t *testing.T) {
		inner := *k
		inner.T, inner.ctx, inner.mounts = t, t.Context(), nil
		t.Cleanup(func() {
			for len(inner.mounts) > 0 {
				inner.umount(inner.mounts[len(inner.mounts)-1])
			}
		})
		f(&inner)
	})
}

// check ends the test on an error.
func (k *kit) check(err error) {
	k.Helper()
	if err != nil {
		k.Fatal(err)
	}
}

// wants ends the test unless err wraps the sentinel want.
func (k *kit) wants(what string, err, want error) {
	k.Helper()
	if !errors.Is(err, want) {
		k.Fatalf("%s: %v, want an error that wraps %v", what, err, want)
	}
}

// dir makes a directory beside the driver's root.
func (k *kit) dir() string {
	k.Helper()
	k.dirs++
	d := filepath.Join(k.beside, itoa(k.dirs))
	k.check(os.Mkdir(d, 0o755))
	return d
}

// ref names a new layer on top of parent; the zero Ref is none.
func (k *kit) ref(parent drivers.Ref) drivers.Ref {
	k.next++
	r := drivers.Ref{ID: k.next}
	if parent.ID != 0 {
		r.Parents = append([]drivers.ID{parent.ID}, parent.Parents...)
	}
	return r
}

// create makes a new layer on top of parent.
func (k *kit) create(parent drivers.Ref, o drivers.CreateOptions) drivers.Ref {
	k.Helper()
	r := k.ref(parent)
	k.check(k.driver.Create(k.ctx, r, o))
	return r
}

// mountsOf is Driver.Mounts.
func (k *kit) mountsOf(r drivers.Ref, o drivers.MountOptions) []mount.Mount {
	k.Helper()
	ms, err := k.driver.Mounts(k.ctx, r, o)
	k.check(err)
	return ms
}

// mount mounts a layer until umount or the end of the test.
func (k *kit) mount(r drivers.Ref, o drivers.MountOptions) string {
	k.Helper()
	ms := k.mountsOf(r, o)
	target := k.dir()
	if err := mount.All(k.ctx, ms, target); err != nil {
		k.Fatalf("mount %s by %v: %v", r.ID, ms, err)
	}
	k.mounts = append(k.mounts, target)
	return target
}

// umount waits for a while: a process that another test starts at this moment has
// this one's descriptors until it execs.
func (k *kit) umount(target string) {
	k.Helper()
	k.mounts = slices.DeleteFunc(k.mounts, func(m string) bool { return m == target })
	if err := mount.Unmount(target, mount.UnmountOptions{Wait: 10 * time.Second}); err != nil {
		k.Errorf("unmount: %v", err)
		_ = mount.Unmount(target, mount.UnmountOptions{Lazy: true})
	}
}

// edit changes a writable layer through a mount.
func (k *kit) edit(r drivers.Ref, change func(dir string)) {
	k.Helper()
	dir := k.mount(r, drivers.MountOptions{})
	change(dir)
	k.umount(dir)
}

// commit freezes a layer.
func (k *kit) commit(r drivers.Ref) drivers.Usage {
	k.Helper()
	u, err := k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	k.check(err)
	return u
}

// layer makes a committed layer on top of parent.
func (k *kit) layer(parent drivers.Ref, change func(dir string)) drivers.Ref {
	k.Helper()
	r := k.create(parent, drivers.CreateOptions{})
	k.edit(r, change)
	k.commit(r)
	return r
}

// tree lists what a layer shows, through a read-only mount.
func (k *kit) tree(r drivers.Ref) []string {
	k.Helper()
	dir := k.mount(r, drivers.MountOptions{ReadOnly: true})
	defer k.umount(dir)
	return k.list(dir)
}

// list lists a directory tree.
func (k *kit) list(dir string) []string {
	k.Helper()
	lines, err := list(dir)
	k.check(err)
	return lines
}

// same compares two listings and ends the test with the lines that differ.
func (k *kit) same(what string, got, want []string) {
	k.Helper()
	if d := difference(got, want); d != "" {
		k.Fatalf("%s (- wanted, + got):\n%s", what, d)
	}
}

// ids is the sorted list of Driver.IDs.
func (k *kit) ids() []drivers.ID {
	k.Helper()
	var ids []drivers.ID
	for id, err := range k.driver.IDs(context.WithoutCancel(k.ctx)) {
		if err != nil {
			k.Errorf("ids: %v", err)
			break
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// sentinels are what the contract's errors may wrap.
var sentinels = []error{
	errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrPermissionDenied,
	errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrNotImplemented, errdefs.ErrInternal,
	errdefs.ErrUnavailable, errdefs.ErrDataLoss, errdefs.ErrAborted, errdefs.ErrOutOfRange, context.Canceled, context.DeadlineExceeded,
}
