package union

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// mergedNames is what the kernel shows of lower and upper in a directory.
func (s *stage) mergedNames(dir string, options ...string) []string {
	s.t.Helper()
	defer s.kernel(options...)()
	return namesIn(s.t, filepath.Join(s.m, dir))
}

func namesIn(t testing.TB, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// TestWhiteoutsAreTheKernels: what the kernel and we leave of the same removals is
// equal, and the kernel shows ours as removed.
func TestWhiteoutsAreTheKernels(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, kind)
		for _, f := range []string{"one", "two", "copied", "dir/a", "dir/b", "merged/below", "kept"} {
			s.write("lower/"+f, f)
		}
		for _, d := range []string{"upperK", "workK"} {
			must(t, os.Mkdir(s.path(d), 0o755))
		}
		unmount, err := s.mountOver("upperK", "workK")
		must(t, err)
		must(t, os.WriteFile(s.m+"/copied", []byte("new"), 0o644))
		must(t, os.WriteFile(s.m+"/merged/above", []byte("new"), 0o644))
		for _, f := range []string{"one", "two", "copied", "dir", "merged"} {
			must(t, os.RemoveAll(s.m+"/"+f))
		}
		unmount()

		u := s.open()
		uuid := s.lowerRoot()[0].uuid
		for _, f := range []string{"copied", "merged"} {
			must(t, copyUpOne(u, uuid, s.path("lower", f), f, nil))
		}
		merged, err := u.root.Openat("merged", sys.O_PATH, 0)
		must(t, err)
		must(t, u.whiteout(merged.Int(), "below"))
		merged.Close()
		for _, f := range []string{"one", "two", "dir"} {
			must(t, u.whiteout(u.root.Int(), f))
		}
		for _, f := range []string{"copied", "merged"} {
			must(t, u.removeCovered(u.root.Int(), f))
		}
		if left := namesIn(t, s.path("work/work")); len(left) != 1 { // the shared whiteout
			t.Errorf("left in work: %v", left)
		}
		u.close()
		// The kernel's number of links depends on how often it began anew.
		differences(t, "upper", noTimes(lasting(describe(t, s.path("upper"), "."))), noTimes(lasting(describe(t, s.path("upperK"), "."))))
		if got := s.mergedNames("."); !slices.Equal(got, []string{"kept"}) {
			t.Errorf("merged: %v", got)
		}
	})
}

func noTimes(lines []string) (out []string) {
	for _, l := range lines {
		out = append(out, strings.Join(slices.DeleteFunc(strings.Fields(l), mtime.MatchString), " "))
	}
	return out
}

func TestWhiteoutsShareOneInode(t *testing.T) {
	s := newStage(t, "ext4")
	u := s.open()
	for _, n := range []string{"a", "b", "c"} {
		must(t, u.whiteout(u.root.Int(), n))
	}
	sameFile(t, s.path("upper/a"), s.path("upper/c"), 4)
	if err := u.whiteout(u.root.Int(), "a"); err != syscall.EEXIST {
		t.Errorf("where something is: %v", err)
	}
	sameFile(t, s.path("upper/a"), s.path("upper/c"), 4)
}

// TestMoreWhiteoutsThanAnInodeHasLinks: ext4 stops at 65,000.
func TestMoreWhiteoutsThanAnInodeHasLinks(t *testing.T) {
	s := newStage(t, "ext4")
	u := s.open()
	must(t, u.whiteout(u.root.Int(), "first"))
	must(t, os.Mkdir(s.path("many"), 0o700))
	many, err := sys.OpenDir(s.path("many"))
	must(t, err)
	defer many.Close()
	upper, err := sys.OpenDir(s.path("upper")) // u's own is on another mount than many is
	must(t, err)
	defer upper.Close()
	for i := 0; ; i++ { // fill it up
		if err := sys.LinkBare(upper.Int(), "first", many.Int(), "l"+strings.Repeat("x", i%5)+string(rune('a'+i%26))+strconv.Itoa(i)); err != nil {
			if err != syscall.EMLINK || i < 1000 {
				t.Fatal(i, err)
			}
			break
		}
	}
	for _, n := range []string{"last", "next", "one more"} {
		must(t, u.whiteout(u.root.Int(), n))
	}
	must(t, os.WriteFile(s.path("upper/file"), nil, 0o600))
	must(t, u.removeCovered(u.root.Int(), "file"))
	for _, n := range []string{"first", "last", "next", "one more", "file"} {
		if st, err := sys.LstatPath(s.path("upper", n)); err != nil || !st.IsWhiteout() {
			t.Errorf("%s: %+v, %v", n, st, err)
		}
	}
	sameFile(t, s.path("upper/next"), s.path("upper/file"), 4)
}

// encodings runs a test for each way to write a whiteout.
func encodings(t *testing.T, test func(t *testing.T, s *stage, u *upper)) {
	for name, kind := range map[string]whiteoutKind{"device": whiteoutDevice, "xattr": whiteoutXattr, "file": whiteoutFile} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, "ext4")
			u := s.open()
			u.can.whiteouts = kind
			u.can.xattrs = kind != whiteoutFile
			test(t, s, u)
		})
	}
}

