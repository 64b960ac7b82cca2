package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// genEntry is one random archive entry, short in print.
type genEntry struct {
	Kind  string // dir file symlink link fifo char whiteout opaque
	Path  string
	To    string
	Mode  int64
	Owner int
	Sec   int64
	Xattr string // name
	Data  string
}

func (g genEntry) String() string {
	s := g.Kind + " " + g.Path
	if g.To != "" {
		s += " -> " + g.To
	}
	if g.Kind == "whiteout" || g.Kind == "opaque" {
		return s
	}
	s += fmt.Sprintf(" %o %d %d", g.Mode, g.Owner, g.Sec)
	if g.Xattr != "" {
		s += " " + g.Xattr
	}
	return s
}

// testACL is what gives uid 1000 rwx, beside rwxr-xr-x (struct posix_acl_xattr_header).
const testACL = "\x02\x00\x00\x00" +
	"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x07\x00\xe8\x03\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
	"\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff"

func (g genEntry) addTo(a *testTar) {
	h := tar.Header{Name: g.Path, Mode: g.Mode, Uid: g.Owner, Gid: g.Owner, ModTime: time.Unix(g.Sec, 5)}
	if g.Xattr != "" {
		v := "value"
		if strings.HasPrefix(g.Xattr, "system.") {
			v = testACL
		}
		h.PAXRecords = map[string]string{"SCHILY.xattr." + g.Xattr: v}
	}
	switch g.Kind {
	case "whiteout":
		h.Name = path.Join(path.Dir(g.Path), ".wh."+path.Base(g.Path))
	case "opaque":
		h.Name = path.Join(g.Path, ".wh..wh..opq")
	case "dir":
		h.Typeflag, h.Name = tar.TypeDir, g.Path+"/"
	case "symlink":
		h.Typeflag, h.Linkname = tar.TypeSymlink, g.To
	case "link":
		h.Typeflag, h.Linkname = tar.TypeLink, g.To
	case "fifo":
		h.Typeflag = tar.TypeFifo
	case "char":
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, 1, 3
	}
	if g.Kind == "file" {
		a.add(h, g.Data)
	} else {
		a.add(h)
	}
}

func genTar(entries []genEntry) []byte {
	a := newTar()
	for _, g := range entries {
		g.addTo(a)
	}
	return a.bytes()
}

var (
	genNames   = []string{"a", "b", "c"}
	genTargets = []string{"a", "b", "../c", "/a/b", "a/..", ".", "/", "../../b", "nowhere"}
)

func genPath(t *rapid.T) string {
	n := rapid.SampledFrom([]int{1, 1, 1, 2, 2, 2, 3}).Draw(t, "depth")
	var parts []string
	for range n {
		parts = append(parts, rapid.SampledFrom(genNames).Draw(t, "name"))
	}
	return strings.Join(parts, "/")
}

// genLayer draws the entries of one archive. Without whiteouts it is a base.
func genLayer(t *rapid.T, kinds []string, most int) []genEntry {
	n := rapid.IntRange(1, most).Draw(t, "entries")
	var all []genEntry
	for range n {
		g := genEntry{
			Kind:  rapid.SampledFrom(kinds).Draw(t, "kind"),
			Path:  genPath(t),
			Mode:  rapid.SampledFrom([]int64{0o644, 0o755, 0o600, 0o4711, 0o2775, 0o1777}).Draw(t, "mode"),
			Owner: rapid.SampledFrom([]int{0, 0, 7}).Draw(t, "owner"),
			Sec:   int64(rapid.IntRange(1, 9).Draw(t, "time")),
		}
		switch g.Kind {
		case "opaque":
			if rapid.IntRange(0, 5).Draw(t, "root") == 0 {
				g.Path = "."
			}
		case "symlink":
			g.To = rapid.SampledFrom(genTargets).Draw(t, "target")
		case "link":
			g.To = genPath(t)
		case "file", "dir":
			g.Data = rapid.SampledFrom([]string{"", "x", "yy"}).Draw(t, "data")
			g.Xattr = rapid.SampledFrom([]string{"", "", "", "user.x", "trusted.y", "system.posix_acl_access"}).Draw(t, "xattr")
			if g.Kind == "dir" && rapid.IntRange(0, 3).Draw(t, "default") == 0 {
				g.Xattr = "system.posix_acl_default"
			}
		}
		all = append(all, g)
	}
	return all
}

var (
	baseKinds  = []string{"dir", "dir", "file", "symlink", "fifo"}
	layerKinds = []string{"dir", "dir", "file", "file", "symlink", "link", "fifo", "char", "whiteout", "whiteout", "opaque"}
)

// failer is a test, a property's too.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Context() context.Context
}

// newStack begins with an empty tree in a directory of its own in fs.
func newStack(t failer, fs, name string, w Whiteouts) *stack {
	s := &stack{t: t, w: w, base: filepath.Join(fs, name)}
	if err := os.Mkdir(s.base, 0o755); err != nil {
		t.Fatal(err)
	}
	s.plain = s.mkdir("plain")
	s.mkdir("empty")
	s.mkdir("empty2")
	return s
}

