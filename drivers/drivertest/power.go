package drivertest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// The power-cut cases keep a driver on a file system of their own and copy its
// device's backing file while it is in use: what the file system has not written
// by then is missing from the copy, as it is from a disk after a power cut. The
// copy is mounted, which replays the journal, and must hold what was promised.
var powerCases = []testCase{
	{"a commit survives a power cut", commitSurvives},
	{"an applied layer survives a power cut", applySurvives},
	{"a power cut at each step", cutAtEachStep},
	{"a volatile commit says what it is", volatileCommit},
}

// disk is a small file system that is watched.
type disk struct {
	*kit // with a driver on the disk
	dir  string
	kind string
}

// diskOptions has sizes near the least that each mkfs takes. The intervals keep the
// file systems from writing by themselves while a test runs.
var diskOptions = map[string][]testenv.Option{
	"ext4":  {testenv.Size(64 * mib), testenv.MountOptions("commit=300")},
	"xfs":   {testenv.Size(320 * mib)},
	"btrfs": {testenv.Size(128 * mib), testenv.MountOptions("commit=300")},
}

// disk makes the file system and opens the driver there.
func (k *kit) disk() *disk {
	k.Helper()
	options, ok := diskOptions[k.fs.kind]
	if !ok {
		k.Skip("power cuts: " + k.fs.kind + " is on no disk")
	}
	if !k.fs.privileged {
		k.Skip("power cuts: needs root for a file system of its own")
	}
	dir := testenv.FS(k.T, k.fs.kind, options...)
	letThrough(k.T, dir)
	return &disk{kit: k.on(dir), dir: dir, kind: k.fs.kind}
}

// on opens the driver in a directory of another file system, for the rest of
// the test.
func (k *kit) on(dir string) *kit {
	k.Helper()
	other := *k
	other.root, other.mounts = dir+"/r", nil
	other.driver = other.open(other.root)
	k.Cleanup(func() {
		other.unmountAll()
		k.check(other.driver.Close())
	})
	return &other
}

// cut returns a kit on what a power cut at this moment would leave, until
// release or the end of the test.
func (d *disk) cut() (after *kit, release func()) {
	d.Helper()
	scratch := testenv.Scratch(d.T)
	letThrough(d.T, scratch)
	image, dir := scratch+"/image", scratch+"/m"
	d.check(os.Mkdir(dir, 0o755))
	d.check(testenv.CopyImage(d.dir, image))
	loop, err := sys.AttachLoop(image, sys.LoopOptions{Autoclear: true})
	d.check(err)
	defer loop.Close()
	var data string
	if d.kind == "xfs" {
		data = "nouuid" // the original is mounted, too
	}
	err = sys.Mount(loop.Name(), dir, d.kind, 0, data)
	if d.kind == "btrfs" && errors.Is(err, syscall.EEXIST) {
		testenv.Optional(d.T, "kernels before 6.7 mount no copy of a btrfs beside it")
	}
	if err != nil {
		d.Fatalf("the file system after the cut: %v", err)
	}
	inner := *d.kit
	inner.root, inner.mounts, inner.driver = dir+"/r", nil, nil
	release = sync.OnceFunc(func() { inner.dropDisk(dir, image) })
	d.Cleanup(release)
	inner.driver = inner.open(inner.root)
	return &inner, release
}

// dropDisk lets go of what cut made.
func (k *kit) dropDisk(dir, image string) {
	k.unmountAll()
	if k.driver != nil {
		k.check(k.driver.Close())
	}
	k.check(mount.Unmount(dir, mount.UnmountOptions{Wait: 10 * time.Second})) // a server may just be going away
	if k.fs.kind == "btrfs" {
		testenv.CheckBtrfs(k.T, image)
	}
	k.check(os.Remove(image))
}

func (k *kit) unmountAll() {
	for len(k.mounts) > 0 {
		k.umount(k.mounts[len(k.mounts)-1])
	}
}

// rootfs writes what a small layer holds, and lets nothing of it be flushed.
func rootfs(k *kit, dir, mark string) {
	w := &work{TB: k, dir: dir}
	for i := range 40 {
		w.file("usr/lib/"+mark+itoa(i), mark+string(make([]byte, 3000)))
	}
	w.file("etc/"+mark, mark)
	w.link("etc/"+mark, "etc/"+mark+"-link")
	w.file("etc/shared", mark)
	w.symlink(mark, "etc/"+mark+"-symlink")
	w.xattr("etc/"+mark, "user.mark", mark)
}

func commitSurvives(k *kit) {
	d := k.disk()
	var below drivers.Ref
	trees := map[drivers.ID][]string{}
	var refs []drivers.Ref
	for _, mark := range []string{"one", "two", "three"} {
		r := d.create(below, drivers.CreateOptions{})
		d.edit(r, func(dir string) { rootfs(k, dir, mark) })
		trees[r.ID] = d.tree(r)
		d.commit(r)
		refs, below = append(refs, r), r
		after, release := d.cut()
		for _, r := range refs {
			after.same("layer "+r.ID.String()+" after the cut", after.tree(r), trees[r.ID])
		}
		_, err := after.driver.Commit(k.ctx, r, drivers.CommitOptions{})
		if err == nil {
			k.Error("after the cut the layer could be committed: it was not")
		}
		release()
	}
}

