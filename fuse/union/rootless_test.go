package union

import (
	"os"
	"testing"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// rootlessLower is what somebody without privileges can make.
func rootlessLower(t testing.TB, s *stage) {
	t.Helper()
	s.write("lower/plain", "text")
	s.write("lower/dir/below", "x")
	sparse(t, s.path("lower/sparse"))
	must(t, os.Symlink("target", s.path("lower/symlink")))
	must(t, sys.MknodBare(s.lowerRoot()[0].fd, "fifo", sys.S_IFIFO|0o640, 0, 0))
	must(t, os.Chmod(s.path("lower/plain"), 0o4750))
	d := s.lowerRoot()[0].fd
	must(t, sys.SetxattrBare(d, "plain", "user.any", []byte("value"), 0))
	must(t, sys.SetxattrBare(d, "plain", "user.overlay.overlay.opaque", []byte("y"), 0))
	must(t, sys.SetxattrBare(d, "dir", "user.overlay.impure", []byte("y"), 0))
	for _, n := range []string{"plain", "symlink", "fifo", "dir", "sparse"} {
		must(t, sys.UtimesBare(d, n, sys.Time{Sec: 5}, sys.Time{Sec: 6, Nsec: 7}))
	}
}

// TestRootlessUpperIsTheKernels: in a user namespace the upper is the one that the
// kernel writes with userxattr, whiteouts too, and each takes the other's.
func TestRootlessUpperIsTheKernels(t *testing.T) {
	if !testenv.InUserNS(t) {
		return
	}
	s := &stage{t: t, dir: testenv.Scratch(t), m: testenv.Scratch(t)}
	must(t, sys.Mount("tmpfs", s.dir, "tmpfs", 0, ""))
	defer sys.Umount(s.dir, sys.MNT_DETACH)
	for _, d := range []string{"lower", "upper", "work", "upperK", "workK"} {
		must(t, os.Mkdir(s.path(d), 0o755))
	}
	rootlessLower(t, s)
	unmount, err := s.mountOver("upperK", "workK", "userxattr")
	must(t, err)
	kernelCopiesUp(t, s.m)
	must(t, os.Remove(s.m+"/plain"))
	must(t, os.RemoveAll(s.m+"/dir"))
	unmount()

	u := s.open()
	if u.xattrs != userNames || u.can.whiteouts != whiteoutDevice || u.can.trusted != kprobe.No || u.can.devices != kprobe.Yes {
		t.Errorf("xattrs %s, abilities %v", u.xattrs.prefix, u.can.results())
	}
	// The kernel knows no file handles here: it writes that the origin is unknown.
	copyUpAll(t, u, s.path("lower"), func(r *copyRequest) { r.src.id = nil })
	must(t, u.removeCovered(u.root.Int(), "plain"))
	must(t, os.Remove(s.path("upper/dir/below")))
	must(t, u.removeCovered(u.root.Int(), "dir"))
	look := func(dir string) (lines []string) { // whiteouts are of the present
		for _, l := range withoutExtents(describe(t, s.path(dir), ".")) {
			lines = append(lines, present.ReplaceAllString(l, "now"))
		}
		return lines
	}
	differences(t, "upper", look("upper"), look("upperK"))
	u.close()
	unmount, err = s.mountOver("upper", "work", "userxattr")
	must(t, err)
	if got := namesIn(t, s.m); len(got) != 3 {
		t.Errorf("merged: %v", got)
	}
	unmount()
	s.open().close()
}
