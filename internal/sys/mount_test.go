package sys_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func open(t *testing.T, path string, flags int) *sys.Fd {
	t.Helper()
	f, err := sys.Open(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mkdir(t *testing.T, path ...string) string {
	t.Helper()
	p := filepath.Join(path...)
	if err := os.MkdirAll(p, 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestFsconfigErrorsCarryTheKernelsWords(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	c, err := sys.Fsopen("tmpfs")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.SetString("nosuchthing", "1")
	if !errors.Is(err, syscall.EINVAL) {
		t.Errorf("error %v does not wrap EINVAL", err)
	}
	if err == nil || !strings.Contains(err.Error(), "Unknown parameter 'nosuchthing'") {
		t.Errorf("error %v lacks what the kernel said", err)
	}
}

func TestDetachedMountIsUsableAndGoesWithItsDescriptor(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	c, err := sys.Fsopen("tmpfs")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(); err != nil {
		t.Fatal(err)
	}
	m, err := c.Mount(sys.MOUNT_ATTR_NODEV)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := os.WriteFile(m.ProcPath()+"/f", nil, 0o600); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), "nodev") && strings.Contains(string(b), m.Name()+" none") {
		t.Error("the mount is attached")
	}
}

func TestBindIsReadOnlyBeforeAnybodySeesIt(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	src, at := mkdir(t, dir, "src"), mkdir(t, dir, "at")
	tree, err := open(t, src, sys.O_PATH).OpenTree(true, false)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if err := tree.SetMountAttr(sys.MountAttr{Set: sys.MOUNT_ATTR_RDONLY}, false); err != nil {
		t.Fatal(err)
	}
	if err := tree.MoveTo(open(t, at, sys.O_PATH)); err != nil {
		t.Fatal(err)
	}
	defer sys.Umount(at, sys.MNT_DETACH) // tree still holds it
	if err := os.WriteFile(at+"/f", nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write through the bind: %v, want EROFS", err)
	}
	if err := os.WriteFile(src+"/f", nil, 0o600); err != nil {
		t.Errorf("write beside the bind: %v", err)
	}
}

func TestProjectIDsAreKeptAndInherited(t *testing.T) {
	for kind, args := range map[string][]string{"ext4": {"-O", "project"}, "xfs": nil} {
		t.Run(kind, func(t *testing.T) {
			dir := testenv.FS(t, kind, testenv.MkfsArgs(args...), testenv.IfKernelHas("project quota on "+kind))
			if err := open(t, dir, sys.O_RDONLY).SetProject(1<<20+7, true); err != nil {
				t.Fatal(err)
			}
			x, err := open(t, mkdir(t, dir, "sub"), sys.O_RDONLY).GetFSXattr()
			if err != nil {
				t.Fatal(err)
			}
			if x.Projid != 1<<20+7 || x.Xflags&sys.FS_XFLAG_PROJINHERIT == 0 {
				t.Errorf("a new directory has project %d, flags %#x", x.Projid, x.Xflags)
			}
			if err := open(t, dir, sys.O_RDONLY).SetProject(0, false); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestProjectQuotaStopsAWriter(t *testing.T) {
	for kind, args := range map[string][]string{"ext4": {"-O", "quota,project"}, "xfs": nil} {
		t.Run(kind, func(t *testing.T) {
			dir := testenv.FS(t, kind, testenv.MkfsArgs(args...), testenv.MountOptions("prjquota"),
				testenv.IfKernelHas("project quota on "+kind))
			f := open(t, dir, sys.O_RDONLY)
			if err := f.SetProject(42, true); err != nil {
				t.Fatal(err)
			}
			if err := f.SetProjectQuota(42, sys.ProjectQuota{Bytes: 1 << 20}); err != nil {
				t.Fatal(err)
			}
			if out, err := writeAsNobody(t, dir+"/big", 2<<20); err == nil {
				t.Errorf("2 MiB into 1 MiB: no error %s", out)
			}
			if err := f.SyncFS(); err != nil { // what is used is what is allocated
				t.Fatal(err)
			}
			if q, err := f.ProjectQuota(42); err != nil || q.Bytes != 1<<20 || q.UsedBytes == 0 {
				t.Errorf("quota %+v, %v", q, err)
			}
		})
	}
}

// writeAsNobody writes n bytes as an ordinary user: ext4 lets whoever has
// CAP_SYS_RESOURCE over the limit (fs/quota/dquot.c: ignore_hardlimit).
func writeAsNobody(t *testing.T, path string, n int) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("head", "-c", strconv.Itoa(n), "/dev/zero")
	cmd.Stdout = f
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var words strings.Builder
	cmd.Stderr = &words
	err = cmd.Run()
	return words.String(), err
}

func TestQuotaOfAFileSystemWithoutIsAClearErrno(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	_, err := open(t, dir, sys.O_RDONLY).ProjectQuota(1)
	if !errors.Is(err, syscall.ENOSYS) && !errors.Is(err, syscall.ESRCH) {
		t.Errorf("%v, want ENOSYS or ESRCH", err)
	}
}

func TestStructsHaveTheKernelsSize(t *testing.T) {
	if n := unsafe.Sizeof(sys.FSXattr{}); n != 28 {
		t.Errorf("struct fsxattr: %d bytes, want 28", n)
	}
	if n := sys.SizeofDiskQuota; n != 112 {
		t.Errorf("struct fs_disk_quota: %d bytes, want 112", n)
	}
}

func TestStatfsKnowsTheKind(t *testing.T) {
	for kind, want := range map[string]sys.FSType{
		"ext4": sys.EXT4_SUPER_MAGIC, "xfs": sys.XFS_SUPER_MAGIC, "tmpfs": sys.TMPFS_MAGIC, "btrfs": sys.BTRFS_SUPER_MAGIC,
	} {
		t.Run(kind, func(t *testing.T) {
			s, err := sys.StatfsPath(testenv.FS(t, kind))
			if err != nil || s.Type != want || s.Type.String() != kind || s.ReadOnly {
				t.Errorf("%+v %s, %v", s, s.Type, err)
			}
		})
	}
}

func TestLockExcludesAnotherProcessAndDiesWithItsHolder(t *testing.T) {
	path := filepath.Join(testenv.Scratch(t), "lock")
	l, err := sys.LockFile(path, sys.LockExclusive)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sys.LockFile(path, sys.LockShared); !sys.IsLocked(err) {
		t.Errorf("second lock: %v, want locked", err)
	}
	flock, err := exec.LookPath("flock")
	if err == nil && exec.Command(flock, "-n", path, "true").Run() == nil {
		t.Error("another process got the lock")
	}
	if err := l.Change(sys.LockShared); err != nil {
		t.Error(err)
	}
	second, err := sys.LockFile(path, sys.LockShared)
	if err != nil {
		t.Errorf("two shared locks: %v", err)
	}
	second.Close()
	l.Close()
	l.Close()
	if l, err = sys.LockFile(path, sys.LockExclusive); err != nil {
		t.Errorf("after release: %v", err)
	}
	l.Close()
}

func TestLoopDeviceClearsItself(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	img := filepath.Join(testenv.Scratch(t), "img")
	if err := os.WriteFile(img, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := sys.AttachLoop(img, sys.LoopOptions{Autoclear: true, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/sys/block/" + filepath.Base(dev.Name()) + "/loop/backing_file")
	if err != nil || strings.TrimSpace(string(b)) != img {
		t.Errorf("%s backs %q, %v", dev.Name(), b, err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}
