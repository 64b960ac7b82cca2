package union

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// copyUpAll copies everything in lower up, parents first, as requests changed by
// change.
func copyUpAll(t testing.TB, u *upper, lower string, change func(*copyRequest)) {
	t.Helper()
	root, err := sys.OpenDir(lower)
	must(t, err)
	defer root.Close()
	uuid, err := root.FSUUID()
	must(t, err)
	err = filepath.WalkDir(lower, func(p string, _ os.DirEntry, err error) error {
		if err != nil || p == lower {
			return err
		}
		rel, _ := filepath.Rel(lower, p)
		return copyUpOne(u, uuid, p, rel, change)
	})
	must(t, err)
}

func copyUpOne(u *upper, uuid [16]byte, p, rel string, change func(*copyRequest)) error {
	src, err := sys.Open(p, sys.O_PATH|sys.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dir, err := u.root.Openat2(filepath.Dir(rel), sys.O_PATH|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH)
	if err != nil {
		return err
	}
	defer dir.Close()
	r := copyRequest{src: copySource{fd: src.Int(), data: -1, id: new(fileID)}, dir: dir.Int(), name: filepath.Base(rel)}
	if r.src.stat, err = src.Stat(""); err != nil {
		return err
	}
	if err := identify(src.Int(), "", uuid, r.src.id); err != nil {
		return err
	}
	if change != nil {
		change(&r)
	}
	return u.copyUp(context.Background(), &r)
}

// kernelCopiesUp makes the kernel copy everything up that is below m: files by
// opening them for writing, the rest by linking them for a moment. What is in a
// directory makes it copy the directory.
func kernelCopiesUp(t testing.TB, m string) {
	t.Helper()
	err := filepath.WalkDir(m, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if d.Type().IsRegular() {
			f, err := os.OpenFile(p, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				return err
			}
			return f.Close()
		}
		if err := os.Link(p, filepath.Join(m, "moment")); err != nil {
			return err
		}
		return os.Remove(filepath.Join(m, "moment"))
	})
	must(t, err)
}

// TestCopyUpIsAsTheKernelDoesIt: one of everything, copied up by the kernel and by
// us from one lower: the two uppers are equal to the last xattr, and the kernel
// shows of ours what the lower has, inode numbers too.
func TestCopyUpIsAsTheKernelDoesIt(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, kind)
		zoo(t, s.path("lower"), kind)
		for _, d := range []string{"upperK", "workK"} {
			must(t, os.Mkdir(s.path(d), 0o755))
		}
		kernel := *s
		unmount, err := kernel.mountOver("upperK", "workK")
		must(t, err)
		kernelCopiesUp(t, s.m)
		unmount()

		u := s.open()
		copyUpAll(t, u, s.path("lower"), nil)
		differences(t, "upper", withoutExtents(describe(t, s.path("upper"), ".")), withoutExtents(describe(t, s.path("upperK"), ".")))
		u.close()
		keepsHoles(t, s.path("lower/sparse"), s.path("upper/sparse"))
		want := lasting(shownOf(describe(t, s.path("lower"), ".")))
		unmount, err = kernel.mountOver("upper", "work")
		must(t, err)
		differences(t, "merged", lasting(describe(t, s.m, ".")), want)
		sameInodes(t, s.path("lower"), s.m)
		unmount()
	})
}

// withoutExtents: the kernel copies a megabyte from where data begin, we what is data.
func withoutExtents(lines []string) (out []string) {
	for _, l := range lines {
		out = append(out, strings.Join(slices.DeleteFunc(strings.Fields(l), func(f string) bool { return extent.MatchString(f) }), " "))
	}
	return out
}

// keepsHoles: the copy takes no more than the source.
func keepsHoles(t testing.TB, source, copied string) {
	t.Helper()
	a, err := sys.LstatPath(source)
	must(t, err)
	b, err := sys.LstatPath(copied)
	must(t, err)
	if b.Blocks > a.Blocks || b.Blocks == 0 {
		t.Errorf("%d blocks of 512 bytes, the source has %d", b.Blocks, a.Blocks)
	}
}

// mountOver mounts lower with the kernel under another upper.
func (s *stage) mountOver(upper, work string, options ...string) (func(), error) {
	o := append([]string{"lowerdir=" + s.path("lower"), "upperdir=" + s.path(upper), "workdir=" + s.path(work), "xino=off"}, options...)
	if err := sys.Mount("overlay", s.m, "overlay", 0, strings.Join(o, ",")); err != nil {
		return nil, err
	}
	done := false
	unmount := func() {
		if !done {
			done = true
			testenv.Unmount(s.t, s.m)
		}
	}
	s.t.Cleanup(unmount)
	return unmount, nil
}

// shownOf is what a mount shows of a layer that is described: overlay xattrs hidden,
// those of an overlay inside under their names.
func shownOf(lines []string) (out []string) {
	for _, l := range lines {
		var keep []string
		for f := range strings.FieldsSeq(l) {
			attr, value, is := strings.Cut(f, "=")
			if is && strings.HasPrefix(attr, "trusted.overlay.") {
				shown, ok := trustedNames.toShown(attr)
				if !ok {
					continue
				}
				f = shown + "=" + value
			}
			keep = append(keep, f)
		}
		out = append(out, strings.Join(keep, " "))
	}
	return out
}

// lasting takes out of a description what a copy-up may change (link counts, times
// of access), and what two file systems do not agree on (extents, sync flags).
func lasting(lines []string) (out []string) {
	cut := func(l, from, to string) string {
		i := strings.Index(l, from)
		if i < 0 {
			return l
		}
		j := strings.Index(l[i+1:], to)
		if j < 0 {
			return l
		}
		return l[:i] + l[i+1+j:]
	}
	for _, l := range lines {
		l = cut(cut(l, " links ", " rdev "), " atime ", " mtime ")
		l = strings.Join(slices.DeleteFunc(strings.Fields(l), func(f string) bool { return extent.MatchString(f) }), " ")
		fields := strings.Fields(l)
		slices.Sort(fields) // of xattrs
		out = append(out, strings.Join(fields, " "))
	}
	return out
}

var extent = regexp.MustCompile(`^[0-9]+-[0-9]+$`)

// sameInodes: the merged tree has the numbers that the lower's objects had before
// they were copied up.
func sameInodes(t testing.TB, lower, m string) {
	t.Helper()
	err := filepath.WalkDir(lower, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == lower {
			return err
		}
		a, err := sys.LstatPath(p)
		must(t, err)
		b, err := sys.LstatPath(m + strings.TrimPrefix(p, lower))
		must(t, err)
		if a.Ino != b.Ino && (a.IsDir() || a.Nlink == 1) {
			t.Errorf("%s: inode %d, the lower's is %d", p, b.Ino, a.Ino)
		}
		return nil
	})
	must(t, err)
}
