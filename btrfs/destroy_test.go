package btrfs

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// deepSubvolumes makes a subvolume that no path of 4096 bytes reaches, and a
// read-only one in it, as any user may who can write to the layer.
func deepSubvolumes(h *history, tree string) {
	h.Helper()
	dir, err := sys.OpenDir(tree)
	h.must(err)
	enter := func(name string) {
		next, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		h.must(err)
		dir.Close()
		dir = next
	}
	for range 30 {
		name := strings.Repeat("n", 200)
		h.must(dir.Mkdir(name, 0o755))
		enter(name)
	}
	for _, name := range []string{"deep", "deeper"} {
		h.must(ioctl.Create(dir, name))
		enter(name)
	}
	h.must(ioctl.SetReadOnly(dir, true))
	dir.Close()
}

// A layer with a subvolume where no path reaches could be neither committed, and
// nothing said why, nor ever removed.
func TestNestedSubvolumeBeyondEveryPath(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	deepSubvolumes(h, tree)
	_, err := h.d.Commit(h.ctx, r, drivers.CommitOptions{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "too long to be told") {
		t.Errorf("commit: %v, want ErrFailedPrecondition", err)
	}
	h.must(h.d.Remove(h.ctx, r.ID))
	if ids := slices.Collect(idsOf(h)); len(ids) > 0 {
		t.Errorf("left: %v", ids)
	}
}

// sending has the kernel send a subvolume until release is called.
func sending(h *history, path string) (release func()) {
	h.Helper()
	root, err := sys.OpenDir(path)
	h.must(err)
	r, w, err := os.Pipe()
	h.must(err)
	done := make(chan error)
	go func() { done <- ioctl.Send(root, sys.NewFd(int(w.Fd()), "pipe"), 0, false) }()
	_, err = r.Read(make([]byte, 10))
	h.must(err)
	return func() {
		r.Close()
		if err := <-done; err == nil {
			h.Error("the stream fitted the pipe")
		}
		w.Close()
		root.Close()
	}
}

// While somebody runs btrfs send on a layer, it is in use, and not forbidden.
func TestRemoveWhileTheLayerIsSent(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/f", noise(1, 4<<20), 0o644))
	h.commit(r)
	release := sending(h, h.d.treePath(r.ID, committed))
	err := h.d.Remove(h.ctx, r.ID)
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v, want ErrFailedPrecondition", err)
	}
	if ids := slices.Collect(idsOf(h)); !slices.Contains(ids, r.ID) {
		t.Error("the layer is not listed any more")
	}
	release()
	h.must(h.d.Remove(h.ctx, r.ID))
}

// A snapshot that somebody keeps beside a layer's subvolume is his.
func TestRemoveLeavesWhatIsNotOurs(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/f", []byte("x"), 0o644))
	home := h.d.root + "/l/" + r.ID.String()
	dir, err := sys.OpenDir(home)
	h.must(err)
	defer dir.Close()
	fs, err := sys.OpenDir(tree)
	h.must(err)
	h.must(ioctl.Snapshot(fs, dir, "backup", false))
	fs.Close()
	err = h.d.Remove(h.ctx, r.ID)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("%v, want ErrFailedPrecondition that names it", err)
	}
	for _, p := range []string{tree + "/f", home + "/backup/f"} {
		if _, err := os.Stat(p); err != nil {
			t.Error(err)
		}
	}
	if err := h.d.Inspect(h.ctx, r.ID); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("inspect: %v, want ErrFailedPrecondition that names it", err)
	}
	h.must(os.Rename(home+"/backup", h.d.root+"/../backup"))
	h.must(h.d.Inspect(h.ctx, r.ID))
	h.must(h.d.Remove(h.ctx, r.ID))
}

