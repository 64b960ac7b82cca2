package union

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// stage is a file system with lower, upper and work on it, and a place to mount.
type stage struct {
	t   testing.TB
	dir string
	m   string // mountpoint of kernel
}

var everyFS = []string{"ext4", "xfs", "btrfs", "tmpfs"}

func newStage(t testing.TB, kind string, o ...testenv.Option) *stage {
	t.Helper()
	s := &stage{t: t, dir: testenv.FS(t, kind, o...), m: testenv.Scratch(t)}
	for _, d := range []string{"lower", "upper", "work"} {
		must(t, os.Mkdir(s.path(d), 0o755))
	}
	return s
}

func (s *stage) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// write makes a file, with its directories.
func (s *stage) write(name, content string) {
	s.t.Helper()
	must(s.t, os.MkdirAll(filepath.Dir(s.path(name)), 0o755))
	must(s.t, os.WriteFile(s.path(name), []byte(content), 0o644))
}

func (s *stage) config() *Config {
	return &Config{Lowers: []string{s.path("lower")}, Upper: s.path("upper"), Work: s.path("work")}
}

// open opens the upper with c changed by change.
func (s *stage) open(change ...func(*Config)) *upper {
	s.t.Helper()
	u, err := s.try(change...)
	must(s.t, err)
	s.t.Cleanup(func() { u.close() })
	return u
}

func (s *stage) try(change ...func(*Config)) (*upper, error) {
	c := s.config()
	for _, f := range change {
		f(c)
	}
	return openUpper(context.Background(), c)
}

// kernel mounts lower, upper and work with the kernel's overlayfs and returns
// where, and how to unmount. Options are added to what all agree on.
func (s *stage) kernel(options ...string) (unmount func()) {
	s.t.Helper()
	unmount, err := s.tryKernel(options...)
	must(s.t, err)
	return unmount
}

func (s *stage) tryKernel(options ...string) (unmount func(), err error) {
	s.t.Helper()
	o := []string{"lowerdir=" + s.path("lower"), "upperdir=" + s.path("upper"), "workdir=" + s.path("work"), "xino=off"}
	if err := sys.Mount("overlay", s.m, "overlay", 0, strings.Join(append(o, options...), ",")); err != nil {
		return nil, err
	}
	done := false
	unmount = func() {
		if !done {
			done = true
			testenv.Unmount(s.t, s.m)
		}
	}
	s.t.Cleanup(unmount)
	return unmount, nil
}

// onEveryFS runs a test on each kind of file system.
func onEveryFS(t *testing.T, test func(t *testing.T, kind string)) {
	for _, kind := range everyFS {
		t.Run(kind, func(t *testing.T) { test(t, kind) })
	}
}

func TestAbilities(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, kind)
		u := s.open()
		clone := map[string]kprobe.Answer{"ext4": kprobe.No, "xfs": kprobe.Yes, "btrfs": kprobe.Yes, "tmpfs": kprobe.No}[kind]
		want := abilities{devices: kprobe.Yes, renameWhiteout: kprobe.Yes, exchange: kprobe.Yes, trusted: kprobe.Yes, user: kprobe.Yes,
			tmpfile: kprobe.Yes, clone: clone, handles: kprobe.Yes, types: kprobe.Yes, xattrs: true, whiteouts: whiteoutDevice}
		if u.can != want {
			t.Errorf("%v\nwant %v", u.can.results(), want.results())
		}
		if names, err := u.work.ReadDir(); err != nil || len(names) > 0 {
			t.Errorf("probing left %v, %v", names, err)
		}
	})
}

// TestWorkdirIsAsTheKernelMakesIt: what either made is good for the other, and
// looks the same.
func TestWorkdirIsAsTheKernelMakesIt(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		kernel, ours := newStage(t, kind), newStage(t, kind)
		kernel.kernel("index=on")()
		u := ours.open(func(c *Config) { c.Index = true })
		for _, name := range []string{"", "work", "index"} {
			a, err := sys.LstatPath(kernel.path("work", name))
			must(t, err)
			b, err := sys.LstatPath(ours.path("work", name))
			must(t, err)
			if a.Mode != b.Mode || a.UID != b.UID || a.GID != b.GID {
				t.Errorf("work/%s: mode %o owner %d:%d, the kernel's %o %d:%d", name, b.Mode, b.UID, b.GID, a.Mode, a.UID, a.GID)
			}
		}
		u.close()
		ours.kernel("index=off")()
		kernel.open().close()
		kernel.open(func(c *Config) { c.Index = true }).close()
	})
}

