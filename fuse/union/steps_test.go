package union

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// change is one call that takes several steps, and what is done before it.
type change struct {
	name   string
	c      Config
	before func(s *unionSide) error
	do     func(s *unionSide) error

	timeless string // see tree
}

var stranger = Caller{UID: 1000, GID: 1000, Umask: 0o022}

// createAs makes a file as somebody whom the directory does not let write, as the
// kernel's client side has allowed because of a group that we do not know.
func createAs(c Caller, p string) func(s *unionSide) error {
	return func(s *unionSide) error {
		return s.in(p, func(d *Node, name string) error { return s.drop(s.fs.Mknod(c, d, name, 0o640, 0, 0)) })
	}
}

func noop(*unionSide) error { return nil }

var changes = []change{
	{"copy-up by chmod", Config{}, noop, func(s *unionSide) error { return s.chmod("d/sub/y", 0o600) }, ""},
	{"copy-up by write", Config{}, noop, func(s *unionSide) error {
		return s.open("d/sub/y", syscall.O_WRONLY, func(*File) error { return nil })
	}, ""},
	{"copy-up of a large file", Config{}, noop, func(s *unionSide) error { return s.chmod("d/large", 0o600) }, ""},
	{"metacopy", Config{Metacopy: true, Redirect: RedirectOn}, noop, func(s *unionSide) error { return s.chown("d/sub/y", 3, 4) }, ""},
	{name: "metacopy filled in", c: Config{Metacopy: true, Redirect: RedirectOn}, timeless: "d/sub/y:",
		before: func(s *unionSide) error { return s.chown("d/sub/y", 3, 4) },
		do: func(s *unionSide) error {
			return s.open("d/sub/y", syscall.O_WRONLY, func(*File) error { return nil })
		}},
	{"unlink of a lower file", Config{}, noop, func(s *unionSide) error { return s.unlink("d/x") }, ""},
	{"unlink of a copied-up file", Config{}, func(s *unionSide) error { return s.chmod("d/x", 0o600) },
		func(s *unionSide) error { return s.unlink("d/x") }, ""},
	{"rmdir of a merged directory with whiteouts", Config{}, func(s *unionSide) error {
		return errors.Join(s.unlink("e/v"), s.chmod("e", 0o700))
	}, func(s *unionSide) error { return s.rmdir("e") }, ""},
	{"mkdir over a whiteout", Config{}, func(s *unionSide) error { return s.rmdir("empty") },
		func(s *unionSide) error { return s.mkdir("empty", 0o700) }, ""},
	{"create over a whiteout", Config{}, func(s *unionSide) error { return s.unlink("a") },
		func(s *unionSide) error { return s.create("a", "") }, ""},
	{"link over a whiteout", Config{}, func(s *unionSide) error { return errors.Join(s.unlink("a"), s.create("n", "n")) },
		func(s *unionSide) error { return s.link("n", "a") }, ""},
	{"create by a member of a group", Config{}, noop, createAs(stranger, "d/mine"), ""},
	{"rename of a lower file", Config{}, noop, func(s *unionSide) error { return s.rename("d/x", "d/nx", 0) }, ""},
	{"rename of a lower file over another", Config{}, noop, func(s *unionSide) error { return s.rename("d/x", "a", 0) }, ""},
	{"rename over a whiteout", Config{}, func(s *unionSide) error { return s.unlink("a") },
		func(s *unionSide) error { return s.rename("d/x", "a", 0) }, ""},
	{"rename of a new directory over a whiteout", Config{}, func(s *unionSide) error {
		return errors.Join(s.unlink("a"), s.mkdir("nd", 0o755), s.create("nd/f", "f"))
	}, func(s *unionSide) error { return s.rename("nd", "a", 0) }, ""},
	{"rename over a directory with whiteouts", Config{}, func(s *unionSide) error {
		return errors.Join(s.unlink("e/v"), s.mkdir("nd", 0o755), s.create("nd/f", "f"))
	}, func(s *unionSide) error { return s.rename("nd", "e", 0) }, ""},
	{"rename of a merged directory", Config{Redirect: RedirectOn}, noop,
		func(s *unionSide) error { return s.rename("d/sub", "moved", 0) }, ""},
	{"exchange of merged directories", Config{Redirect: RedirectOn}, noop,
		func(s *unionSide) error { return s.rename("d/sub", "e", sys.RENAME_EXCHANGE) }, ""},
}

func (ch *change) layers(t testing.TB, base string) Config {
	return layersFor(t, base, 2, ch.c, plainLowers(t))
}