// The qgroup that simple quotas kept of somebody's deleted subvolume is none of
// ours.
func TestQgroupsThatAreNotOursStay(t *testing.T) {
	withQuota(t, func(h *history, mode ioctl.QuotaMode) {
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		h.must(ioctl.Create(root, "his"))
		h.must(writeSynced(h.d.root+"/his/f", 1<<20))
		his, err := root.Openat("his", sys.O_RDONLY|sys.O_DIRECTORY, 0)
		h.must(err)
		number, err := ioctl.SubvolID(his)
		h.must(errors.Join(err, ioctl.Snapshot(his, root, "copy", true), his.Close(), ioctl.Destroy(root, "his")))
		h.must(h.d.WaitFreed(h.ctx))
		h.must(ioctl.Destroy(root, "copy"))
		r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		h.must(writeSynced(tree+"/f", 1<<20))
		h.must(h.d.Remove(h.ctx, r.ID))
		h.must(h.d.WaitFreed(h.ctx))
		if _, err := ioctl.Qgroup(root, number); mode == ioctl.QuotaSimple && err != nil {
			h.Errorf("qgroup 0/%d: %v", number, err)
		}
		ents, err := os.ReadDir(h.d.root + "/" + roots.Deleted)
		if err != nil || len(ents) > 0 {
			h.Errorf("left: %v, %v", ents, err)
		}
	})
}

// Usage said next to nothing of a layer of which somebody had a snapshot: nothing
// of it was exclusive.
func TestUsageByQuotaOfALayerThatSomebodySnapshotted(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		h.must(writeSynced(tree+"/f", 4<<20))
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		fs, err := sys.OpenDir(tree)
		h.must(err)
		h.must(ioctl.Snapshot(fs, root, "his", true))
		fs.Close()
		h.must(h.d.SyncUsage(h.ctx))
		if u, err := h.d.Usage(h.ctx, r); err != nil || u.Bytes < 4<<20 || u.Bytes > 5<<20 {
			h.Errorf("%+v, %v; want a bit over 4 MiB", u, err)
		}
		h.must(errors.Join(ioctl.Destroy(root, "his"), h.d.Remove(h.ctx, r.ID)))
	})
}

// afterCut mounts what a power cut at this moment would leave of a file system, and
// returns what is in a directory of it.
func afterCut(h *history, fs, dir string) []string {
	h.Helper()
	scratch := testenv.Scratch(h.T)
	image, at := scratch+"/image", scratch+"/m"
	out, err := exec.Command("cp", "--sparse=always", testenv.Image(fs), image).CombinedOutput()
	if err != nil {
		h.Fatalf("%v: %s", err, out)
	}
	h.must(os.Mkdir(at, 0o755))
	loop, err := sys.AttachLoop(image, sys.LoopOptions{Autoclear: true})
	h.must(err)
	defer loop.Close()
	err = sys.Mount(loop.Name(), at, "btrfs", 0, "")
	if errors.Is(err, syscall.EEXIST) {
		testenv.Optional(h.T, "kernels before 6.7 mount no copy of a btrfs beside it")
	}
	h.must(err)
	ents, err := os.ReadDir(at + "/" + dir)
	h.must(errors.Join(err, sys.Umount(at, 0)))
	testenv.CheckBtrfs(h.T, image)
	var names []string
	for _, e := range ents {
		names = append(names, e.Name())
	}
	return names
}

// A layer that was removed does not come back; one of which nothing was flushed
// does.
func TestRemoveSurvivesAPowerCut(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "btrfs", testenv.Size(256<<20), testenv.MountOptions("commit=300"))
	h := newHistory(t, fs+"/r")
	base := h.script(drivers.Ref{}, "echo 1 >f")
	for range 3 {
		child := h.script(base, "echo 2 >f; mkdir d; echo 3 >d/g")
		h.must(h.d.SyncUsage(h.ctx))
		layers, err := h.d.open(roots.Layers)
		h.must(err)
		h.must(h.d.destroyer(h.ctx).layer(layers, child.ID.String()))
		layers.Close()
		if names := afterCut(h, fs, "r/l"); !slices.Contains(names, child.ID.String()) {
			t.Errorf("deleted and not flushed: %v, want %s to be there: this test sees no power cut", names, child.ID)
		}
		child = h.script(base, "echo 2 >f; mkdir d; echo 3 >d/g")
		h.must(h.d.SyncUsage(h.ctx))
		h.must(h.d.Remove(h.ctx, child.ID))
		for _, dir := range []string{"r/l", "r/del"} {
			if names := afterCut(h, fs, dir); slices.Contains(names, child.ID.String()) {
				t.Errorf("removed, and after the cut in %s: %v", dir, names)
			}
		}
	}
}
