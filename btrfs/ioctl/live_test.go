package ioctl_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *sys.Fd {
	t.Helper()
	fd, err := sys.OpenDir(path)
	must(t, err)
	t.Cleanup(func() { fd.Close() })
	return fd
}

func TestSubvolumes(t *testing.T) {
	testenv.Leaks(t)
	dir := testenv.FS(t, "btrfs", testenv.Size(256<<20))
	root := open(t, dir)
	must(t, ioctl.Create(root, "a"))
	if err := ioctl.Create(root, "a"); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("create again: %v", err)
	}
	for _, bad := range []string{"", "x/y", "x\x00", strings.Repeat("x", 4040)} {
		if err := ioctl.Create(root, bad); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("create %q: %v", bad, err)
		}
	}
	must(t, os.WriteFile(dir+"/a/f", []byte("x"), 0o644))
	a := open(t, dir+"/a")
	must(t, ioctl.Snapshot(a, root, "s", true))
	s := open(t, dir+"/s")
	if err := os.WriteFile(dir+"/s/f", nil, 0o644); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write into a read-only snapshot: %v", err)
	}
	must(t, ioctl.SetReadOnly(s, false))
	ro, err := ioctl.ReadOnly(s)
	if err != nil || ro {
		t.Errorf("read-only: %v, %v", ro, err)
	}
	ia, err := ioctl.SubvolInfo(a)
	must(t, err)
	is, err := ioctl.SubvolInfo(s)
	must(t, err)
	if is.ParentUUID != ia.UUID || is.Name != "s" || is.Parent != ioctl.BTRFS_FS_TREE_OBJECTID || is.Born < ia.Born {
		t.Errorf("a %+v, its snapshot %+v", ia, is)
	}
	if id, err := ioctl.SubvolID(s); err != nil || id != is.ID {
		t.Errorf("SubvolID: %d, %v, want %d", id, err, is.ID)
	}
	nested(t, dir, root, a)
	must(t, ioctl.Destroy(root, "s"))
	must(t, ioctl.Sync(root))
	must(t, ioctl.DestroyID(root, ia.ID))
	if _, err := os.Stat(dir + "/a"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("after DestroyID: %v", err)
	}
	if err := ioctl.WaitDeleted(root, 4711); !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("wait for what never was: %v", err)
	}
}

// nested makes subvolumes in a, finds them with their paths and deletes them.
func nested(t *testing.T, dir string, root, a *sys.Fd) {
	t.Helper()
	must(t, os.MkdirAll(dir+"/a/d/e", 0o755))
	e := open(t, dir+"/a/d/e")
	must(t, ioctl.Create(e, "n"))
	for i := range 300 { // more than one answer holds
		must(t, ioctl.Create(a, "many"+string(rune('0'+i/100))+string(rune('0'+i/10%10))+string(rune('0'+i%10))))
	}
	children, err := ioctl.Children(a)
	must(t, err)
	if len(children) != 301 {
		t.Fatalf("%d children, want 301", len(children))
	}
	var found []string
	for _, c := range children {
		p, name, err := ioctl.UserPath(a, c)
		must(t, err)
		if !strings.HasPrefix(name, "many") {
			found = append(found, filepath.Join(p, name))
		}
		in := a
		if p != "" {
			in = e
		}
		must(t, ioctl.Destroy(in, name))
	}
	if !slices.Equal(found, []string{"d/e/n"}) {
		t.Errorf("nested: %q", found)
	}
}

func TestSearchFindsNamesAndExtents(t *testing.T) {
	testenv.Leaks(t)
	dir := testenv.FS(t, "btrfs", testenv.Size(256<<20))
	root := open(t, dir)
	must(t, ioctl.Create(root, "a"))
	a := open(t, dir+"/a")
	must(t, os.MkdirAll(dir+"/a/d", 0o755))
	must(t, os.WriteFile(dir+"/a/f", make([]byte, 100<<10), 0o644))
	for i := range 2000 { // beyond what one answer holds
		must(t, os.WriteFile(dir+"/a/small"+strings.Repeat("y", 200)+string(rune('0'+i/1000))+string(rune('0'+i/100%10))+string(rune('0'+i/10%10))+string(rune('0'+i%10)), []byte("abc"), 0o644))
	}
	must(t, os.Link(dir+"/a/f", dir+"/a/d/g"))
	must(t, a.SyncFS())
	st, err := a.Stat("f")
	must(t, err)
	var names []string
	var data uint64
	for i, err := range ioctl.Search(a, ioctl.Query{Min: ioctl.Key{Object: st.Ino}, Max: ioctl.Key{Object: st.Ino, Type: 255, Offset: ^uint64(0)}}) {
		must(t, err)
		switch i.Type {
		case ioctl.BTRFS_INODE_REF_KEY, ioctl.BTRFS_INODE_EXTREF_KEY:
			fs, err := ioctl.DecodeNames(i)
			must(t, err)
			for _, f := range fs {
				p, err := ioctl.Path(a, 0, f.Dir)
				must(t, err)
				names = append(names, filepath.Join(p, f.Name))
			}
		case ioctl.BTRFS_EXTENT_DATA_KEY:
			e, err := ioctl.DecodeExtent(i.Data)
			must(t, err)
			data += e.DiskBytes
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, []string{"d/g", "f"}) || data != 100<<10 {
		t.Errorf("names %q, %d bytes", names, data)
	}
	inodes := 0
	for i, err := range ioctl.Search(a, ioctl.Query{Max: ioctl.Key{Object: ^uint64(0), Type: 255, Offset: ^uint64(0)}}) {
		must(t, err)
		if i.Type == ioctl.BTRFS_INODE_ITEM_KEY {
			inodes++
		}
	}
	if inodes != 2003 {
		t.Errorf("%d inodes, want 2003", inodes)
	}
	if err := first(ioctl.Search(a, ioctl.Query{Tree: 9999})); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a tree that is not there: %v", err)
	}
}