// commit makes the next archive a new layer.
func (s *stack) commit() { s.lower, s.upper = append([]string{s.upper}, s.lower...), "" }

// stack is a tree in two forms: plain, and as overlay layers.
type stack struct {
	t     failer
	base  string // of everything
	w     Whiteouts
	plain string
	lower []string // committed layers, the nearest first
	upper string   // writable, "" if the next archive begins a new layer
	n     int
	err   error // of the last archive, on the plain tree
	open  int   // bound of open directories: a small one must not matter
}

func (s *stack) mkdir(name string) string {
	p := filepath.Join(s.base, name)
	if err := os.Mkdir(p, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.sameRoot(p)
	return p
}

// sameRoot gives an upper the plain tree's root, as a driver does.
func (s *stack) sameRoot(p string) {
	if s.plain == "" || p == s.plain {
		return
	}
	from, err := sys.OpenDir(s.plain)
	if err != nil {
		s.t.Fatal(err)
	}
	defer from.Close()
	to, err := sys.OpenDir(p)
	if err != nil {
		s.t.Fatal(err)
	}
	defer to.Close()
	e, err := ReadEntry(from, "")
	if err != nil {
		s.t.Fatal(err)
	}
	for err := range slices.Values([]error{
		to.Chown("", e.UID, e.GID), to.Chmod(e.Mode),
		to.Utimes("", sys.TimeOmit, sys.Time{Sec: e.ModTime.Sec, Nsec: e.ModTime.Nsec}),
	}) {
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

// mounted calls f with the overlay of the layers, upper on top if it is not "".
func (s *stack) mounted(upper string, lower []string, f func(dir string)) {
	s.n++
	dir, work := s.mkdir(fmt.Sprintf("m%d", s.n)), ""
	lower = append(slices.Clone(lower), filepath.Join(s.base, "empty"))
	if upper == "" && len(lower) == 1 { // overlayfs wants two
		lower = append(lower, filepath.Join(s.base, "empty2"))
	}
	opts := []string{"lowerdir=" + strings.Join(lower, ":")}
	if upper != "" {
		work = s.mkdir(fmt.Sprintf("w%d", s.n))
		opts = append(opts, "upperdir="+upper, "workdir="+work, "index=off")
	}
	opts = append(opts, "metacopy=off", "xino=off")
	if s.w == WhiteoutsUser {
		opts = append(opts, "userxattr")
	} else {
		opts = append(opts, "redirect_dir=off")
	}
	if err := sys.Mount("overlay", dir, "overlay", 0, strings.Join(opts, ",")); err != nil {
		s.t.Fatal(err)
	}
	defer testenv.Unmount(s.t, dir)
	f(dir)
}

// apply unpacks one archive onto both forms; false if both refused it.
func (s *stack) apply(entries []genEntry) bool {
	return s.applyTar(genTar(entries), printEntries(entries))
}

func (s *stack) applyTar(data []byte, printed string) bool {
	if s.upper == "" {
		s.n++
		s.upper = s.mkdir(fmt.Sprintf("u%d", s.n))
	}
	before := s.copyPlain()
	plainList, perr := s.applyListed(s.plain, data, ApplyOptions{})
	var uerr error
	var upperList string
	s.mounted("", s.lower, func(low string) {
		upperList, uerr = s.applyListed(s.upper, data, ApplyOptions{Whiteouts: s.w, Lower: low})
	})
	if (perr == nil) != (uerr == nil) {
		s.t.Fatalf("plain: %v\noverlay: %v\n%s", perr, uerr, printed)
	}
	if s.err = perr; perr != nil {
		return false
	}
	if plainList != upperList {
		s.t.Fatalf("listing, plain:\n%soverlay:\n%s%s", plainList, upperList, printed)
	}
	s.verify(before, plainList, printed)
	return true
}

// applyListed unpacks and returns the listing's text, too.
func (s *stack) applyListed(dir string, data []byte, o ApplyOptions) (string, error) {
	var out bytes.Buffer
	o.Volatile, o.openDirs, o.Listing = true, s.open, NewListingWriter(&out)
	err := Apply(s.t.Context(), dir, bytes.NewReader(data), o)
	if _, cerr := o.Listing.Close(); err != nil || cerr != nil {
		return "", errors.Join(err, cerr)
	}
	r, _, err := Decompress(&out, Limits{})
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Close()
	text, err := io.ReadAll(r)
	return string(text), err
}

func (s *stack) copyPlain() string {
	s.n++
	to := filepath.Join(s.base, fmt.Sprintf("before%d", s.n))
	if out, err := exec.Command("cp", "-a", s.plain, to).CombinedOutput(); err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	return to
}

// verify checks that the listing of an archive is true of the tree, and tells
// all that changed.
func (s *stack) verify(before, listing, printed string) {
	changes := DiffTrees(s.t.Context(), before, s.plain, DiffOptions{})
	for p, err := range VerifyListing(s.t.Context(), s.plain, ReadListing(strings.NewReader(listing)), changes, VerifyOptions{}) {
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Errorf("%s\nlisting:\n%s%s", &p, listing, printed)
	}
	if err := os.RemoveAll(before); err != nil {
		s.t.Fatal(err)
	}
}

// withoutOldGroups drops links to files that have several names already: the
// archive would have to name them all, as overlayfs takes one out of the group.
func (s *stack) withoutOldGroups(entries []genEntry) []genEntry {
	root, err := sys.OpenDir(s.plain)
	if err != nil {
		s.t.Fatal(err)
	}
	defer root.Close()
	return slices.DeleteFunc(entries, func(g genEntry) bool {
		if g.Kind != "link" {
			return false
		}
		fd, err := root.Openat2(g.To, sys.O_PATH|sys.O_NOFOLLOW, 0, sys.RESOLVE_IN_ROOT)
		if err != nil {
			return false
		}
		defer fd.Close()
		st, err := fd.Stat("")
		return err == nil && !st.IsDir() && st.Nlink > 1
	})
}

// compare checks that the kernel shows of the layers what the plain tree is.
func (s *stack) compare(t testing.TB, history string) {
	want := treeState(t, s.plain)
	for _, asUpper := range []bool{true, false} {
		check := func(dir string) {
			if d := stateDiff(treeState(t, dir), want); d != "" {
				s.t.Fatalf("overlay (as upper: %v) differs from the plain tree:\n%s%s", asUpper, d, history)
			}
		}
		if asUpper {
			s.mounted(s.upper, s.lower, check)
		} else {
			s.mounted("", append([]string{s.upper}, s.lower...), check)
		}
	}
}

func printEntries(entries []genEntry) string {
	var b strings.Builder
	for _, g := range entries {
		fmt.Fprintf(&b, "  %s\n", g)
	}
	return b.String()
}

// TestOverlayUpperEqualsPlainTree is the test that matters most: for random
// trees and layers the kernel's overlayfs shows of an upper that Apply made
// exactly what Apply makes of a plain copy, over several layers, each of one or
// two archives, seen as upper and as lower.
func TestOverlayUpperEqualsPlainTree(t *testing.T) {
	testenv.Slow(t)
	for _, w := range []Whiteouts{WhiteoutsTrusted, WhiteoutsUser} {
		t.Run(w.overlayXattr("x"), func(t *testing.T) { testOverlayEqualsPlain(t, w) })
	}
}

func testOverlayEqualsPlain(t *testing.T, w Whiteouts) {
	testenv.Root(t)
	fs := testenv.FS(t, "tmpfs")
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		s := newStack(rt, fs, fmt.Sprint(n), w)
		defer os.RemoveAll(s.base)
		s.open = rapid.SampledFrom([]int{0, 1, 2, 3}).Draw(rt, "open")
		history := ""
		layers := rapid.IntRange(2, 4).Draw(rt, "layers")
		for i := range layers {
			kinds, most := layerKinds, 8
			if i == 0 {
				kinds, most = baseKinds, 12
			}
			entries := s.withoutOldGroups(genLayer(rt, kinds, most))
			history += fmt.Sprintf("archive %d:\n%s", i, printEntries(entries))
			if !s.apply(entries) {
				return
			}
			if rapid.IntRange(0, 3).Draw(rt, "same upper") > 0 || i == layers-1 {
				s.compare(t, history)
				s.commit()
			}
		}
	})
}

// TestWhiteoutsMayStandAnywhere: whiteouts and opaque markers are about what was
// there before, so an archive means the same with them first, last or as they
// come (unless a path goes through what one of them deletes, or fails).
func TestWhiteoutsMayStandAnywhere(t *testing.T) {
	testenv.Root(t)
	fs := testenv.FS(t, "tmpfs")
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		base := genLayer(rt, []string{"dir", "dir", "file", "fifo"}, 12)
		layer := genLayer(rt, []string{"dir", "dir", "file", "file", "fifo", "whiteout", "whiteout", "opaque"}, 8)
		deletes := func(g genEntry) bool { return g.Kind == "whiteout" || g.Kind == "opaque" }
		bring := slices.DeleteFunc(slices.Clone(layer), deletes)
		del := slices.DeleteFunc(slices.Clone(layer), func(g genEntry) bool { return !deletes(g) })
		var want map[string]string
		for i, order := range [][]genEntry{slices.Concat(del, bring), slices.Concat(bring, del), layer} {
			dir := filepath.Join(fs, fmt.Sprint(n, "-", i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				rt.Fatal(err)
			}
			defer os.RemoveAll(dir)
			for _, entries := range [][]genEntry{base, order} {
				err := errors.Join(Apply(rt.Context(), dir, bytes.NewReader(genTar(entries)), ApplyOptions{Volatile: true}), sysUtimes(dir, testTime))
				if err != nil {
					return
				}
			}
			got := treeState(t, dir)
			if want == nil {
				want = got
			}
			if d := stateDiff(got, want); d != "" {
				rt.Fatalf("%sbase:\n%slayer:\n%s", d, printEntries(base), printEntries(order))
			}
		}
	})
}
