package overlay

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// btrfs runs a command of the tool, whose package mkfs.btrfs is in.
func (b *bench) btrfs(args ...string) {
	b.Helper()
	if out, err := exec.Command("btrfs", args...).CombinedOutput(); err != nil {
		b.Fatalf("btrfs %q: %v\n%s", args, err, out)
	}
}

func (b *bench) stat(path string) sys.Stat {
	b.Helper()
	st, err := sys.LstatPath(path)
	b.check(err)
	return st
}

// sameNumber makes files in dir, a subvolume, until one has the inode number of
// another file, and gives that one the name f, other bytes and the same time.
func (b *bench) sameNumber(dir string, as sys.Stat) {
	b.Helper()
	for n := 0; ; n++ {
		name := fmt.Sprintf("%s/%d", dir, n)
		b.file(name, "two")
		st := b.stat(name)
		if st.Ino < as.Ino {
			b.check(os.Remove(name))
			continue
		}
		if st.Ino > as.Ino {
			b.Fatalf("no file has the number %d", as.Ino)
		}
		b.check(os.Rename(name, dir+"/f"))
		break
	}
	d, err := sys.OpenDir(dir)
	b.check(err)
	defer d.Close()
	b.check(d.Utimes("f", as.Mtime, as.Mtime))
}

// Two files of one inode number, size and time, one of them in a subvolume, were
// taken for one: the change was not in the diff.
func TestSubvolumeInALayer(t *testing.T) {
	testenv.Root(t)
	b := newBench(t, "btrfs", nil)
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/d/sub/f", "one") })
	one := b.stat(b.fs(base.ID) + "/d/sub/f")
	r := b.create(drivers.Ref{}, drivers.CreateOptions{})
	b.edit(r, func(dir string) {
		b.check(os.Mkdir(dir+"/d", 0o755))
		b.btrfs("subvolume", "create", dir+"/d/sub")
		b.sameNumber(dir+"/d/sub", one)
	})
	refused := func(what string, err error) {
		b.wants(what, err, errdefs.ErrFailedPrecondition, `"d/sub" is a btrfs subvolume`, "btrfs subvolume delete")
	}
	diff := func(from, to drivers.Ref) (err error) {
		for _, err = range b.Diff(b.ctx, from, to) {
		}
		return err
	}
	refused("diff", diff(base, r))
	refused("diff from nothing", diff(drivers.Ref{}, r))
	_, err := b.Commit(b.ctx, r, drivers.CommitOptions{})
	refused("commit", err)
	mapped := b.create(drivers.Ref{}, drivers.CreateOptions{IDMap: hostIDs})
	b.edit(mapped, func(dir string) { b.check(os.Mkdir(dir+"/d", 0o755)); b.btrfs("subvolume", "create", dir+"/d/sub") })
	_, err = b.Commit(b.ctx, mapped, drivers.CommitOptions{})
	b.wants("commit of an id-mapped one", err, errdefs.ErrFailedPrecondition, "d/sub", "btrfs subvolume")
	b.check(b.Remove(b.ctx, mapped.ID))
	u, err := b.Usage(b.ctx, r)
	b.check(err)
	if u.Inodes != 4 {
		t.Errorf("usage: %d inodes, want 4", u.Inodes)
	}
	b.edit(r, func(dir string) { // what the error says
		b.check(exec.Command("cp", "-a", "--reflink", dir+"/d/sub", dir+"/d/new").Run())
		b.btrfs("subvolume", "delete", dir+"/d/sub")
		b.check(os.Rename(dir+"/d/new", dir+"/d/sub"))
	})
	b.commit(r)
	if _, lines := b.tarOf(b.Diff(b.ctx, base, r)); !slices.Contains(lines, "C d/sub/f (content)") {
		t.Errorf("diff: %q", lines)
	}
}

// A subvolume made below an upper by hand, which no overlay lets anybody do.
func TestSubvolumeInAnUpper(t *testing.T) {
	testenv.Root(t)
	b := newBench(t, "btrfs", nil)
	base := b.layer(drivers.Ref{}, func(dir string) { b.file(dir+"/d/f", "x") })
	r := b.create(base, drivers.CreateOptions{})
	b.btrfs("subvolume", "create", b.fs(r.ID)+"/sub")
	for _, err := range b.Diff(b.ctx, base, r) {
		b.wants("diff", err, errdefs.ErrFailedPrecondition, `"sub"`)
	}
	_, err := b.Commit(b.ctx, r, drivers.CommitOptions{})
	b.wants("commit", err, errdefs.ErrFailedPrecondition, `"sub"`)
}

// Subvolumes in subvolumes, deeper than descriptors last, are removed with their
// layer; a read-only one says what it is.
func TestRemoveOfSubvolumes(t *testing.T) {
	testenv.Root(t)
	b := newBench(t, "btrfs", nil)
	r := b.create(drivers.Ref{}, drivers.CreateOptions{})
	b.edit(r, func(dir string) {
		b.btrfs("subvolume", "create", dir+"/sub")
		b.file(dir+"/sub/d/f", "x")
		b.btrfs("subvolume", "create", dir+"/sub/d/inner")
		b.btrfs("subvolume", "snapshot", dir+"/sub", dir+"/snapshot")
		b.btrfs("subvolume", "snapshot", "-r", dir+"/sub", dir+"/frozen")
	})
	deep, err := sys.OpenDir(b.fs(r.ID) + "/sub/d/inner")
	b.check(err)
	for range 3 * openAtRemoval {
		b.check(deep.Mkdir("d", 0o755))
		next, err := deep.Openat("d", sys.O_RDONLY|sys.O_DIRECTORY, 0)
		b.check(err)
		deep.Close()
		deep = next
	}
	deep.Close()
	b.wants("remove", b.Remove(b.ctx, r.ID), errdefs.ErrFailedPrecondition, "frozen", "read-only btrfs subvolume")
	ids := func() (ids []drivers.ID) {
		for id, err := range b.IDs(b.ctx) {
			b.check(err)
			ids = append(ids, id)
		}
		return ids
	}
	if !slices.Contains(ids(), r.ID) {
		t.Error("IDs does not list what is left")
	}
	b.btrfs("subvolume", "delete", b.path(r.ID.String()+delSuffix, fsDir, "frozen"))
	b.check(b.Remove(b.ctx, r.ID))
	if left := ids(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
