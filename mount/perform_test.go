package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// dirs makes directories below base and returns their paths.
func dirs(t testing.TB, base string, names ...string) (paths []string) {
	t.Helper()
	for _, n := range names {
		p := filepath.Join(base, n)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, p)
	}
	return paths
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// mounted performs ms at target for the length of the test.
func mounted(t testing.TB, target string, ms ...Mount) {
	t.Helper()
	if err := All(t.Context(), ms, target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range ms {
			if err := Unmount(target, UnmountOptions{}); err != nil {
				t.Error(err)
			}
		}
	})
}

// at returns the topmost mount at target.
func at(t testing.TB, target string) Info {
	t.Helper()
	infos, err := List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range slices.Backward(infos) {
		if i.Target == target {
			return i
		}
	}
	t.Fatalf("nothing is mounted at %s", target)
	return Info{}
}

// stack makes n lowers, each with a file of its number and a file that they all
// have, and an upper and a work. The first lower is the nearest.
func stack(t testing.TB, base string, n int) Mount {
	t.Helper()
	var lowers []string
	for i := range n {
		d := dirs(t, base, fmt.Sprintf("l/%d", i))[0]
		write(t, fmt.Sprintf("%s/f%d", d, i), fmt.Sprint(i))
		write(t, d+"/all", fmt.Sprint(i))
		lowers = append(lowers, EscapeLayer(d))
	}
	uw := dirs(t, base, "u", "w")
	return Mount{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "lowerdir=" + strings.Join(lowers, ":"),
		"upperdir=" + EscapeLayer(uw[0]), "workdir=" + EscapeLayer(uw[1]),
	}}
}