func applySurvives(k *kit) {
	d := k.disk()
	source := k.layer(drivers.Ref{}, func(dir string) { rootfs(k, dir, "one") })
	tar, want := k.walkDiff(drivers.Ref{}, source).Tar, k.tree(source)
	r := d.create(drivers.Ref{}, drivers.CreateOptions{})
	if a, ok := d.driver.(drivers.Applier); ok {
		k.check(a.Apply(k.ctx, r, bytes.NewReader(tar), layer.ApplyOptions{}))
	} else {
		d.edit(r, func(dir string) { k.check(layer.Apply(k.ctx, dir, bytes.NewReader(tar), layer.ApplyOptions{})) })
	}
	d.commit(r)
	after, release := d.cut()
	defer release()
	after.same("the layer after the cut", after.tree(r), want)
}

// cutAtEachStep cuts the power at each step of Create, Commit and Remove. The
// layers below are whole afterwards; the layer itself is whole if it says that
// it is committed, and can be removed in any case.
func cutAtEachStep(k *kit) {
	d := k.disk()
	base := d.create(drivers.Ref{}, drivers.CreateOptions{})
	d.flushAnother()
	_, release := d.cut() // which opens the driver
	release()
	d.edit(base, func(dir string) { rootfs(k, dir, "one") })
	baseTree := d.tree(base)
	d.commit(base)
	r := d.ref(base)
	steps := 0
	var tree []string // of r once it is made
	check := func(step string) error {
		steps++
		after, release := d.cut()
		defer release()
		after.same(step+": the parent", after.tree(base), baseTree)
		after.wholeOrNot(step, r, tree)
		after.check(after.driver.Remove(k.ctx, r.ID))
		if slices.Contains(after.ids(), r.ID) {
			k.Errorf("%s: IDs() has %s after its removal", step, r.ID)
		}
		return nil
	}
	ctx := faults.With(k.ctx, check)
	k.check(d.driver.Create(ctx, r, drivers.CreateOptions{}))
	d.edit(r, func(dir string) { rootfs(k, dir, "two") })
	tree = d.tree(r)
	_, err := d.driver.Commit(ctx, r, drivers.CommitOptions{})
	k.check(err)
	k.check(check("committed"))
	k.check(d.driver.Remove(ctx, r.ID))
	k.check(check("removed"))
	if steps == 2 {
		k.Skip("the driver names no steps")
	}
}

// flushAnother flushes a file that is not the driver's, as the store does with its
// records: the journal takes the driver's names with it, and not what is in its files.
func (d *disk) flushAnother() {
	d.Helper()
	f, err := os.Create(d.dir + "/records")
	d.check(err)
	defer f.Close()
	d.check(f.Sync())
}

// wholeOrNot checks a layer that may or may not have been committed: if it says
// that it was, by refusing to be committed again, it must be whole.
func (k *kit) wholeOrNot(step string, r drivers.Ref, tree []string) {
	k.Helper()
	if !slices.Contains(k.ids(), r.ID) {
		return
	}
	ms, err := k.driver.Mounts(context.WithoutCancel(k.ctx), r, drivers.MountOptions{})
	if err != nil || !slices.ContainsFunc(ms, func(m mount.Mount) bool { return slices.Contains(m.Options, "ro") }) {
		return // half-made or writable
	}
	k.same(step+": the layer that says it is committed", k.tree(r), tree)
}

// volatileCommit is the counter-check of these cases: what was never flushed is
// not there after the cut, or else they see nothing. The layer is lost, whole or
// in part; what counts is that it can be removed.
func volatileCommit(k *kit) {
	d := k.disk()
	base := d.create(drivers.Ref{}, drivers.CreateOptions{})
	d.edit(base, func(dir string) { rootfs(k, dir, "one") })
	baseTree := d.tree(base)
	d.commit(base)
	r := d.create(base, drivers.CreateOptions{Volatile: true})
	dir := d.mount(r, drivers.MountOptions{Volatile: true}) // else the unmounting flushes
	rootfs(k, dir, "two")
	d.umount(dir)
	tree := d.tree(r)
	_, err := d.driver.Commit(k.ctx, r, drivers.CommitOptions{Volatile: true})
	k.check(err)
	d.same("before the cut", d.tree(r), tree)
	after, release := d.cut()
	defer release()
	after.same("the durable layer below", after.tree(base), baseTree)
	if slices.Contains(after.ids(), r.ID) && d.kind == "ext4" && !k.fs.cfg.Flushes {
		if ms, err := after.driver.Mounts(k.ctx, r, drivers.MountOptions{}); err == nil && after.survived(ms, tree) {
			k.Error("what was never flushed is there after the cut: these cases see no power cut")
		}
	}
	after.check(after.driver.Remove(k.ctx, r.ID))
}

// survived reports whether mounts show a tree.
func (k *kit) survived(ms []mount.Mount, tree []string) bool {
	k.Helper()
	target := k.dir()
	if err := mount.All(k.ctx, ms, target); err != nil {
		return false
	}
	k.mounts = append(k.mounts, target)
	defer k.umount(target)
	got, err := list(target)
	return err == nil && slices.Equal(got, tree)
}