// TestWorkIsEmptied of whatever a killed server left, and of nothing else.
func TestWorkIsEmptied(t *testing.T) {
	s := newStage(t, "ext4")
	s.write("outside/kept", "x")
	s.write("work/work/#1/a/b/c", "x")
	s.write("work/work/#2", "x")
	s.write("work/index/#3/x", "x")
	s.write("work/other", "x")
	must(t, os.Symlink(s.path("outside"), s.path("work/work/#1/a/link")))
	must(t, os.Link(s.path("outside/kept"), s.path("work/work/#1/hard")))
	must(t, os.Chmod(s.path("work/work/#1/a"), 0))
	must(t, os.Chmod(s.path("work/work"), 0))
	deep := s.path("work/work/#1/a/b")
	for range 100 {
		deep += "/d"
	}
	must(t, os.MkdirAll(deep, 0o700))
	u := s.open()
	if names, err := u.work.ReadDir(); err != nil || len(names) > 0 {
		t.Errorf("left: %v, %v", names, err)
	}
	for _, kept := range []string{"outside/kept", "work/other", "work/index/#3/x"} { // index is not this mount's
		if _, err := os.Stat(s.path(kept)); err != nil {
			t.Error(err)
		}
	}
}

// TestEmptyingStopsAtMounts: what somebody mounted in work is not deleted.
func TestEmptyingStopsAtMounts(t *testing.T) {
	s := newStage(t, "tmpfs")
	must(t, os.MkdirAll(s.path("work/work/#1/m"), 0o755))
	must(t, sys.Mount("tmpfs", s.path("work/work/#1/m"), "tmpfs", 0, ""))
	defer sys.Umount(s.path("work/work/#1/m"), 0)
	s.write("work/work/#1/m/kept", "x")
	if _, err := s.try(); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("%v, want EBUSY", err)
	}
	if _, err := os.Stat(s.path("work/work/#1/m/kept")); err != nil {
		t.Error(err)
	}
}

// TestVolatileMarkRefusesTheNextMount, whoever left it.
func TestVolatileMarkRefusesTheNextMount(t *testing.T) {
	kernel, ours := newStage(t, "ext4"), newStage(t, "ext4")
	kernel.kernel("volatile")()
	if _, err := kernel.try(); !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "volatile") {
		t.Errorf("after the kernel: %v", err)
	}
	ours.open(func(c *Config) { c.Volatile = true }).close()
	if _, err := ours.tryKernel(); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("the kernel after us: %v, want EINVAL", err)
	}
	if _, err := ours.try(func(c *Config) { c.Volatile = true }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after ourselves: %v", err)
	}
	must(t, os.RemoveAll(ours.path("work/work/incompat/volatile")))
	ours.open().close()
}

func TestClaimsExcludeEachOther(t *testing.T) {
	s := newStage(t, "ext4")
	u := s.open()
	soon, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if second, err := openUpper(soon, s.config()); err == nil {
		second.close()
		t.Error("two have the upper")
	}
	must(t, os.Mkdir(s.path("work2"), 0o700))
	soon, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	c := s.config()
	c.Work = s.path("work2")
	if second, err := openUpper(soon, c); err == nil {
		second.close()
		t.Error("two have the upper, with different workdirs")
	}
	// One that is just going away is waited for.
	done := make(chan error)
	go func() {
		second, err := openUpper(context.Background(), s.config())
		if err == nil {
			second.close()
		}
		done <- err
	}()
	u.close()
	must(t, <-done)
	unmount := s.kernel()
	if _, err := s.try(); !errdefs.IsFailedPrecondition(err) || !errors.Is(err, syscall.EBUSY) {
		t.Errorf("while the kernel has it: %v", err)
	}
	unmount()
	s.open().close()
}

func TestWorkdirMustFit(t *testing.T) {
	s := newStage(t, "tmpfs")
	must(t, os.MkdirAll(s.path("upper/inside"), 0o755))
	must(t, os.MkdirAll(s.path("work/inside"), 0o755))
	other := testenv.FS(t, "tmpfs")
	for what, c := range map[string]Config{
		"work in upper": {Upper: s.path("upper"), Work: s.path("upper/inside")},
		"upper in work": {Upper: s.path("work/inside"), Work: s.path("work")},
		"the same":      {Upper: s.path("upper"), Work: s.path("upper")},
		"other mount":   {Upper: s.path("upper"), Work: other},
		"none":          {Upper: s.path("upper")},
	} {
		u, err := openUpper(context.Background(), &c)
		if !errdefs.IsInvalidArgument(err) || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v", what, err)
		}
		if err == nil {
			u.close()
		}
	}
	if _, err := os.Stat(s.path("work/work")); err == nil {
		t.Error("something was made")
	}
}

// TestReadOnlyUpperIsNotTouched, nor claimed.
func TestReadOnlyUpperIsNotTouched(t *testing.T) {
	s := newStage(t, "ext4")
	s.open() // somebody has it
	before, err := sys.StatPath(s.path("work"))
	must(t, err)
	u := s.open(func(c *Config) { c.ReadOnly = true })
	after, err := sys.StatPath(s.path("work"))
	must(t, err)
	if u.work != nil || before != after {
		t.Errorf("%+v became %+v", before, after)
	}
	if u.xattrs != trustedNames {
		t.Error("root reads user.overlay.*")
	}
}

func TestTempNamesDiffer(t *testing.T) {
	var u upper
	seen := map[string]bool{}
	for range 1000 {
		n := u.tempName()
		if seen[n] || n[0] != '#' {
			t.Fatal(n)
		}
		seen[n] = true
	}
}
