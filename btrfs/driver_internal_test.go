package btrfs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

func fixture(t *testing.T, opts ...testenv.Option) *history {
	t.Helper()
	testenv.Leaks(t)
	return newHistory(t, testenv.FS(t, "btrfs", append([]testenv.Option{testenv.Size(256 << 20)}, opts...)...)+"/r")
}

func (h *history) create(parent drivers.Ref, o drivers.CreateOptions) (drivers.Ref, string) {
	h.Helper()
	h.next++
	r := drivers.Ref{ID: h.next}
	if parent.ID != 0 {
		r.Parents = append([]drivers.ID{parent.ID}, parent.Parents...)
	}
	h.must(h.d.Create(h.ctx, r, o))
	return r, h.d.treePath(r.ID, writable)
}

func (h *history) commit(r drivers.Ref) {
	h.Helper()
	_, err := h.d.Commit(h.ctx, r, drivers.CommitOptions{})
	h.must(err)
}

func TestNotOnBtrfs(t *testing.T) {
	dir := testenv.FS(t, "tmpfs")
	_, err := Open(t.Context(), drivers.Config{Root: dir + "/r"})
	if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "tmpfs") {
		t.Errorf("%v, want ErrUnavailable that names tmpfs", err)
	}
	if _, err := os.Stat(dir + "/r"); !os.IsNotExist(err) {
		t.Error("the refusal left a directory")
	}
	if p := Probe(t.Context(), dir); p.Works != kprobe.No || p.Reason == "" {
		t.Errorf("%+v", p)
	}
}

// A subvolume that somebody makes in a layer is not in a snapshot of it: it would
// be lost without a word.
func TestNestedSubvolumes(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.MkdirAll(tree+"/var/lib", 0o755))
	for _, p := range []string{"/var/lib", "/var/lib/deep", "/var/lib/deep/er"} {
		dir, err := sys.OpenDir(tree + p)
		h.must(err)
		name := map[string]string{"/var/lib": "deep", "/var/lib/deep": "er", "/var/lib/deep/er": "x"}[p]
		h.must(ioctl.Create(dir, name))
		dir.Close()
	}
	h.must(os.WriteFile(tree+"/var/lib/deep/er/f", []byte("x"), 0o400))
	_, err := h.d.Commit(h.ctx, r, drivers.CommitOptions{})
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "var/lib/deep") {
		t.Errorf("commit: %v, want ErrFailedPrecondition that names it", err)
	}
	if err := firstOf(h.d.Diff(h.ctx, drivers.Ref{}, r)); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("diff: %v", err)
	}
	if err := h.d.Inspect(h.ctx, r.ID); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "var/lib/deep") {
		t.Errorf("inspect: %v, want ErrFailedPrecondition that names it", err)
	}
	h.must(h.d.Remove(h.ctx, r.ID))
	if ids := slices.Collect(idsOf(h)); len(ids) > 0 {
		t.Errorf("left: %v", ids)
	}
}

// firstOf is the error with which a sequence begins.
func firstOf(changes iter.Seq2[layer.Change, error]) error {
	for _, err := range changes {
		return err
	}
	return nil
}

func idsOf(h *history) func(func(drivers.ID) bool) {
	return func(yield func(drivers.ID) bool) {
		for id, err := range h.d.IDs(h.ctx) {
			h.must(err)
			if !yield(id) {
				return
			}
		}
	}
}

