package union

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// upperChange is one change of an upper that has several steps.
type upperChange struct {
	name    string
	index   bool
	prepare func(s *stage, u *upper)
	do      func(s *stage, u *upper) error
}

// with returns the change done by an upper that can do less.
func (c upperChange) with(name string, less func(*upper)) upperChange {
	prepare, do := c.prepare, c.do
	c.name += " " + name
	c.prepare = func(s *stage, u *upper) { less(u); prepare(s, u) }
	c.do = func(s *stage, u *upper) error { less(u); return do(s, u) }
	return c
}

func copyUpChange(name string, request func(*copyRequest)) upperChange {
	return upperChange{name: "copy-up of " + name, prepare: func(*stage, *upper) {}, do: func(s *stage, u *upper) error {
		return copyUpOne(u, s.lowerRoot()[0].uuid, s.path("lower", name), name, request)
	}}
}

func noTmpfile(u *upper) { u.can.tmpfile = kprobe.No }
func byXattr(u *upper)   { u.can.whiteouts = whiteoutXattr }

// changes are all of them. What they work on is made by crashStage.
func upperChanges() []upperChange {
	up := func(s *stage, u *upper, name string) {
		must(s.t, copyUpOne(u, s.lowerRoot()[0].uuid, s.path("lower", name), name, nil))
	}
	remove := func(name string) upperChange {
		return upperChange{name: "removal of " + name, prepare: func(s *stage, u *upper) { up(s, u, name) },
			do: func(_ *stage, u *upper) error { return u.removeCovered(u.root.Int(), name) }}
	}
	mergedEmpty := func(s *stage, u *upper) {
		up(s, u, "dir")
		d, err := u.root.Openat("dir", sys.O_PATH, 0)
		must(s.t, err)
		must(s.t, u.whiteout(d.Int(), "below"))
		d.Close()
	}
	removeDir := remove("dir")
	removeDir.prepare = mergedEmpty
	over := func(dir bool) upperChange {
		return upperChange{name: fmt.Sprintf("made over a whiteout (directory %v)", dir),
			prepare: func(s *stage, u *upper) { must(s.t, u.whiteout(u.root.Int(), "dir")) },
			do: func(_ *stage, u *upper) error {
				temp := u.tempName()
				err := sys.MknodBare(u.work.Int(), temp, sys.S_IFREG|0o644, 0, 0)
				if dir {
					_ = sys.UnlinkBare(u.work.Int(), temp, 0)
					err = sys.MkdirBare(u.work.Int(), temp, 0o755)
				}
				if err == nil {
					err = u.overWhiteout(temp, u.root.Int(), "dir", dir)
				}
				if err != nil {
					u.discard(temp)
				}
				return err
			}}
	}
	indexed := copyUpChange("linked", func(r *copyRequest) { r.shared, r.nlink = true, 2 })
	indexed.index = true
	fillIn := upperChange{name: fillInName, prepare: func(s *stage, u *upper) {
		must(s.t, copyUpOne(u, s.lowerRoot()[0].uuid, s.path("lower/suid"), "suid", func(r *copyRequest) { r.what = copyMeta }))
	}, do: func(s *stage, u *upper) error {
		up, err := u.root.Openat("suid", sys.O_PATH, 0)
		if err != nil {
			return err
		}
		defer up.Close()
		low, err := sys.Open(s.path("lower/suid"), sys.O_PATH, 0)
		if err != nil {
			return err
		}
		defer low.Close()
		return u.copyUpData(context.Background(), up.Int(), low.Int(), 0)
	}}
	all := []upperChange{copyUpChange("plain", nil), copyUpChange("plain", nil).with("without O_TMPFILE", noTmpfile), copyUpChange("symlink", nil),
		copyUpChange("dir", nil), copyUpChange("suid", func(r *copyRequest) { r.what = copyMeta }), indexed, fillIn,
		remove("plain"), removeDir, over(false), over(true),
		{name: "whiteout of plain", prepare: func(*stage, *upper) {}, do: func(_ *stage, u *upper) error { return u.whiteout(u.root.Int(), "plain") }},
		{name: "emptying of dir", prepare: mergedEmpty, do: func(_ *stage, u *upper) error { return u.emptyDir(u.root.Int(), "dir") }},
		{name: "removal of a directory of the upper", prepare: func(s *stage, u *upper) {
			must(s.t, os.Mkdir(s.path("upper/own"), 0o755))
			d, err := u.root.Openat("own", sys.O_PATH, 0)
			must(s.t, err)
			must(s.t, u.whiteout(d.Int(), "w"))
			d.Close()
		}, do: func(_ *stage, u *upper) error { return u.removePure(u.root.Int(), "own", true) }},
	}
	return append(all, remove("plain").with("by xattr", byXattr), over(true).with("by xattr", byXattr))
}

