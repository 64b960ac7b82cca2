package union

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// indexed opens the stage's upper with an index, as an FS does.
func (s *stage) indexed(change ...func(*Config)) *upper {
	s.t.Helper()
	u := s.open(append(change, func(c *Config) { c.Index = true })...)
	must(s.t, s.tieIndex(u))
	return u
}

func (s *stage) tieIndex(u *upper) error {
	low := s.lowerRoot()
	if err := u.mayIndex(low); err != nil {
		return err
	}
	if err := u.verifyOrigins(low[0]); err != nil {
		return err
	}
	return u.cleanIndex(low)
}

func (s *stage) lowerRoot() []layerRoot {
	s.t.Helper()
	f, err := sys.OpenDir(s.path("lower"))
	must(s.t, err)
	s.t.Cleanup(func() { f.Close() })
	uuid, err := f.FSUUID()
	must(s.t, err)
	return []layerRoot{{f.Int(), uuid}}
}

// byIndex makes a request go by way of index as an FS with the options does.
func byIndex(u *upper) func(*copyRequest) {
	return func(r *copyRequest) {
		r.shared = u.exportAll || !r.src.stat.IsDir() && r.src.stat.Nlink > 1
		r.nlink = r.src.stat.Nlink
	}
}

var (
	upperXattr = regexp.MustCompile(`trusted\.overlay\.upper="([^"\\]|\\.)*"`)
	mtime      = regexp.MustCompile(`[0-9]+\.[0-9]+`)
)

// entries describes index; where a directory's entry leads is told in words.
func (s *stage) entries(u *upper, work string) (lines []string) {
	s.t.Helper()
	names, err := os.ReadDir(s.path(work, "index"))
	must(s.t, err)
	for _, e := range names {
		p := s.path(work, "index", e.Name())
		l := lasting([]string{describeOne(s.t, p, e.Name())})[0]
		if e.IsDir() {
			n, err := sys.Open(p, sys.O_PATH, 0)
			must(s.t, err)
			fd, err := u.openIndexedDir(n.Int())
			n.Close()
			must(s.t, err)
			to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			must(s.t, err)
			sys.CloseBare(fd)
			l = e.Name() + upperXattr.ReplaceAllString(l, "") + " to " + filepath.Base(to)
			l = mtime.ReplaceAllString(l, "")
		}
		lines = append(lines, l)
	}
	return lines
}

// TestIndexIsAsTheKernelWritesIt, of files with several links, and with nfs_export
// of everything; and the kernel takes ours.
func TestIndexIsAsTheKernelWritesIt(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		for _, export := range []string{"off", "on"} {
			t.Run("nfs_export="+export, func(t *testing.T) {
				s := newStage(t, kind)
				zoo(t, s.path("lower"), kind)
				options := []string{"index=on", "nfs_export=" + export, "metacopy=off"}
				kernel := *s
				for _, d := range []string{"upperK", "workK"} {
					must(t, os.Mkdir(s.path(d), 0o755))
				}
				unmount, err := kernel.mountOver("upperK", "workK", options...)
				must(t, err)
				kernelCopiesUp(t, s.m)
				unmount()

				u := s.indexed(func(c *Config) { c.NFSExport = export == "on" })
				copyUpAll(t, u, s.path("lower"), byIndex(u))
				got, want := describe(t, s.path("upper"), "."), describe(t, s.path("upperK"), ".")
				differences(t, "upper", withoutExtents(got), withoutExtents(want))
				root, err := sys.OpenDir(s.path("upperK"))
				must(t, err)
				theirs := &upper{root: root, uuid: u.uuid, xattrs: u.xattrs}
				before := s.entries(theirs, "workK")
				root.Close()
				differences(t, "index", s.entries(u, "work"), before)
				u.close()
				unmount, err = kernel.mountOver("upper", "work", options...)
				must(t, err)
				want = lasting(shownOf(describe(t, s.path("lower"), ".")))
				differences(t, "merged", lasting(describe(t, s.m, ".")), want)
				sameFile(t, s.m+"/linked", s.m+"/linked2", 2)
				unmount()
				// And we the kernel's.
				c := *s
				must(t, os.Rename(s.path("upper"), s.path("upperO")))
				must(t, os.Rename(s.path("work"), s.path("workO")))
				must(t, os.Rename(s.path("upperK"), s.path("upper")))
				must(t, os.Rename(s.path("workK"), s.path("work")))
				u = c.indexed(func(c *Config) { c.NFSExport = export == "on" })
				differences(t, "the kernel's index", s.entries(u, "work"), before)
			})
		}
	})
}

