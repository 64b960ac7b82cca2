package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

type fsOptions struct {
	size  int64
	mkfs  []string
	mount []string
	maybe string
}

// Option changes what FS makes.
type Option func(*fsOptions)

// Size sets the file system's size in bytes. The default is 1 GiB, sparse.
func Size(bytes int64) Option { return func(o *fsOptions) { o.size = bytes } }

// MkfsArgs adds arguments of mkfs.KIND.
func MkfsArgs(args ...string) Option { return func(o *fsOptions) { o.mkfs = append(o.mkfs, args...) } }

// MountOptions adds options of the mount: "ro", "prjquota".
func MountOptions(opts ...string) Option {
	return func(o *fsOptions) { o.mount = append(o.mount, opts...) }
}

// IfKernelHas makes the mount's EINVAL an Optional skip with the reason "the
// kernel is built without FEATURE": project quota is a build option.
func IfKernelHas(feature string) Option { return func(o *fsOptions) { o.maybe = feature } }

// mkfs has what each kind's mkfs is called with to be quick and quiet.
var mkfs = map[string][]string{
	"ext4":  {"e2fsprogs", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"},
	"xfs":   {"xfsprogs", "-q", "-K"},
	"btrfs": {"btrfs-progs", "-q", "-K"},
}

// FS makes a file system of the kind ext4, xfs, btrfs or tmpfs, mounts it and
// returns its root, a short path. At the end of the test it is unmounted, which
// fails the test if something still uses it, and a btrfs is checked: whatever was
// killed or cut in the test must have left it sound. Needs root (see Root).
func FS(t testing.TB, kind string, opts ...Option) string {
	t.Helper()
	Root(t)
	o := fsOptions{size: 1 << 30}
	for _, f := range opts {
		f(&o)
	}
	if kind == "btrfs" {
		o.btrfsProfile()
	}
	dir := filepath.Join(Scratch(t), "m")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	source, release := "tmpfs", func() {}
	if kind == "tmpfs" {
		o.mount = append(o.mount, fmt.Sprintf("size=%d", o.size))
	} else {
		source, release = loopFS(t, kind, Image(dir), o)
	}
	defer release()
	mountFS(t, kind, source, dir, o)
	return dir
}

// Image returns the backing file of a file system on a loop device that FS
// returned dir for. What is in it is what the file system has written to its
// device: the state that a power cut would leave.
func Image(dir string) string { return dir + ".img" }

// loopFS makes the file system on a loop file. release must be called after
// mounting: until then it keeps the device.
func loopFS(t testing.TB, kind, image string, o fsOptions) (device string, release func()) {
	t.Helper()
	args, ok := mkfs[kind]
	if !ok {
		t.Fatalf("testenv: unknown file system %q", kind)
	}
	program := Program(t, "mkfs."+kind, args[0])
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, o.size); err != nil {
		t.Fatal(err)
	}
	args = append(append(append([]string(nil), args[1:]...), o.mkfs...), image)
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	loop, err := sys.AttachLoop(image, sys.LoopOptions{Autoclear: true})
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EPERM) {
		Skip(t, "no loop devices")
	}
	if err != nil {
		t.Fatal(err)
	}
	return loop.Name(), func() { loop.Close() }
}

func mountFS(t testing.TB, kind, source, dir string, o fsOptions) {
	t.Helper()
	var flags uintptr
	var data []string
	for _, opt := range o.mount {
		if opt == "ro" {
			flags |= sys.MS_RDONLY
		} else {
			data = append(data, opt)
		}
	}
	err := sys.Mount(source, dir, kind, flags, strings.Join(data, ","))
	if errors.Is(err, syscall.ENODEV) {
		Skip(t, "the kernel has no "+kind)
	}
	if errors.Is(err, syscall.EINVAL) && o.maybe != "" {
		Optional(t, "the kernel is built without "+o.maybe)
	}
	if err != nil {
		t.Fatalf("%v (options %q)", err, data)
	}
	t.Cleanup(func() {
		Unmount(t, dir)
		if kind == "btrfs" {
			CheckBtrfs(t, Image(dir))
		}
	})
	if kind == "btrfs" {
		finishBtrfs(t, dir)
	}
}

// CheckBtrfs runs btrfs check on the file of an unmounted file system, unless that
// has a feature that the program here does not know (simple quotas, before 6.7).
func CheckBtrfs(t testing.TB, image string) {
	out, err := exec.Command(Program(t, "btrfs", "btrfs-progs"), "check", "--readonly", image).CombinedOutput()
	switch {
	case bytes.Contains(out, []byte("unsupported option features")):
		t.Logf("not checked: %s", bytes.TrimSpace(out))
	case err != nil && os.Getenv(envBtrfsQuota) != "" && bytes.Contains(out, []byte("Counts for qgroup id")):
		t.Logf("qgroups of a subvolume half freed: %s", bytes.TrimSpace(out))
	case err != nil:
		t.Errorf("btrfs check: %v\n%s", err, out)
	}
}

// Unmount undoes the mount at dir. It waits for processes and namespaces that are
// just ending, which took over two seconds on a machine with ten times more to do
// than processors, and for those that are just being started: a child has its
// parent's descriptors until it execs. What keeps a mount busy for longer fails
// the test.
func Unmount(t interface {
	Helper()
	Errorf(format string, args ...any)
}, dir string) {
	t.Helper()
	for end := time.Now().Add(5 * settle); ; time.Sleep(10 * time.Millisecond) {
		err := sys.Umount(dir, 0)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(end) {
			t.Errorf("something still uses %s: %v", dir, err)
			_ = sys.Umount(dir, sys.MNT_DETACH)
			return
		}
	}
}