// crashStage is a stage for a change, prepared.
func (c upperChange) stage(t testing.TB, kind string) *stage {
	t.Helper()
	s := newStage(t, kind)
	for name, content := range map[string]string{"plain": "some text", "suid": strings.Repeat("#!", 100000), "linked": "two names", "dir/below": "x"} {
		s.write("lower/"+name, content)
	}
	must(t, os.Link(s.path("lower/linked"), s.path("lower/linked2")))
	must(t, os.Symlink("target", s.path("lower/symlink")))
	low := s.lowerRoot()[0].fd
	for i, name := range []string{"plain", "suid", "symlink", "dir"} {
		must(t, sys.ChownBare(low, name, uint32(1000+i), uint32(2000+i)))
		must(t, sys.SetxattrBare(low, name, "trusted.any", []byte("value"), 0))
		must(t, sys.UtimesBare(low, name, sys.Time{Sec: 1}, sys.Time{Sec: int64(2 + i), Nsec: 3}))
	}
	for i, name := range []string{"linked", "dir/below"} {
		must(t, os.Chtimes(s.path("lower", name), time.Unix(1, 0), time.Unix(int64(8+i), 0)))
	}
	must(t, sys.ChmodBare(low, "suid", 0o4755))
	must(t, sys.SetxattrBare(low, "suid", xattrCapability, []byte(someCapability), 0))
	u := c.open(s, nil)
	c.prepare(s, u)
	u.close()
	return s
}

func (c upperChange) open(s *stage, step func(string) error) *upper {
	s.t.Helper()
	set := func(o *Config) { o.Step = step }
	if c.index {
		return s.indexed(set)
	}
	return s.open(set)
}

// view is what the kernel shows of it: everything but times of access, link counts,
// and times of the present, which files that were made have, and a directory for
// whose times a crash between the rename and their setting back came too early.
func (c upperChange) view(s *stage) []string {
	s.t.Helper()
	options := []string{"metacopy=on", "redirect_dir=on"}
	if c.index {
		options = append(options, "index=on")
	}
	defer s.kernel(options...)()
	lines := lasting(describe(s.t, s.m))
	for i, l := range lines {
		lines[i] = present.ReplaceAllString(l, "now")
	}
	return lines
}

var present = regexp.MustCompile(`\b[0-9]{10}\.[0-9]+\b`)

// lost takes out of a view what a kill may cost: see copyUpData.
func (c upperChange) lost(lines []string) (out []string) {
	if c.name != fillInName {
		return lines
	}
	for _, l := range lines {
		if strings.HasPrefix(l, `"suid"`) {
			l = regexp.MustCompile(` (now|3\.3|security.capability=\S+)`).ReplaceAllString(l, "")
		}
		out = append(out, strings.Join(strings.Fields(l), " "))
	}
	return out
}

const fillInName = "data of a metacopy file"

var errInjected = errors.New("injected")

// TestEveryStepMayFail: an error at any step leaves the old tree and nothing in
// work; one after the last step that can fail leaves the new one. The lower is as
// it was.
func TestEveryStepMayFail(t *testing.T) {
	for _, c := range upperChanges() {
		t.Run(c.name, func(t *testing.T) {
			steps, before, after := c.rehearse(t)
			if len(steps) == 0 {
				t.Skip("one system call")
			}
			for i, step := range steps {
				s := c.stage(t, "tmpfs")
				low := describe(t, s.path("lower"))
				n := 0
				u := c.open(s, func(string) error {
					if n++; n == i+1 {
						return errInjected
					}
					return nil
				})
				err := c.do(s, u)
				if left := slices.DeleteFunc(namesIn(t, s.path("work/work")), func(n string) bool {
					st, err := sys.LstatPath(s.path("work/work", n))
					return err == nil && st.IsWhiteout()
				}); len(left) > 0 {
					t.Errorf("%s: left in work: %v", step, left)
				}
				u.close()
				want := before
				if err == nil {
					want = after
				} else if !errors.Is(err, errInjected) {
					t.Fatalf("%s: %v", step, err)
				}
				differences(t, step, c.view(s), want)
				if err != nil {
					u := c.open(s, nil)
					must(t, c.do(s, u))
					u.close()
					differences(t, step+", again", c.view(s), after)
				}
				differences(t, step+": lower", noAtimes(describe(t, s.path("lower"))), noAtimes(low))
			}
		})
	}
}