// sameFile: two names of one inode, which has n links.
func sameFile(t testing.TB, a, b string, n uint32) {
	t.Helper()
	x, err := sys.LstatPath(a)
	must(t, err)
	y, err := sys.LstatPath(b)
	must(t, err)
	if x.Ino != y.Ino || x.Nlink != n || y.Nlink != n {
		t.Errorf("%s: inode %d of %d links, %s: inode %d of %d links, want one of %d", a, x.Ino, x.Nlink, b, y.Ino, y.Nlink, n)
	}
}

// linkedLower makes a lower file of three names.
func (s *stage) linkedLower() {
	s.t.Helper()
	s.write("lower/a", "content")
	for _, n := range []string{"b", "c"} {
		must(s.t, os.Link(s.path("lower/a"), s.path("lower", n)))
	}
}

// copyUpLinked copies one of its names up, when shown names are left.
func (s *stage) copyUpLinked(u *upper, name string, shown uint32) (*fileID, error) {
	s.t.Helper()
	var id *fileID
	low := s.lowerRoot()[0]
	err := copyUpOne(u, low.uuid, s.path("lower", name), name, func(r *copyRequest) {
		r.shared, r.nlink, id = true, shown, r.src.id
	})
	return id, err
}

// TestLinkCountsAreWhatTheKernelReads, while names are copied up and removed.
func TestLinkCountsAreWhatTheKernelReads(t *testing.T) {
	s := newStage(t, "ext4")
	s.linkedLower()
	look := func(what string, shown uint32, names ...string) {
		t.Helper()
		unmount := s.kernel("index=on")
		defer unmount()
		for _, n := range names {
			sameFile(t, s.m+"/"+n, s.m+"/"+names[0], shown)
		}
		if t.Failed() {
			t.Fatal(what)
		}
	}
	u := s.indexed()
	id, err := s.copyUpLinked(u, "a", 3)
	must(t, err)
	u.close()
	look("one copied up", 3, "a", "b", "c")

	u = s.indexed()
	_, err = s.copyUpLinked(u, "b", 3)
	must(t, err)
	must(t, u.countUpper(id, 3))
	must(t, u.removeCovered(u.root.Int(), "b"))
	u.close()
	look("b removed", 2, "a", "c")

	u = s.indexed()
	must(t, u.countUpper(id, 2))
	must(t, sys.LinkBare(u.root.Int(), "a", u.root.Int(), "d"))
	u.close()
	look("d linked", 3, "a", "c", "d")

	u = s.indexed()
	fd, gone, err := u.openIndexed(id)
	must(t, err)
	var entry, a sys.Stat
	must(t, sys.StatBare(fd, "", &entry))
	must(t, sys.StatBare(u.root.Int(), "a", &a))
	if gone || entry.Ino != a.Ino {
		t.Errorf("the entry opens inode %d, gone %v; a is %d", entry.Ino, gone, a.Ino)
	}
	sys.CloseBare(fd)
	for _, n := range []string{"a", "c", "d"} {
		if n == "c" {
			_, err = s.copyUpLinked(u, "c", 2)
			must(t, err)
		}
		shown := map[string]uint32{"a": 3, "c": 2, "d": 1}[n]
		must(t, u.countUpper(id, shown))
		must(t, u.removeCovered(u.root.Int(), n))
	}
	must(t, u.dropIndexed(id))
	must(t, u.dropIndexed(id)) // again: nothing
	if fd, gone, err := u.openIndexed(id); fd >= 0 || gone || err != nil {
		t.Errorf("after the last name: %d, %v, %v", fd, gone, err)
	}
	u.close()
	look("all removed", 0)
}

// TestOrphansGoWhenTheIndexIsOpened, as the kernel does it, and with nfs_export
// leave a whiteout.
func TestOrphansGoWhenTheIndexIsOpened(t *testing.T) {
	for _, export := range []bool{false, true} {
		t.Run(fmt.Sprintf("nfs_export=%v", export), func(t *testing.T) {
			with := func(c *Config) { c.NFSExport = export }
			ours, theirs := newStage(t, "xfs"), newStage(t, "xfs")
			for _, s := range []*stage{ours, theirs} {
				s.orphans(with, map[bool]int{false: 1, true: 3}[export])
			}
			ours.indexed(with)
			options := []string{"index=on"}
			if export {
				options = append(options, "nfs_export=on", "metacopy=off")
			}
			theirs.kernel(options...)()
			if a, b := ours.indexKinds(), theirs.indexKinds(); !slices.Equal(a, b) {
				t.Errorf("cleaned by us %v, by the kernel %v", a, b)
			}
			want := map[bool]string{false: "[]", true: "[regular whiteout whiteout]"}[export]
			if got := fmt.Sprint(ours.indexKinds()); got != want {
				t.Errorf("left: %v, want %s", got, want)
			}
		})
	}
}