func first(items func(func(ioctl.Item, error) bool)) error {
	for _, err := range items {
		return err
	}
	return nil
}

func TestQuota(t *testing.T) {
	testenv.Leaks(t)
	dir := testenv.FS(t, "btrfs", testenv.Size(256<<20))
	root := open(t, dir)
	must(t, ioctl.Create(root, "a"))
	a := open(t, dir+"/a")
	mode, _, err := ioctl.Quota(root)
	if err != nil || mode != ioctl.QuotaOff {
		t.Fatalf("at first %v, %v", mode, err)
	}
	if err := ioctl.Limit(a, ioctl.QgroupUsage{Exclusive: 1 << 20}); !errors.Is(err, syscall.ENOTCONN) {
		t.Errorf("limit without quota: %v", err)
	}
	must(t, ioctl.SetQuota(root, ioctl.QuotaFull))
	must(t, ioctl.WaitQuota(root))
	mode, right, err := ioctl.Quota(root)
	if err != nil || mode != ioctl.QuotaFull {
		t.Fatalf("then %v, %v", mode, err)
	}
	if !right {
		t.Error("the scan is over, the figures are not said to be right")
	}
	must(t, ioctl.Limit(a, ioctl.QgroupUsage{Exclusive: 1 << 20}))
	must(t, os.WriteFile(dir+"/a/fits", make([]byte, 512<<10), 0o644))
	must(t, a.SyncFS())
	info, err := ioctl.SubvolInfo(a)
	must(t, err)
	u, err := ioctl.Qgroup(root, info.ID)
	if err != nil || u.Exclusive < 512<<10 || u.Exclusive > 1<<20 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := os.WriteFile(dir+"/a/f", make([]byte, 4<<20), 0o644); !errors.Is(err, syscall.EDQUOT) {
		t.Errorf("4 MiB into 1: %v", err)
	}
	must(t, ioctl.Limit(a, ioctl.QgroupUsage{}))
	must(t, os.WriteFile(dir+"/a/f", make([]byte, 4<<20), 0o644))
	must(t, ioctl.SetQuota(root, ioctl.QuotaOff))
}

func TestInfo(t *testing.T) {
	dir := testenv.FS(t, "btrfs", testenv.Size(256<<20), testenv.MkfsArgs("-n", "4096", "-m", "dup"))
	root := open(t, dir)
	i, err := ioctl.Info(root)
	if err != nil || i.NodeSize != 4096 || i.Devices != 1 {
		t.Errorf("%+v, %v", i, err)
	}
	d, err := ioctl.DeviceInfo(root, 1)
	if err != nil || d.Total != 256<<20 || !strings.HasPrefix(d.Path, "/dev/loop") {
		t.Errorf("%+v, %v", d, err)
	}
	spaces, err := ioctl.SpaceInfo(root)
	if err != nil || len(spaces) < 3 {
		t.Errorf("%+v, %v", spaces, err)
	}
}

// Three answers: yes here, no where the file system is another.
func TestProbe(t *testing.T) {
	dir := testenv.FS(t, "btrfs", testenv.Size(256<<20))
	for _, r := range ioctl.Probe(open(t, dir)) {
		if r.Answer == kprobe.Unknown || r.Answer == kprobe.No && !slices.Contains([]string{"quota", "simple quotas", "SUBVOL_SYNC_WAIT"}, r.Feature) {
			t.Errorf("%s on btrfs", r)
		}
	}
	for _, r := range ioctl.Probe(open(t, testenv.FS(t, "tmpfs"))) {
		if r.Answer != kprobe.No {
			t.Errorf("%s on tmpfs", r)
		}
	}
}