func noAtimes(lines []string) (out []string) {
	for _, l := range lines {
		i, j := strings.Index(l, " atime "), strings.Index(l, " mtime ")
		out = append(out, l[:i]+l[j:])
	}
	return out
}

// rehearse does the change whole, and tells its steps and what is shown before and
// after.
func (c upperChange) rehearse(t *testing.T) (steps, before, after []string) {
	t.Helper()
	s := c.stage(t, "tmpfs")
	before = c.view(s)
	u := c.open(s, func(step string) error { steps = append(steps, step); return nil })
	must(t, c.do(s, u))
	u.close()
	return steps, before, c.view(s)
}

// TestKilledAtEveryStep: a process that is killed anywhere leaves the old tree or the
// new one, and the next one begins with an empty work.
func TestKilledAtEveryStep(t *testing.T) {
	for k, c := range upperChanges() {
		t.Run(c.name, func(t *testing.T) {
			steps, before, after := c.rehearse(t)
			for i, step := range steps {
				s := c.stage(t, "tmpfs")
				cmd := exec.Command("/proc/self/exe", "-test.run=^TestDiesAtAStep$")
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %s", envDie, k, i, s.dir))
				out, _ := cmd.CombinedOutput()
				if !testenv.Killed(cmd.ProcessState) {
					t.Fatalf("%s: %v\n%s", step, cmd.ProcessState, out)
				}
				u := c.open(s, nil)
				if left := namesIn(t, s.path("work/work")); len(left) > 0 {
					t.Errorf("%s: left in work: %v", step, left)
				}
				u.close()
				now := c.view(s)
				if slices.Equal(now, after) {
					continue
				}
				differences(t, step, c.lost(now), c.lost(before))
				u = c.open(s, nil)
				must(t, c.do(s, u))
				u.close()
				differences(t, step+", again", c.lost(c.view(s)), c.lost(after))
			}
		})
	}
}

const envDie = "LAYERCTL_UNION_DIE"

// TestDiesAtAStep is the process that TestKilledAtEveryStep kills.
func TestDiesAtAStep(t *testing.T) {
	var k, i int
	var dir string
	if n, _ := fmt.Sscanf(os.Getenv(envDie), "%d %d %s", &k, &i, &dir); n != 3 {
		t.Skip("part of another test")
	}
	c, s, n := upperChanges()[k], &stage{t: t, dir: dir}, 0
	u := c.open(s, func(string) error {
		if n++; n == i+1 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	})
	must(t, c.do(s, u))
}

// TestFullUpperKeepsNothingHalf: there is no room for a file's data; nothing of it is
// left, and what fits is copied up still.
func TestFullUpperKeepsNothingHalf(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, "tmpfs") // the lower
		full := newStage(t, kind, testenv.Size(320<<20))
		s.write("lower/big", strings.Repeat("0123456789abcdef", 32<<20/16))
		s.write("lower/small", "x")
		u := full.open()
		full.fill(16 << 20)
		uuid := s.lowerRoot()[0].uuid
		if err := copyUpOne(u, uuid, s.path("lower/big"), "big", nil); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v, want ENOSPC", err)
		}
		if up, work := namesIn(t, full.path("upper")), namesIn(t, full.path("work/work")); len(up)+len(work) > 0 {
			t.Errorf("left: %v in upper, %v in work", up, work)
		}
		must(t, copyUpOne(u, uuid, s.path("lower/small"), "small", nil))
	})
}

// fill takes all room but some bytes.
func (s *stage) fill(leave int64) {
	s.t.Helper()
	var st syscall.Statfs_t
	must(s.t, syscall.Statfs(s.dir, &st))
	f, err := os.Create(s.path("filler"))
	must(s.t, err)
	defer f.Close()
	must(s.t, sys.FallocateBare(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave))
	must(s.t, f.Sync())
}

// TestCopyUpEndsWithItsContext, and leaves nothing.
func TestCopyUpEndsWithItsContext(t *testing.T) {
	s := newStage(t, "tmpfs")
	s.write("lower/big", strings.Repeat("0123456789abcdef", 64<<20/16))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	u := s.open()
	src, err := sys.Open(s.path("lower/big"), sys.O_PATH, 0)
	must(t, err)
	defer src.Close()
	r := copyRequest{src: copySource{fd: src.Int(), data: -1}, dir: u.root.Int(), name: "big"}
	r.src.stat, err = src.Stat("")
	must(t, err)
	if err := u.copyUp(ctx, &r); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if up, work := namesIn(t, s.path("upper")), namesIn(t, s.path("work/work")); len(up)+len(work) > 0 {
		t.Errorf("left: %v in upper, %v in work", up, work)
	}
}