// orphans makes what a power cut could leave: names gone from upper, entries not.
func (s *stage) orphans(with func(*Config), entries int) {
	s.t.Helper()
	s.linkedLower()
	s.write("lower/alone", "x")
	must(s.t, os.Mkdir(s.path("lower/dir"), 0o755))
	u := s.indexed(with)
	defer u.close()
	copyUpAll(s.t, u, s.path("lower"), byIndex(u))
	id, err := s.copyUpLinked(u, "a", 3)
	if !errors.Is(err, syscall.EEXIST) {
		s.t.Fatal(err)
	}
	must(s.t, u.countUpper(id, 3))
	for _, n := range []string{"a", "b", "c", "dir"} {
		must(s.t, u.removeCovered(u.root.Int(), n))
	}
	must(s.t, os.Mkdir(s.path("work/index/#7"), 0))
	if names := s.indexNames(); len(names) != entries+1 {
		s.t.Fatalf("%d entries before: %v", len(names), names)
	}
}

func (s *stage) indexNames() (names []string) {
	s.t.Helper()
	all, err := os.ReadDir(s.path("work/index"))
	must(s.t, err)
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

func (s *stage) indexKinds() (kinds []string) {
	s.t.Helper()
	for _, n := range s.indexNames() {
		if n[0] == '#' {
			continue // the kernel works in index
		}
		st, err := sys.LstatPath(s.path("work/index", n))
		must(s.t, err)
		switch {
		case st.IsWhiteout():
			kinds = append(kinds, "whiteout")
		case st.IsDir():
			kinds = append(kinds, "directory")
		default:
			kinds = append(kinds, "regular")
		}
	}
	slices.Sort(kinds)
	return kinds
}

// TestIndexOfAnotherUpperIsRefused, by both.
func TestIndexOfAnotherUpperIsRefused(t *testing.T) {
	s := newStage(t, "ext4")
	s.indexed().close()
	must(t, os.Rename(s.path("upper"), s.path("old")))
	must(t, os.Mkdir(s.path("upper"), 0o755))
	if _, err := s.tryKernel("index=on"); !errors.Is(err, syscall.ESTALE) {
		t.Errorf("the kernel: %v", err)
	}
	must(t, os.RemoveAll(s.path("upper")))
	must(t, os.Mkdir(s.path("upper"), 0o755)) // without the origin that the kernel wrote before it looked further
	u := s.open(func(c *Config) { c.Index = true })
	if err := s.tieIndex(u); !errors.Is(err, syscall.ESTALE) || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another upper: %v", err)
	}
	u.close()
	must(t, os.RemoveAll(s.path("upper")))
	must(t, os.Rename(s.path("old"), s.path("upper")))
	s.indexed().close()
	must(t, os.Rename(s.path("lower"), s.path("oldlower")))
	must(t, os.Mkdir(s.path("lower"), 0o755))
	u = s.open(func(c *Config) { c.Index = true })
	if err := s.tieIndex(u); !errors.Is(err, syscall.ESTALE) {
		t.Errorf("another lower: %v", err)
	}
}

// TestResolveStaysInTheLayer: a directory beside the layer on its file system is not
// one of it.
func TestResolveStaysInTheLayer(t *testing.T) {
	onEveryFS(t, func(t *testing.T, kind string) {
		s := newStage(t, kind)
		must(t, os.MkdirAll(s.path("lower/in/deep"), 0o755))
		must(t, os.Mkdir(s.path("beside"), 0o755))
		s.write("lower/file", "x")
		low := s.lowerRoot()
		find := func(p string) int {
			t.Helper()
			f, err := sys.Open(p, sys.O_PATH, 0)
			must(t, err)
			defer f.Close()
			var id fileID
			must(t, identify(f.Int(), "", low[0].uuid, &id))
			fd, layer, err := resolve(&id, append([]layerRoot{{low[0].fd, [16]byte{1}}}, low...))
			must(t, err)
			if fd >= 0 {
				var a, b sys.Stat
				must(t, sys.StatBare(fd, "", &a))
				must(t, sys.StatBare(f.Int(), "", &b))
				if a.Ino != b.Ino || layer != 1 {
					t.Errorf("%s: found inode %d in layer %d, want %d in 1", p, a.Ino, layer, b.Ino)
				}
				sys.CloseBare(fd)
			}
			return fd
		}
		for p, want := range map[string]bool{"lower": true, "lower/in/deep": true, "lower/file": true, "beside": false, ".": false} {
			if got := find(s.path(p)) >= 0; got != want {
				t.Errorf("%s: found %v", p, got)
			}
		}
		f, err := os.Create(s.path("lower/gone"))
		must(t, err)
		defer f.Close()
		var id fileID
		must(t, identify(int(f.Fd()), "", low[0].uuid, &id))
		must(t, os.Remove(s.path("lower/gone")))
		f.Close()
		if fd, _, err := resolve(&id, low); fd >= 0 || err != nil {
			t.Errorf("a removed file: %d, %v", fd, err)
		}
	})
}