// tree is the listing without what a half-done change may show: the link count of
// a directory says whether it was copied up already; of a file that gets its data
// the time may be that of now, as with the kernel's overlayfs.
func (ch *change) tree(t testing.TB, s side) string {
	var b strings.Builder
	for _, l := range listing(t, s) {
		l = dirLinks.ReplaceAllString(l, ": 4$1")
		if strings.HasPrefix(l, ch.timeless) {
			l = times.ReplaceAllString(l, "")
		}
		b.WriteString(l + "\n")
	}
	return b.String()
}

var (
	dirLinks = regexp.MustCompile(`: 4(.*) nlink \d+`)
	times    = regexp.MustCompile(` mtime \d+`)
)

// states are the trees before and after a change.
func (ch *change) states(t *testing.T, base string) (before, after string) {
	s := openUnion(t, ch.layers(t, base))
	must(t, ch.before(s))
	before = ch.tree(t, s)
	must(t, ch.do(s))
	after = ch.tree(t, s)
	s.close()
	return before, after
}

// check compares what is there, by either reader, with before and after.
func (ch *change) check(t *testing.T, c Config, what, before, after string) {
	t.Helper()
	u := openUnion(t, c)
	is := ch.tree(t, u)
	u.close()
	if is != before && is != after {
		t.Errorf("%s, %s: neither the old tree nor the new one:\nis  %s\nold %s\nnew %s", ch.name, what, is, before, after)
	}
	k := mountKernel(t, c)
	if d := ch.tree(t, k); d != is {
		t.Errorf("%s, %s: the kernel sees\n%s\nand the union\n%s", ch.name, what, d, is)
	}
	k.close()
}

// TestChangesFailAtEachStep: an error between two steps leaves the old tree, or
// the new one if it comes too late, on disk and in memory; and one can go on.
func TestChangesFailAtEachStep(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	for _, ch := range changes {
		before, after := ch.states(t, base)
		steps := 0
		for at := 1; ; at++ {
			seen, reached := -1_000_000, ""
			c := ch.layers(t, base)
			c.Step = func(step string) error {
				if seen++; seen == at {
					reached = step
					return syscall.EDQUOT
				}
				return nil
			}
			s := openUnion(t, c)
			must(t, ch.before(s))
			seen = 0
			err := ch.do(s)
			seen = -1_000_000
			is := ch.tree(t, s)
			if err == nil && is != after || err != nil && is != before {
				t.Errorf("%s, failed after %q with %v: in memory neither the old tree nor the new one:\nis  %s\nold %s\nnew %s",
					ch.name, reached, err, is, before, after)
			}
			s.close()
			c.Step = nil
			ch.check(t, c, "failed after "+reached, before, after)
			if reached == "" {
				break
			}
			steps++
		}
		if steps == 0 {
			t.Errorf("%s has no steps", ch.name)
		}
	}
}

// crashEnv tells a child what to do and where to die.
const crashEnv = "UNION_CRASH"

type crash struct {
	Change, Step int
	Config       Config
}

// TestChangesKilledAtEachStep: a server that dies between two steps leaves the old
// tree or the new one.
func TestChangesKilledAtEachStep(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	for i, ch := range changes {
		before, after := ch.states(t, base)
		for at := 1; ; at++ {
			c := ch.layers(t, base)
			order, err := json.Marshal(crash{i, at, c})
			must(t, err)
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestCrashChild$", "-test.count=1")
			cmd.Env = append(os.Environ(), crashEnv+"="+string(order))
			out, err := cmd.CombinedOutput()
			code := cmd.ProcessState.ExitCode()
			if err != nil && code != crashed {
				t.Fatalf("%s: %v\n%s", ch.name, err, out)
			}
			ch.check(t, c, "killed at step "+strconv.Itoa(at), before, after)
			if left, err := os.ReadDir(filepath.Join(c.Work, "work")); err != nil || len(left) > 0 {
				t.Errorf("%s: work is not empty after a new mount: %v %v", ch.name, left, err)
			}
			if code != crashed {
				break
			}
		}
	}
}

// crashed is the exit status of a child that died as it was told.
const crashed = 42

// TestCrashChild does nothing but in the children of the test above.
func TestCrashChild(t *testing.T) {
	order := os.Getenv(crashEnv)
	if order == "" {
		return
	}
	var o crash
	must(t, json.Unmarshal([]byte(order), &o))
	armed, seen := false, 0
	o.Config.Step = func(string) error {
		if armed {
			if seen++; seen == o.Step {
				os.Exit(crashed)
			}
		}
		return nil
	}
	fs, err := Open(context.Background(), o.Config)
	must(t, err)
	s := &unionSide{t: t, fs: fs}
	must(t, changes[o.Change].before(s))
	armed = true
	must(t, changes[o.Change].do(s))
	s.close()
}