func TestOverlayWorksOnEveryFileSystem(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			target := dirs(t, fs, "m")[0]
			mounted(t, target, stack(t, fs, 3))
			write(t, target+"/new", "x")
			if b, _ := os.ReadFile(target + "/all"); string(b) != "0" {
				t.Errorf("all has %q, want that of the nearest lower", b)
			}
			if _, err := os.Stat(fs + "/u/new"); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFiveHundredLowers(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	long := dirs(t, fs, strings.Repeat("d", 200))[0] // 500 of these are 25 pages
	target := dirs(t, fs, "m")[0]
	mounted(t, target, stack(t, long, 500))
	names, err := os.ReadDir(target)
	if err != nil || len(names) != 501 {
		t.Errorf("%d names, %v; want 501", len(names), err)
	}
	since68(t) // before, mountinfo shows no more than mount(2) took
	l, err := OverlayLayers(at(t, target).Mount())
	if err != nil || len(l.Lowers) != 500 || l.Lowers[499] != long+"/l/499" {
		t.Errorf("mountinfo tells %d lowers, %v", len(l.Lowers), err)
	}
}

var awkward = []string{"co:lon", "com,ma", `back\slash`, "sp ace", `esc\:ape`, "quo\"te", "new\nline", "equal=", `end\`, "#hash", strings.Repeat("n", 255)}

func TestAwkwardNamesOfLayers(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	for _, name := range awkward {
		t.Run(name, func(t *testing.T) {
			base := dirs(t, fs, name)[0]
			target := dirs(t, base, "m")[0]
			m := stack(t, base, 2)
			mounted(t, target, m)
			if b, err := os.ReadFile(target + "/f1"); string(b) != "1" {
				t.Errorf("f1: %q, %v", b, err)
			}
			want, _ := OverlayLayers(m)
			got, err := OverlayLayers(at(t, target).Mount())
			if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("mountinfo tells\n%q, %v; want\n%q", got, err, want)
			}
		})
	}
}

func TestOldCallsPerformTheSame(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	for _, name := range awkward[:5] {
		base := dirs(t, fs, name)[0]
		target := dirs(t, base, "m")[0]
		m := stack(t, base, 2)
		p, err := parse(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.mountOld(t.Context(), target); err != nil {
			t.Fatal(err)
		}
		want, _ := OverlayLayers(m)
		if got, err := OverlayLayers(at(t, target).Mount()); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("mountinfo tells\n%q, %v; want\n%q", got, err, want)
		}
		if err := Unmount(target, UnmountOptions{}); err != nil {
			t.Error(err)
		}
	}
}

func TestOldCallsTakeManyLowersFromTheirCommonDirectory(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	base := dirs(t, fs, strings.Repeat("d", 100))[0]
	target := dirs(t, fs, "m")[0]
	before, _ := os.Getwd()
	p, err := parse(stack(t, base, 200)) // 26 KiB of paths, less than 4 KiB of names
	if err != nil {
		t.Fatal(err)
	}
	if err := p.mountOld(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(target + "/f199"); string(b) != "199" {
		t.Errorf("f199: %q", b)
	}
	if err := Unmount(target, UnmountOptions{}); err != nil {
		t.Error(err)
	}
	if after, _ := os.Getwd(); after != before {
		t.Errorf("the process's working directory is %s, was %s", after, before)
	}
	p, err = parse(stack(t, base, 1500))
	if err != nil {
		t.Fatal(err)
	}
	err = p.mountOld(t.Context(), target)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "1500 lowers") || !strings.Contains(err.Error(), "6.8") {
		t.Errorf("too many lowers: %v", err)
	}
}

func TestReadOnlyBindIsReadOnly(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			d := dirs(t, fs, "src", "m")
			mounted(t, d[1], Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "ro", "nosuid", "nodev"}})
			if err := os.WriteFile(d[1]+"/f", nil, 0o600); !errors.Is(err, syscall.EROFS) {
				t.Errorf("write: %v, want EROFS", err)
			}
			i := at(t, d[1])
			for _, o := range []string{"ro", "nosuid", "nodev"} {
				if !slices.Contains(i.Options, o) {
					t.Errorf("options %q lack %s", i.Options, o)
				}
			}
			if i.Mount().Source != d[0] || !i.ReadOnly() {
				t.Errorf("mountinfo tells %+v", i)
			}
			write(t, d[0]+"/f", "x")
		})
	}
}

func TestBindOfAFile(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	write(t, fs+"/a", "a")
	write(t, fs+"/b", "b")
	mounted(t, fs+"/b", Mount{Type: "bind", Source: fs + "/a", Options: []string{"bind"}})
	if b, _ := os.ReadFile(fs + "/b"); string(b) != "a" {
		t.Errorf("b has %q", b)
	}
}

func TestRecursiveBindTakesMountsAlong(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	d := dirs(t, fs, "src/in", "m")
	mounted(t, d[0], Mount{Type: "tmpfs", Source: "tmpfs"})
	write(t, d[0]+"/f", "x")
	for option, want := range map[string]bool{"bind": false, "rbind": true} {
		t.Run(option, func(t *testing.T) {
			if err := All(t.Context(), []Mount{{Type: "bind", Source: fs + "/src", Options: []string{option}}}, d[1]); err != nil {
				t.Fatal(err)
			}
			_, err := os.Stat(d[1] + "/in/f")
			if (err == nil) != want {
				t.Errorf("mount below the source: %v", err)
			}
			_ = Unmount(d[1]+"/in", UnmountOptions{})
			if err := Unmount(d[1], UnmountOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPropagationIsSet(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	d := dirs(t, fs, "src", "m")
	mounted(t, d[1], Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "rshared"}})
	if i := at(t, d[1]); len(i.Propagation) != 1 || !strings.HasPrefix(i.Propagation[0], "shared:") {
		t.Errorf("propagation %q", i.Propagation)
	}
}

const idOptions = "map=0:100000:1000,1000:200000:1"

func owner(t *testing.T, path string) uint32 {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Uid
}

func TestIDMappedBind(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			d := dirs(t, fs, "src", "m")
			write(t, d[0]+"/root", "")
			write(t, d[0]+"/user", "")
			if err := os.Chown(d[0]+"/user", 1000, 1000); err != nil {
				t.Fatal(err)
			}
			mounted(t, d[1], Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "uid" + idOptions, "gid" + idOptions}})
			if r, u := owner(t, d[1]+"/root"), owner(t, d[1]+"/user"); r != 100000 || u != 200000 {
				t.Errorf("owners %d and %d, want 100000 and 200000", r, u)
			}
			if r := owner(t, d[0]+"/root"); r != 0 {
				t.Errorf("the source's owner is %d", r)
			}
		})
	}
}

func TestIDMappedOverlayMapsTheLowersOnly(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			testenv.Leaks(t)
			fs := testenv.FS(t, kind)
			target := dirs(t, fs, "m")[0]
			m := stack(t, fs, 3)
			want, _ := OverlayLayers(m)
			m.Options = append(m.Options, "uid"+idOptions, "gid"+idOptions)
			mounted(t, target, m)
			if u := owner(t, target+"/f2"); u != 100000 {
				t.Errorf("a lower's file belongs to %d, want 100000", u)
			}
			write(t, target+"/new", "")
			if u := owner(t, target+"/new"); u != 0 {
				t.Errorf("a new file belongs to %d, want 0", u)
			}
			if err := os.Chmod(target+"/f2", 0o600); err != nil {
				t.Fatal(err)
			}
			if u := owner(t, fs+"/u/f2"); u != 100000 {
				t.Errorf("the copied-up file belongs to %d, want 100000", u)
			}
			if got, err := OverlayLayers(at(t, target).Mount()); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("mountinfo tells %q, %v", got, err)
			}
		})
	}
}

func TestLoopMountsAFile(t *testing.T) {
	testenv.Leaks(t)
	testenv.Root(t)
	dir := testenv.Scratch(t)
	img, target := dir+"/img", dirs(t, dir, "m")[0]
	write(t, img, "")
	if err := os.Truncate(img, 64<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(testenv.Program(t, "mkfs.ext4", "e2fsprogs"), "-q", img).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	mounted(t, target, Mount{Type: "ext4", Source: img, Options: []string{"loop", "noatime", "errors=remount-ro"}})
	write(t, target+"/f", "x")
	i := at(t, target)
	if !strings.HasPrefix(i.Source, "/dev/loop") || !slices.Contains(i.Options, "noatime") {
		t.Errorf("mounted %+v", i)
	}
}

func TestMountBelowAMount(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	d := dirs(t, fs, "src/a", "m", "outside")
	if err := os.Symlink("/../../outside", fs+"/src/out"); err != nil {
		t.Fatal(err)
	}
	ms := []Mount{
		{Type: "bind", Source: fs + "/src", Options: []string{"rbind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "/a", Options: []string{"size=1m"}},
	}
	mounted(t, d[1], ms[0])
	if err := All(t.Context(), ms[1:], d[1]); err != nil {
		t.Fatal(err)
	}
	if i := at(t, d[1]+"/a"); i.Type != "tmpfs" {
		t.Errorf("at a: %+v", i)
	}
	if err := Unmount(d[1]+"/a", UnmountOptions{}); err != nil {
		t.Error(err)
	}
	ms[1].Target = "out" // resolved inside the mount, where it leads nowhere
	if err := All(t.Context(), ms[1:], d[1]); !errdefs.IsNotFound(err) {
		t.Errorf("a target that leads out: %v, want not found", err)
	}
}

func TestNothingStaysAfterAnError(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	d := dirs(t, fs, "src", "m")
	ms := []Mount{
		{Type: "bind", Source: d[0], Options: []string{"bind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "missing"},
	}
	if err := All(t.Context(), ms, d[1]); !errdefs.IsNotFound(err) || !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%v, want not found and ENOENT", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := All(ctx, ms[:1], d[1]); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want canceled", err)
	}
	if s, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(s, []byte(" "+d[1]+" ")) {
		t.Errorf("something is mounted at %s, %v", d[1], err)
	}
}

func TestErrorsSayWhatAndWhich(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	for _, c := range []struct {
		name string
		m    Mount
		is   func(error) bool
		says string
	}{
		{"unknown file system", Mount{Type: "nosuchfs"}, errdefs.IsNotImplemented, "nosuchfs"},
		{"unknown option", Mount{Type: "tmpfs", Options: []string{"frobnicate=7"}}, errdefs.IsInvalidArgument, "Unknown parameter 'frobnicate'"},
		{"no lower", Mount{Type: "overlay", Options: []string{"lowerdir=" + fs + "/none:" + fs}}, errdefs.IsNotFound, fs + "/none"},
		{"no source", Mount{Type: "bind", Source: fs + "/none", Options: []string{"bind"}}, errdefs.IsNotFound, fs + "/none"},
		{"one lower", Mount{Type: "overlay", Options: []string{"lowerdir=" + fs}}, errdefs.IsInvalidArgument, "overlay"},
	} {
		err := All(t.Context(), []Mount{c.m}, target)
		if !c.is(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestDetachedTreeIsSeenByNobodyElse(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	before, _ := List()
	ms := []Mount{
		stack(t, fs, 2),
		{Type: "tmpfs", Source: "tmpfs", Target: "below"},
	}
	dirs(t, fs, "l/1/below")
	tree, err := Detached(t.Context(), ms)
	if errdefs.IsNotImplemented(err) && strings.Contains(err.Error(), "needs kernel 6.15") {
		testenv.Optional(t, "the kernel is from before 6.15")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	write(t, tree.Path()+"/new", "x")
	write(t, tree.Path()+"/below/tmp", "x")
	if b, _ := os.ReadFile(tree.Path() + "/all"); string(b) != "0" {
		t.Errorf("all has %q", b)
	}
	if after, _ := List(); len(after) != len(before) {
		t.Errorf("%d mounts, before %d", len(after), len(before))
	}
	if _, err := os.Stat(fs + "/u/below/tmp"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was written below went to the upper: %v", err)
	}
	if err := tree.Close(); err != nil {
		t.Error(err)
	}
	mounted(t, dirs(t, fs, "m")[0], ms[0]) // the upper is free again
}

func TestDetachedTreeCanBeAttachedLater(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	tree, err := Detached(t.Context(), []Mount{stack(t, fs, 2)})
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.Attach(target); err != nil {
		t.Fatal(err)
	}
	tree.Close()
	if at(t, target).Type != "overlay" {
		t.Error("not attached")
	}
	if err := Unmount(target, UnmountOptions{}); err != nil {
		t.Error(err)
	}
}

// listing tells what a user sees of a tree.
func listing(t *testing.T, root string) string {
	t.Helper()
	out, err := exec.Command("find", root, "-mindepth", "1", "-printf", "%P %y %m %U:%G %s %T@\n").CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	lines := strings.Split(string(out), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// The same mounts through containerd's own code give the same tree and the same
// options.
func TestContainerdPerformsTheSame(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	d := dirs(t, fs, "src", "ours", "theirs")
	write(t, d[0]+"/f", "x")
	over := stack(t, fs, 20)
	performed(t, d[1], func() error { return All(t.Context(), []Mount{over}, d[1]) }) // the first mount of an upper shows uuid=on
	readOnly := Mount{Type: "overlay", Source: "overlay", Options: []string{over.Options[1]}}
	idmapped := over
	idmapped.Options = append(slices.Clone(over.Options), "uidmap=0:100000:65536", "gidmap=0:100000:65536")
	for _, c := range []struct {
		name string
		m    Mount
	}{
		{"bind", Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "rw"}}},
		{"bind ro", Mount{Type: "bind", Source: d[0], Options: []string{"rbind", "ro"}}},
		{"bind ro nosuid noexec", Mount{Type: "bind", Source: d[0], Options: []string{"bind", "ro", "nosuid", "noexec", "noatime"}}},
		{"bind idmapped", Mount{Type: "bind", Source: d[0], Options: []string{"bind", "uidmap=0:100000:65536", "gidmap=0:100000:65536"}}},
		{"overlay", over},
		{"overlay ro option", Mount{Type: "overlay", Source: "overlay", Options: append([]string{"ro", "nodev"}, over.Options...)}},
		{"overlay without upper", readOnly},
		{"overlay idmapped", idmapped},
		{"tmpfs", Mount{Type: "tmpfs", Source: "some", Options: []string{"size=64k", "mode=750", "nosuid", "strictatime"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ours := performed(t, d[1], func() error { return All(t.Context(), []Mount{c.m}, d[1]) })
			theirs := performed(t, d[2], func() error { return cmount.All([]Mount{c.m}, d[2]) })
			if ours != theirs {
				t.Errorf("ours:\n%s\ncontainerd's:\n%s", ours, theirs)
			}
		})
	}
}

// performed mounts, tells what came out of it, and unmounts.
func performed(t *testing.T, target string, f func() error) string {
	t.Helper()
	if err := f(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for range 2 { // containerd stacks an id-mapped bind on a plain one
			if err := Unmount(target, UnmountOptions{}); err != nil {
				t.Error(err)
			}
		}
	}()
	i := at(t, target)
	m := i.Mount()
	slices.Sort(m.Options)
	for n, o := range m.Options { // containerd's id-mapped lowers have a temporary path
		if strings.HasPrefix(o, "lowerdir=") && strings.Contains(o, "ovl-idmapped") {
			m.Options[n] = "lowerdir="
		}
	}
	if l, err := OverlayLayers(i.Mount()); err == nil && l.Upper != "" && owner(t, target+"/f1") != 0 {
		for n, o := range m.Options {
			if strings.HasPrefix(o, "lowerdir=") {
				m.Options[n] = "lowerdir="
			}
		}
	}
	return fmt.Sprintf("%s %s %q %q\n%s", m.Type, m.Source, m.Options, i.Propagation, listing(t, target))
}

func TestFUSEThroughTheMountHelper(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "mount.fuse3", "fuse3")
	testenv.Program(t, "fuse-overlayfs", "fuse-overlayfs")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		testenv.Skip(t, "no /dev/fuse")
	}
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	m := stack(t, fs, 2)
	m.Type = "fuse3.fuse-overlayfs"
	m.Options = m.Options[1:]
	if err := All(t.Context(), []Mount{m}, target); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(target + "/f1"); string(b) != "1" {
		t.Errorf("f1: %q", b)
	}
	if i := at(t, target); i.Type != "fuse.fuse-overlayfs" {
		t.Errorf("mounted %+v", i)
	}
	if err := Unmount(target, UnmountOptions{}); err != nil {
		t.Error(err)
	}
}

// TestServedMountIsAttachedNowhere and ends with the Tree, its server too (the leak
// check counts processes); once attached it stays.
func TestServedMountIsAttachedNowhere(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	testenv.Program(t, "fuse-overlayfs", "fuse-overlayfs")
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	m := stack(t, fs, 2)
	m.Type, m.Options = "fuse3.fuse-overlayfs", m.Options[1:]
	for _, attach := range []bool{false, true} {
		tree, err := Detached(t.Context(), []Mount{m})
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(tree.Path() + "/f1"); string(b) != "1" {
			t.Errorf("f1: %q", b)
		}
		if attach {
			if err := tree.Attach(target); err != nil {
				t.Error(err)
			}
		}
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
		b, _ := os.ReadFile(target + "/f1")
		if (string(b) == "1") != attach {
			t.Errorf("attached %v: f1 is %q", attach, b)
		}
		if attach {
			if err := Unmount(target, UnmountOptions{}); err != nil {
				t.Error(err)
			}
			tree.server.wait()
		}
	}
}

// TestServerThatFailsSaysWhy: no program, and one that ends at once.
func TestServerThatFailsSaysWhy(t *testing.T) {
	testenv.Root(t)
	testenv.Leaks(t)
	testenv.Program(t, "fuse-overlayfs", "fuse-overlayfs")
	_, err := Detached(t.Context(), []Mount{{Type: "fuse3.nosuchserver", Source: "x"}})
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "nosuchserver") {
		t.Errorf("no program: %v", err)
	}
	_, err = Detached(t.Context(), []Mount{{Type: "fuse3.fuse-overlayfs", Source: "x", Options: []string{"lowerdir=/no/such/dir"}}})
	if err == nil || !strings.Contains(err.Error(), "lowerdir") && !strings.Contains(err.Error(), "/no/such/dir") {
		t.Errorf("a lower that is not there: %v", err)
	}
}

func TestOldCallsDoBindsAndPropagation(t *testing.T) {
	testenv.Leaks(t)
	fs := testenv.FS(t, "tmpfs")
	d := dirs(t, fs, "src", "m")
	for _, m := range []Mount{
		{Type: "bind", Source: d[0], Options: []string{"rbind", "ro", "nosuid", "rshared"}},
		{Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "nosuid", "size=64k", "rshared"}},
	} {
		p, err := parse(m)
		if err != nil {
			t.Fatal(err)
		}
		at1, err := sys.Open(d[1], sys.O_PATH, 0)
		if err != nil {
			t.Fatal(err)
		}
		root, err := p.attachOld(t.Context(), at1)
		at1.Close()
		if err != nil {
			t.Fatal(err)
		}
		root.Close()
		i := at(t, d[1])
		if !slices.Contains(i.Options, "ro") || !slices.Contains(i.Options, "nosuid") || len(i.Propagation) == 0 {
			t.Errorf("%s: mounted %+v", m.Type, i)
		}
		if err := Unmount(d[1], UnmountOptions{}); err != nil {
			t.Error(err)
		}
	}
	p, err := parse(Mount{Type: "bind", Source: d[0], Options: []string{"bind", "uidmap=0:1:1", "gidmap=0:1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.attachOld(t.Context(), nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("id map by mount(2): %v", err)
	}
}

func TestRemount(t *testing.T) {
	fs := testenv.FS(t, "tmpfs")
	target := dirs(t, fs, "m")[0]
	mounted(t, target, Mount{Type: "tmpfs", Source: "tmpfs"})
	if err := All(t.Context(), []Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"remount", "ro"}}}, target); err != nil {
		t.Fatal(err)
	}
	if i := at(t, target); !i.ReadOnly() {
		t.Errorf("mounted %+v", i)
	}
}

// since68 skips what older kernels do not have: options of overlayfs in
// fsconfig(2), and with them data-only lowers in mount(2)'s.
func since68(t *testing.T) {
	t.Helper()
	if layerByLayer().Answer == kprobe.No {
		testenv.Optional(t, "the kernel is from before 6.8")
	}
}

func TestDataOnlyLowersAreReachedByRedirectsAlone(t *testing.T) {
	since68(t)
	testenv.Leaks(t)
	fs := testenv.FS(t, "ext4")
	d := dirs(t, fs, "a", "b", "data", "m")
	write(t, d[0]+"/f", "x")
	write(t, d[2]+"/hidden", "x")
	mounted(t, d[3], Mount{Type: "overlay", Source: "overlay",
		Options: []string{"metacopy=on", "lowerdir=" + d[0] + ":" + d[1] + "::" + d[2]}})
	names, err := os.ReadDir(d[3])
	if err != nil || len(names) != 1 || names[0].Name() != "f" {
		t.Errorf("%v, %v; want f alone", names, err)
	}
	l, err := OverlayLayers(at(t, d[3]).Mount())
	if err != nil || len(l.Data) != 1 || l.Data[0] != d[2] {
		t.Errorf("mountinfo tells %+v, %v", l, err)
	}
}

func TestAFailingMountHelperSaysWhatItSaid(t *testing.T) {
	testenv.Root(t)
	testenv.Program(t, "mount.fuse3", "fuse3")
	target := testenv.Scratch(t)
	err := All(t.Context(), []Mount{{Type: "fuse3.nosuchserver", Source: "x"}}, target)
	if err == nil || !strings.Contains(err.Error(), "nosuchserver") {
		t.Errorf("%v lacks the helper's words", err)
	}
}

// TestFailedHelperLeavesNoMount: a helper that mounts and then fails, or is
// killed because the context ended, leaves nothing mounted.
func TestFailedHelperLeavesNoMount(t *testing.T) {
	testenv.Root(t)
	for name, end := range map[string]string{"fails": "exit 1", "is killed": "exec sleep 60"} {
		t.Run(name, func(t *testing.T) {
			dir := testenv.Scratch(t)
			script := "#!/bin/sh\nmount -t tmpfs helper \"$2\"\n: >" + dir + "/mounted\n" + end + "\n"
			if err := os.WriteFile(dir+"/mount.fuse3", []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			target := dir + "/t"
			if err := os.Mkdir(target, 0o755); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go func() {
				for {
					if _, err := os.Stat(dir + "/mounted"); err == nil {
						cancel()
						return
					}
					time.Sleep(time.Millisecond)
				}
			}()
			if err := All(ctx, []Mount{{Type: "fuse3.test", Source: "src"}}, target); err == nil {
				t.Error("no error")
			}
			infos, err := List()
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range infos {
				if i.Target == target {
					t.Errorf("still mounted: %+v", i)
					_ = Unmount(target, UnmountOptions{Lazy: true})
				}
			}
		})
	}
}