// What a diff of an active layer takes a snapshot for is gone afterwards, and what
// a killed one left goes with the next diff, or with the layer.
func TestSnapshotsOfDiffsAreSwept(t *testing.T) {
	h := fixture(t)
	base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/f", []byte("x"), 0o644))
	h.commit(base)
	r, tree := h.create(base, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/g", []byte("y"), 0o644))
	left := func() []string { return leftOfDiffs(h, r) }
	abandon := func() { // as killed processes leave it
		h.must(os.Mkdir(h.d.root+"/l/"+r.ID.String()+"/diff.early", 0o700))
		h.must(os.Mkdir(h.d.root+"/l/"+r.ID.String()+"/diff.dead", 0o700))
		dir, err := sys.OpenDir(h.d.root + "/l/" + r.ID.String() + "/diff.dead")
		h.must(err)
		defer dir.Close()
		l, err := h.d.layer(r.ID)
		h.must(err)
		defer l.Close()
		fs, err := l.tree()
		h.must(err)
		defer fs.Close()
		h.must(ioctl.Snapshot(fs, dir, "s", true))
	}
	abandon()
	during := 0
	for _, err := range h.d.Diff(h.ctx, base, r) {
		h.must(err)
		if n := left(); len(n) != 1 || n[0] == "diff.dead" || n[0] == "diff.early" {
			t.Errorf("during a diff: %v", n)
		}
		during++
	}
	if n := left(); len(n) > 0 || during == 0 {
		t.Errorf("after the diff of %d changes: %v", during, n)
	}
	abandon()
	h.must(h.d.WaitFreed(h.ctx)) // nobody may ever call for an idle layer
	if n := left(); len(n) > 0 {
		t.Errorf("after waiting for free space: %v", n)
	}
	abandon()
	h.commit(r) // it kept what they share for as long as the layer was there
	if n := left(); len(n) > 0 {
		t.Errorf("after the commit: %v", n)
	}
	abandon()
	h.must(h.d.Remove(h.ctx, r.ID))
	h.must(h.d.Remove(h.ctx, base.ID))
}

// leftOfDiffs lists what diffs have made beside a layer's subvolume.
func leftOfDiffs(h *history, r drivers.Ref) (names []string) {
	h.Helper()
	ents, err := os.ReadDir(h.d.root + "/l/" + r.ID.String())
	h.must(err)
	for _, e := range ents {
		if strings.HasPrefix(e.Name(), diffPrefix) {
			names = append(names, e.Name())
		}
	}
	return names
}

// Sweepers take nothing from diffs at work, and no diff fails for them.
func TestDiffsOfOneLayerAtOnce(t *testing.T) {
	h := fixture(t)
	base := h.script(drivers.Ref{}, "echo 1 >f")
	r, tree := h.create(base, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/g", []byte("y"), 0o644))
	var g errgroup.Group
	for range 4 {
		g.Go(func() error {
			for range 10 {
				var names []string
				for c, err := range h.d.Diff(h.ctx, base, r) {
					if err != nil {
						return err
					}
					names = append(names, c.Entry.Path)
				}
				if !slices.Contains(names, "g") {
					return fmt.Errorf("changes %q, want g", names)
				}
			}
			return nil
		})
	}
	h.must(g.Wait())
	if n := leftOfDiffs(h, r); len(n) > 0 {
		t.Errorf("left: %v", n)
	}
}

// A volatile commit said that the layer held nothing, for good: its data was not
// flushed yet.
func TestUsageOfAVolatileCommit(t *testing.T) {
	h := fixture(t, testenv.MountOptions("commit=300"))
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/f", noise(1, 4<<20), 0o644))
	got, err := h.d.Commit(h.ctx, r, drivers.CommitOptions{Volatile: true})
	if want := (drivers.Usage{Bytes: 4 << 20, Inodes: 2}); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	if kept, err := h.d.Usage(h.ctx, r); err != nil || kept != got {
		t.Errorf("kept: %+v, %v; want %+v", kept, err, got)
	}
}

func TestDiffEndsWithItsContext(t *testing.T) {
	h := fixture(t)
	base, _ := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.commit(base)
	r, tree := h.create(base, drivers.CreateOptions{})
	for i := range 2000 {
		h.must(os.WriteFile(tree+"/"+strings.Repeat("n", 200)+string(rune('a'+i%26))+string(rune('a'+i/26%26))+string(rune('a'+i/676)), nil, 0o644))
	}
	ctx, cancel := context.WithCancel(h.ctx)
	defer cancel()
	var last error
	n := 0
	for _, err := range h.d.Diff(ctx, base, r) {
		if last = err; err == nil {
			cancel()
			n++
		}
	}
	if n == 0 || n == 2000 || !errors.Is(last, context.Canceled) {
		t.Errorf("%d changes, then %v", n, last)
	}
	if err := firstOf(h.d.Diff(ctx, base, r)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
	if names := leftOfDiffs(h, r); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
}

// Somebody with btrfs-progs may delete or make subvolumes behind our back.
func TestSubvolumeDeletedBehindOurBack(t *testing.T) {
	h := fixture(t)
	r, _ := h.create(drivers.Ref{}, drivers.CreateOptions{})
	dir, err := sys.OpenDir(h.d.root + "/l/" + r.ID.String())
	h.must(err)
	h.must(ioctl.Destroy(dir, string(writable)))
	dir.Close()
	if _, err := h.d.Mounts(h.ctx, r, drivers.MountOptions{}); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("mounts: %v, want ErrDataLoss", err)
	}
	h.must(h.d.Remove(h.ctx, r.ID))
	if ids := slices.Collect(idsOf(h)); len(ids) > 0 {
		t.Errorf("left: %v", ids)
	}
}

// A store that was copied file by file, or stands in a snapshot of the subvolume around
// it, has directories where subvolumes were: check found nothing, calls said "invalid
// argument" or "permission denied", or took the layer for an empty one, and no layer
// could be removed.
func TestStoreWithoutItsSubvolumes(t *testing.T) {
	h := fixture(t)
	base := h.script(drivers.Ref{}, "mkdir d; echo 1 >d/f")
	active, _ := h.create(base, drivers.CreateOptions{})
	around := filepath.Dir(h.d.root)
	h.must(exec.Command("cp", "-a", h.d.root, around+"/copy").Run())
	fd, err := sys.OpenDir(around)
	h.must(err)
	defer fd.Close()
	h.must(ioctl.Snapshot(fd, fd, "snapshot", false))
	for _, root := range []string{around + "/copy", around + "/snapshot/r"} {
		c := newHistory(t, root)
		for _, r := range []drivers.Ref{base, active} {
			_, mountErr := c.d.Mounts(h.ctx, r, drivers.MountOptions{})
			_, commitErr := c.d.Commit(h.ctx, r, drivers.CommitOptions{})
			createErr := c.d.Create(h.ctx, drivers.Ref{ID: 99, Parents: []drivers.ID{r.ID}}, drivers.CreateOptions{})
			for _, err := range []error{mountErr, commitErr, createErr, firstOf(c.d.Diff(h.ctx, drivers.Ref{}, r))} {
				if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "no subvolume") {
					t.Errorf("%v, want ErrDataLoss that says why", err)
				}
			}
			h.must(c.d.Remove(h.ctx, r.ID))
		}
		if ids := slices.Collect(idsOf(c)); len(ids) > 0 {
			t.Errorf("left: %v", ids)
		}
	}
	for _, r := range []drivers.Ref{base, active} {
		_, err := h.d.Mounts(h.ctx, r, drivers.MountOptions{})
		h.must(err)
	}
}

// The source of a commit, which may be there for a mount, is not what was committed.
func TestCommittedSubvolumeDeletedBehindOurBack(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	target := t.TempDir()
	h.must(sys.Mount(tree, target, "", sys.MS_BIND, ""))
	h.commit(r)
	h.must(sys.Umount(target, 0))
	dir, err := sys.OpenDir(h.d.root + "/l/" + r.ID.String())
	h.must(err)
	h.must(ioctl.Destroy(dir, string(committed)))
	dir.Close()
	if _, err := h.d.Mounts(h.ctx, r, drivers.MountOptions{}); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("mounts: %v, want ErrDataLoss", err)
	}
	h.must(h.d.Remove(h.ctx, r.ID))
}

// A writer that is alive keeps its tree; what it had is deleted when it is gone.
func TestSourceOfACommitIsDroppedLater(t *testing.T) {
	h := fixture(t)
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	target := t.TempDir()
	h.must(sys.Mount(tree, target, "", sys.MS_BIND, ""))
	h.commit(r)
	err := os.WriteFile(target+"/after", nil, 0o644)
	testenv.Unmount(t, target)
	h.must(err)
	if _, err := os.Stat(tree); err != nil {
		t.Errorf("a mounted source was deleted: %v", err)
	}
	h.create(r, drivers.CreateOptions{})
	if _, err := os.Stat(tree); !os.IsNotExist(err) {
		t.Errorf("the source is still there: %v", err)
	}
}
