package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// opened returns a driver in a new root below dir.
func opened(t *testing.T, dir string) *driver {
	t.Helper()
	d, err := open(t.Context(), drivers.Config{Root: filepath.Join(dir, "r")})
	check(t, err)
	t.Cleanup(func() {
		for id, err := range d.IDs(context.Background()) {
			if err = errors.Join(err, d.Remove(context.Background(), id)); err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

// base makes a committed layer 1 out of what fill writes straight into the tree.
func base(t *testing.T, d *driver, fill func(dir string)) {
	t.Helper()
	r := drivers.Ref{ID: 1}
	check(t, d.Create(t.Context(), r, drivers.CreateOptions{}))
	fill(d.treePath(1))
	_, err := d.Commit(t.Context(), r, drivers.CommitOptions{Volatile: true})
	check(t, err)
}

var child = drivers.Ref{ID: 2, Parents: []drivers.ID{1}}

// noChanges checks that two layers are equal.
func noChanges(t *testing.T, d *driver) {
	t.Helper()
	for c, err := range d.Diff(t.Context(), drivers.Ref{ID: 1}, child) {
		check(t, err)
		t.Errorf("the copy differs: %s", &c)
	}
}

// Every way to copy content gives the same bytes and keeps the holes.
func TestContentIsCopiedByEachWay(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := testenv.FS(t, kind)
			for name, way := range map[string]func(c *copier, in, out *sys.Fd, st *sys.Stat) error{
				"best":       (*copier).content,
				"sparse":     func(c *copier, in, out *sys.Fd, st *sys.Stat) error { return c.sparse(in, out, st.Size) },
				"read write": func(c *copier, in, out *sys.Fd, st *sys.Stat) error { return c.readWrite(in, out, 0, st.Size) },
			} {
				t.Run(name, func(t *testing.T) { copyOne(t, dir, way, name != "read write") })
			}
		})
	}
}

func copyOne(t *testing.T, dir string, way func(c *copier, in, out *sys.Fd, st *sys.Stat) error, holes bool) {
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	f, err := os.Create(from)
	check(t, err)
	_, err1 := f.WriteAt([]byte(strings.Repeat("begin", 1000)), 0)
	_, err2 := f.WriteAt([]byte(strings.Repeat("middle", 50_000)), 3<<20)
	check(t, errors.Join(err1, err2, f.Truncate(9<<20), f.Sync(), f.Close()))
	defer os.Remove(from)
	in, err := sys.Open(from, sys.O_RDONLY, 0)
	check(t, err)
	defer in.Close()
	out, err := sys.Open(to, sys.O_RDWR|sys.O_CREAT|sys.O_TRUNC, 0o600)
	check(t, err)
	defer out.Close()
	st, err := in.Stat("")
	check(t, err)
	c := &copier{crew: newCrew(t.Context())}
	defer c.close()
	check(t, way(c, in, out, &st))
	check(t, out.SyncFS())
	a, err1 := os.ReadFile(from)
	b, err2 := os.ReadFile(to)
	check(t, errors.Join(err1, err2))
	if string(a) != string(b) {
		t.Errorf("the copy of %d bytes has %d, or other bytes", len(a), len(b))
	}
	if got, err := out.Stat(""); err != nil || holes && got.Blocks > st.Blocks+64 {
		t.Errorf("the copy holds %d blocks, the file %d (%v)", got.Blocks, st.Blocks, err)
	}
}

// A file may have as many names as the file system allows; the one that the
// pool needs to link it from is one more.
func TestFileWithAsManyNamesAsExt4Takes(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	d := opened(t, dir)
	names := 0
	base(t, d, func(dir string) {
		check(t, os.WriteFile(dir+"/0", []byte("x"), 0o644))
		for names = 1; ; names++ {
			err := os.Link(dir+"/0", fmt.Sprintf("%s/%d", dir, names))
			if errors.Is(err, syscall.EMLINK) {
				break
			}
			check(t, err)
		}
	})
	if names < 60_000 {
		t.Fatalf("ext4 took only %d names", names)
	}
	check(t, d.Create(t.Context(), child, drivers.CreateOptions{Volatile: true}))
	st, err := sys.StatPath(d.treePath(2) + "/0")
	check(t, err)
	if int(st.Nlink) != names {
		t.Errorf("the copy has %d names, want %d", st.Nlink, names)
	}
	noChanges(t, d)
}

// A default ACL or setgid bit of the directory that holds the root must not
// reach the trees.
func TestRootInheritsNothing(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	fd, err := sys.OpenDir(dir)
	check(t, err)
	defer fd.Close()
	const acl = "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x02\x00\x07\x00\xe8\x03\x00\x00\x04\x00\x07\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x07\x00\xff\xff\xff\xff"
	check(t, errors.Join(fd.Setxattr("", "system.posix_acl_default", acl), fd.Chown("", 0, 1234), fd.Chmod(0o2777)))
	d := opened(t, dir)
	base(t, d, func(dir string) { check(t, os.Mkdir(dir+"/d", 0o755)) })
	check(t, d.Create(t.Context(), child, drivers.CreateOptions{}))
	for _, p := range []string{d.root, d.treePath(1), d.treePath(2), d.treePath(2) + "/d"} {
		fd, err := sys.OpenDir(p)
		check(t, err)
		attrs, err1 := fd.Listxattr("")
		st, err2 := fd.Stat("")
		check(t, errors.Join(err1, err2, fd.Close()))
		if len(attrs) > 0 || p != d.root && st.GID != 0 || st.Mode&0o2000 != 0 {
			t.Errorf("%s: xattrs %q, group %d, mode %o", p, attrs, st.GID, st.Mode)
		}
	}
	noChanges(t, d)
}

// What a power cut can leave of a marker that was never flushed.
func TestLayerWithoutMarkerIsLostAndRemovable(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"empty":   func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"garbage": func(p string) error { return os.WriteFile(p, []byte("\x00\x00{"), 0o600) },
		"absent":  os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			d := opened(t, t.TempDir())
			base(t, d, func(string) {})
			check(t, spoil(filepath.Join(d.root, roots.Layers, "1", stateFile)))
			_, err := d.Mounts(t.Context(), drivers.Ref{ID: 1}, drivers.MountOptions{})
			if !errdefs.IsDataLoss(err) {
				t.Errorf("mounts: %v, want data loss", err)
			}
			check(t, d.Remove(t.Context(), 1))
		})
	}
}

