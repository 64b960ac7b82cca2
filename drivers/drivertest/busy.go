package drivertest

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/mount"
)

var busyCases = []testCase{
	{"remove of a mounted layer", removeMounted},
	{"remove after a lazy unmount with a process inside", removeLazy},
	{"remove while another namespace has it mounted", removeElsewhere},
	{"commit of a mounted layer", commitMounted},
	{"commit of a layer mounted read-only", commitMountedReadOnly},
	{"commit after a lazy unmount with a process inside", commitLazy},
	{"commit while another namespace has it mounted", commitElsewhere},
	{"a writer that is alive after the commit", lateWriter},
}

// sleeper is a process that waits until it is told to end: cat on a pipe.
type sleeper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
}

// sleep starts a process in dir; ownNamespace gives it a copy of our mounts, of
// which it keeps what we unmount.
func (k *kit) sleep(dir string, ownNamespace bool) *sleeper {
	k.Helper()
	cmd := exec.Command("cat")
	cmd.Dir = dir
	if ownNamespace {
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	}
	in, err := cmd.StdinPipe()
	k.check(err)
	out, err := cmd.StdoutPipe()
	k.check(err)
	k.check(cmd.Start())
	s := &sleeper{cmd, in}
	k.Cleanup(s.end)
	// an answer says that it runs, with its namespace and directory
	_, err = io.WriteString(in, "?")
	k.check(err)
	_, err = io.ReadFull(out, make([]byte, 1))
	k.check(err)
	return s
}

// end ends the process. Idempotent.
func (s *sleeper) end() {
	if s.cmd.ProcessState == nil {
		s.in.Close()
		_ = s.cmd.Wait()
	}
}

// dirty makes a writable layer over a parent, mounted, with a file in it.
func (k *kit) dirty() (base, r drivers.Ref, dir string) {
	k.Helper()
	base = k.layer(drivers.Ref{}, func(dir string) { k.check(os.WriteFile(dir+"/base", []byte("base"), 0o644)) })
	r = k.create(base, drivers.CreateOptions{})
	dir = k.mount(r, drivers.MountOptions{})
	k.check(os.WriteFile(dir+"/f", []byte("before"), 0o644))
	return base, r, dir
}

func removeMounted(k *kit) {
	_, r, dir := k.dirty()
	k.wants("remove of a mounted layer", k.driver.Remove(k.ctx, r.ID), errdefs.ErrFailedPrecondition)
	teller, tells := k.driver.(drivers.UseTeller)
	if tells {
		k.wants("a mounted layer is in use", teller.InUse(k.ctx, r.ID), errdefs.ErrFailedPrecondition)
	}
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != "before" {
		k.Errorf("after the refusal: %q, %v", b, err)
	}
	if !slices.Contains(k.ids(), r.ID) {
		k.Error("after the refusal IDs() has it not")
	}
	view := k.create(drivers.Ref{}, drivers.CreateOptions{ReadOnly: true})
	vdir := k.mount(view, drivers.MountOptions{})
	k.wants("remove of a mounted view", k.driver.Remove(k.ctx, view.ID), errdefs.ErrFailedPrecondition)
	k.umount(vdir)
	k.umount(dir)
	if tells {
		k.check(teller.InUse(k.ctx, r.ID))
	}
	k.check(k.driver.Remove(k.ctx, r.ID))
	k.check(k.driver.Remove(k.ctx, view.ID))
}

// gone checks that a removal either worked or was refused as busy, that it
// works when whoever used the layer has gone, and that the parent is whole.
func (k *kit) gone(base, r drivers.Ref, first error, user *sleeper) {
	k.Helper()
	if first != nil {
		k.wants("remove", first, errdefs.ErrFailedPrecondition)
	}
	user.end()
	k.check(k.removeSoon(r.ID))
	if slices.Contains(k.ids(), r.ID) {
		k.Errorf("IDs() still has %s", r.ID)
	}
	dir := k.mount(base, drivers.MountOptions{})
	if b, err := os.ReadFile(dir + "/base"); err != nil || string(b) != "base" {
		k.Errorf("the parent afterwards: %q, %v", b, err)
	}
}

// removeSoon removes a layer whose last user is just ending: the kernel takes its
// mounts down after the process has been waited for.
func (k *kit) removeSoon(id drivers.ID) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := k.driver.Remove(context.WithoutCancel(k.ctx), id)
		if !errdefs.IsFailedPrecondition(err) || time.Now().After(end) {
			return err
		}
	}
}

func (k *kit) lazy(dir string) {
	k.Helper()
	k.mounts = slices.DeleteFunc(k.mounts, func(m string) bool { return m == dir })
	k.check(mount.Unmount(dir, mount.UnmountOptions{Lazy: true}))
}

func removeLazy(k *kit) {
	base, r, dir := k.dirty()
	inside := k.sleep(dir, false)
	k.lazy(dir)
	k.gone(base, r, k.driver.Remove(k.ctx, r.ID), inside)
}

func removeElsewhere(k *kit) {
	base, r, dir := k.dirty()
	elsewhere := k.sleep("/", true)
	k.umount(dir)
	k.gone(base, r, k.driver.Remove(k.ctx, r.ID), elsewhere)
}

// commitMounted: a layer that our namespace shows mounted for writing is
// refused by a driver whose commit a later write would reach.
func commitMounted(k *kit) {
	_, r, dir := k.dirty()
	_, err := k.driver.Commit(k.ctx, r, drivers.CommitOptions{})
	if k.caps.SharedWriter {
		k.wants("commit of a layer mounted for writing", err, errdefs.ErrFailedPrecondition)
		k.check(os.WriteFile(dir+"/f", []byte("still writable"), 0o644))
		k.umount(dir)
		k.commit(r)
		k.wantFile(r, "still writable")
		return
	}
	k.check(err)
	k.check(os.WriteFile(dir+"/f", []byte("after"), 0o644))
	k.umount(dir)
	k.wantFile(r, "before")
}

// wantFile checks the file f of a layer.
func (k *kit) wantFile(r drivers.Ref, want string) {
	k.Helper()
	dir := k.mount(r, drivers.MountOptions{ReadOnly: true})
	defer k.umount(dir)
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != want {
		k.Errorf("f: %q, %v; want %q", b, err, want)
	}
}

func commitMountedReadOnly(k *kit) {
	_, r, dir := k.dirty()
	k.umount(dir)
	dir = k.mount(r, drivers.MountOptions{ReadOnly: true})
	k.commit(r)
	k.umount(dir)
	k.wantFile(r, "before")
}

func commitLazy(k *kit) {
	base, r, dir := k.dirty()
	k.sleep(dir, false)
	k.lazy(dir)
	k.commit(r)
	k.wantFile(r, "before")
	k.diffIsExact(base, r)
}

func commitElsewhere(k *kit) {
	base, r, dir := k.dirty()
	k.sleep("/", true)
	k.umount(dir)
	k.commit(r)
	k.wantFile(r, "before")
	k.diffIsExact(base, r)
}

// lateWriter shows which of the two a driver is: one whose committed layer a
// file that is still open reaches (SharedWriter), or one whose is out of reach.
func lateWriter(k *kit) {
	_, r, dir := k.dirty()
	f, err := os.OpenFile(dir+"/f", os.O_WRONLY, 0)
	k.check(err)
	defer f.Close()
	k.lazy(dir)
	k.commit(r)
	_, err = f.WriteString("after!")
	want := "before"
	if err == nil && k.caps.SharedWriter {
		want = "after!"
	}
	k.check(errors.Join(f.Close()))
	k.wantFile(r, want)
}