// TestEveryWhiteoutEncoding: removing, removing again what was made anew, and making
// over a whiteout, in all encodings. As a lower the first two hide what is below for
// the kernel, too.
func TestEveryWhiteoutEncoding(t *testing.T) {
	encodings(t, func(t *testing.T, s *stage, u *upper) {
		for _, f := range []string{"a", "b", "dir/x", "kept"} {
			s.write("lower/"+f, f)
		}
		s.write("upper/b", "copied")
		must(t, os.Mkdir(s.path("upper/dir"), 0o755))
		d, err := u.root.Openat("dir", sys.O_PATH, 0)
		must(t, err)
		defer d.Close()
		must(t, u.whiteout(u.root.Int(), "a"))
		must(t, u.whiteout(d.Int(), "x"))
		must(t, u.removeCovered(u.root.Int(), "b"))
		must(t, u.removeCovered(u.root.Int(), "dir"))
		hidden := []string{"kept"}
		if u.can.whiteouts == whiteoutFile {
			if got := namesIn(t, s.path("upper")); !slices.Equal(got, []string{".wh.a", ".wh.b", ".wh.dir"}) {
				t.Errorf("upper has %v", got)
			}
		} else if got := s.shownOver("upper", "lower"); !slices.Equal(got, hidden) {
			t.Errorf("the kernel shows %v", got)
		}
		for _, n := range []string{"a", "dir"} {
			temp := u.tempName()
			if n == "dir" {
				must(t, sys.MkdirBare(u.work.Int(), temp, 0o755))
			} else {
				must(t, sys.MknodBare(u.work.Int(), temp, sys.S_IFREG|0o644, 0, 0))
			}
			over := u.overWhiteout
			if u.can.whiteouts == whiteoutFile {
				over = u.overBeside
			}
			must(t, over(temp, u.root.Int(), n, n == "dir"))
		}
		switch got := namesIn(t, s.path("upper")); {
		case u.can.whiteouts == whiteoutFile:
			if !slices.Equal(got, []string{".wh.b", "a", "dir"}) || !slices.Equal(namesIn(t, s.path("upper/dir")), []string{opaqueFile}) {
				t.Errorf("upper has %v and %v", got, namesIn(t, s.path("upper/dir")))
			}
		default:
			if got := s.shownOver("upper", "lower"); !slices.Equal(got, []string{"a", "dir", "kept"}) {
				t.Errorf("the kernel shows %v", got)
			}
			if got := namesIn(t, s.path("upper/dir")); len(got) > 0 {
				t.Errorf("upper/dir has %v", got)
			}
		}
		if left := namesIn(t, s.path("work/work")); len(left) > 1 {
			t.Errorf("left in work: %v", left)
		}
	})
}

// shownOver is what the kernel shows of the root of two lowers.
func (s *stage) shownOver(layers ...string) []string {
	s.t.Helper()
	for i, l := range layers {
		layers[i] = s.path(l)
	}
	must(s.t, sys.Mount("overlay", s.m, "overlay", 0, "lowerdir="+strings.Join(layers, ":")))
	defer testenv.Unmount(s.t, s.m)
	return namesIn(s.t, s.m)
}

// TestEmptyDir: whiteouts inside go, the directory stays as it was and is opaque.
func TestEmptyDir(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, kind)
		zoo(t, s.path("lower"), kind)
		u := s.open()
		must(t, copyUpOne(u, s.lowerRoot()[0].uuid, s.path("lower/dir"), "dir", nil))
		d, err := u.root.Openat("dir", sys.O_PATH, 0)
		must(t, err)
		must(t, u.whiteout(d.Int(), "below"))
		d.Close()
		look := func() []string { // xfs dates a directory that is exchanged
			return noTimes(shownOf([]string{describeOne(t, s.path("upper/dir"), "dir")}))
		}
		before := look()
		must(t, u.emptyDir(u.root.Int(), "dir"))
		differences(t, "dir", look(), before)
		var f facts
		must(t, u.xattrs.readFacts(u.root.Int(), "dir", &f))
		if !f.opaque {
			t.Error("not opaque")
		}
		must(t, os.Remove(s.path("upper/dir")))
		if err := u.emptyDir(u.root.Int(), "none"); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("of nothing: %v", err)
		}
	})
}

// TestRemovePure: a directory that no lower has goes with the whiteouts in it.
func TestRemovePure(t *testing.T) {
	encodings(t, func(t *testing.T, s *stage, u *upper) {
		must(t, os.Mkdir(s.path("upper/dir"), 0o755))
		must(t, os.Mkdir(s.path("upper/empty"), 0o755))
		s.write("upper/file", "x")
		d, err := u.root.Openat("dir", sys.O_PATH, 0)
		must(t, err)
		defer d.Close()
		for _, n := range []string{"a", "b"} {
			must(t, u.whiteout(d.Int(), n))
		}
		must(t, u.removePure(u.root.Int(), "dir", true))
		must(t, u.removePure(u.root.Int(), "empty", true))
		must(t, u.removePure(u.root.Int(), "file", false))
		if left := namesIn(t, s.path("upper")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		if left := namesIn(t, s.path("work/work")); len(left) > 1 {
			t.Errorf("left in work: %v", left)
		}
	})
}