// The debris of each step is listed and removable, whatever combination of
// directories a crash left.
func TestDebrisIsListedAndRemoved(t *testing.T) {
	d := opened(t, t.TempDir())
	for _, dir := range []string{roots.New, roots.Deleted} {
		check(t, os.MkdirAll(filepath.Join(d.root, dir, "a", treeDir, "x"), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(d.root, roots.Layers, "not a layer"), nil, 0o600))
	var ids []drivers.ID
	for id, err := range d.IDs(t.Context()) {
		check(t, err)
		ids = append(ids, id)
	}
	if len(ids) != 1 || ids[0] != 10 {
		t.Errorf("IDs() %v, want [a] once", ids)
	}
	if err := d.Create(t.Context(), drivers.Ref{ID: 10}, drivers.CreateOptions{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create over debris: %v", err)
	}
	check(t, d.Remove(t.Context(), 10))
	check(t, d.Create(t.Context(), drivers.Ref{ID: 10}, drivers.CreateOptions{}))
}

func TestProgressOfCopyAndRemoval(t *testing.T) {
	d := opened(t, t.TempDir())
	const files = 2000
	base(t, d, func(dir string) {
		for i := range files {
			check(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), []byte("1234"), 0o644))
		}
	})
	var mu sync.Mutex
	most := map[string]drivers.Progress{}
	ctx := drivers.WithProgress(t.Context(), func(p drivers.Progress) {
		mu.Lock()
		defer mu.Unlock()
		if p.Entries > most[p.Step].Entries {
			most[p.Step] = p
		}
	})
	check(t, d.Create(ctx, child, drivers.CreateOptions{}))
	check(t, d.Remove(ctx, 2))
	if p := most["copy"]; p.Entries < files-progressStep || p.Bytes < 4*(files-progressStep) {
		t.Errorf("copy told %+v", p)
	}
	if p := most["remove"]; p.Entries < files-progressStep {
		t.Errorf("remove told %+v", p)
	}
}

// A root that is reached by a symlink or a relative path is found in mountinfo.
func TestRootIsCanonical(t *testing.T) {
	dir := t.TempDir()
	check(t, os.Mkdir(dir+"/real", 0o700))
	check(t, os.Symlink("real", dir+"/link"))
	t.Chdir(dir)
	d, err := open(t.Context(), drivers.Config{Root: "link/r"})
	check(t, err)
	want, err := filepath.EvalSymlinks(dir)
	check(t, err)
	if d.root != want+"/real/r" {
		t.Errorf("root %s, want %s/real/r", d.root, want)
	}
}

// A full disk leaves nothing and says so.
func TestFullDisk(t *testing.T) {
	dir := testenv.FS(t, "ext4", testenv.Size(32<<20))
	d := opened(t, dir)
	base(t, d, func(dir string) { check(t, os.WriteFile(dir+"/f", make([]byte, 16<<20), 0o644)) })
	err := d.Create(t.Context(), child, drivers.CreateOptions{})
	var errno syscall.Errno
	if !errdefs.IsResourceExhausted(err) || !errors.As(err, &errno) || errno != syscall.ENOSPC {
		t.Fatalf("a second copy of 16 MiB in 32: %v, want ENOSPC", err)
	}
	for id, err := range d.IDs(t.Context()) {
		check(t, err)
		if id != 1 {
			t.Errorf("IDs() has %s", id)
		}
	}
}

func TestReadOnlyRoot(t *testing.T) {
	dir := testenv.FS(t, "ext4", testenv.Size(32<<20))
	d := opened(t, dir)
	base(t, d, func(string) {})
	check(t, sys.Mount("", dir, "", sys.MS_REMOUNT|sys.MS_RDONLY, ""))
	err := d.Create(t.Context(), child, drivers.CreateOptions{})
	if !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EROFS) {
		t.Errorf("create: %v, want EROFS", err)
	}
	again, err := open(t.Context(), drivers.Config{Root: d.root})
	check(t, err)
	if _, err := again.Mounts(t.Context(), drivers.Ref{ID: 1}, drivers.MountOptions{}); err != nil {
		t.Errorf("mounts of a committed layer: %v", err)
	}
	check(t, sys.Mount("", dir, "", sys.MS_REMOUNT, ""))
}

// A process that is killed while it probes leaves its scratch directory.
func TestOldScratchIsSwept(t *testing.T) {
	d := opened(t, t.TempDir())
	old, young := d.root+"/"+scratchPrefix+"1", d.root+"/"+scratchPrefix+"2"
	check(t, errors.Join(os.MkdirAll(old+"/x", 0o700), os.Mkdir(young, 0o700)))
	check(t, os.Chtimes(old, time.Time{}, time.Now().Add(-2*time.Hour)))
	_, err := open(t.Context(), drivers.Config{Root: d.root})
	check(t, err)
	if _, err := os.Lstat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old one: %v", err)
	}
	if _, err := os.Lstat(young); err != nil {
		t.Errorf("the young one, which may be in use: %v", err)
	}
}
