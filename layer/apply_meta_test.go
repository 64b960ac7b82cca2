package layer

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// testCapability is cap_net_raw+ep (struct vfs_cap_data, revision 2).
const testCapability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// metaEntries are entries that say all that an entry can say.
func metaEntries() []Entry {
	at := func(sec int64, nsec uint32) Timespec { return Timespec{sec, nsec} }
	acl := map[string]string{"system.posix_acl_access": testACL}
	return []Entry{
		{Path: "d", Type: TypeDir, Mode: 0o2750, UID: 3, GID: 4, ModTime: at(7, 1)},
		{Path: "d/f", Type: TypeReg, Mode: 0o644, ModTime: at(8, 999_999_999)},
		{Path: "d/sub", Type: TypeDir, Mode: 0o755, ModTime: at(9, 0)},
		{Path: "closed", Type: TypeDir, Mode: 0, ModTime: at(5, 5)},
		{Path: "closed/f", Type: TypeReg, Mode: 0, ModTime: at(5, 5)},
		{Path: "suid", Type: TypeReg, Mode: 0o6755, UID: 1000, GID: 1000, Size: 4, ModTime: at(10, 10)},
		{Path: "cap", Type: TypeReg, Mode: 0o4755, UID: 5, GID: 0, Size: 4, ModTime: at(11, 11), Xattrs: map[string]string{"security.capability": testCapability, "user.a": ""}},
		{Path: "sticky", Type: TypeDir, Mode: 0o1777, ModTime: at(12, 12)},
		{Path: "max", Type: TypeReg, Mode: 0o600, UID: 4_294_967_294, GID: 4_294_967_294, ModTime: at(1<<31+5, 0)},
		{Path: "before", Type: TypeReg, Mode: 0o600, ModTime: at(-1, 500_000_000)},
		{Path: "link", Type: TypeSymlink, Mode: 0o777, UID: 9, GID: 9, Linkname: "/../d//./f", ModTime: at(13, 13), Xattrs: map[string]string{"trusted.l": "v\x00\n="}},
		{Path: "fifo", Type: TypeFifo, Mode: 0o666, UID: 1, ModTime: at(14, 14)},
		{Path: "char", Type: TypeChar, Mode: 0o2660, GID: 6, Major: 511, Minor: 262_143, ModTime: at(15, 15)},
		{Path: "block", Type: TypeBlock, Mode: 0o640, Major: 8, Minor: 0, ModTime: at(16, 16)},
		{Path: "acl", Type: TypeReg, Mode: 0o775, ModTime: at(17, 17), Xattrs: acl},
		{Path: "default", Type: TypeDir, Mode: 0o755, ModTime: at(18, 18), Xattrs: map[string]string{"system.posix_acl_default": testACL, "user.many": strings.Repeat("v", 2000)}},
		{Path: "default/f", Type: TypeReg, Mode: 0o640, ModTime: at(19, 19)},
		{Path: "default/d", Type: TypeDir, Mode: 0o700, ModTime: at(19, 20)},
		{Path: "default/d/f", Type: TypeReg, Mode: 0o604, ModTime: at(19, 21)},
		{Path: "default/p", Type: TypeFifo, Mode: 0o604, ModTime: at(19, 21)},
		{Path: "caf\xe9\n\xff=", Type: TypeReg, Mode: 0o644, ModTime: at(20, 0)},
		{Path: strings.Repeat("n", 255), Type: TypeDir, Mode: 0o755, ModTime: at(21, 0)},
		{Path: strings.Repeat("n", 255) + "/" + strings.Repeat("m", 255), Type: TypeSymlink, Mode: 0o777, Linkname: strings.Repeat("t/", 500), ModTime: at(22, 0)},
	}
}

// addEntry writes a header with everything in PAX records, as tests need names
// that archive/tar's own choice of format refuses.
func addEntry(a *testTar, e *Entry) {
	h := tar.Header{
		Typeflag: map[FileType]byte{TypeDir: tar.TypeDir, TypeReg: tar.TypeReg, TypeSymlink: tar.TypeSymlink,
			TypeFifo: tar.TypeFifo, TypeChar: tar.TypeChar, TypeBlock: tar.TypeBlock}[e.Type],
		Name: e.Path, Linkname: e.Linkname, Mode: int64(e.Mode), Uid: int(e.UID), Gid: int(e.GID), Size: e.Size,
		Devmajor: int64(e.Major), Devminor: int64(e.Minor), ModTime: time.Unix(e.ModTime.Sec, int64(e.ModTime.Nsec)), Format: tar.FormatPAX,
	}
	for n, v := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxSchily+n] = v
	}
	if err := a.w.WriteHeader(&h); err != nil {
		panic(fmt.Sprint(e.Path, err))
	}
	if _, err := a.w.Write(bytes.Repeat([]byte("x"), int(e.Size))); err != nil {
		panic(err)
	}
}

func checkEntries(t *testing.T, dir string, want []Entry) {
	t.Helper()
	fd, err := sys.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	for _, w := range want {
		got, err := ReadEntry(fd, w.Path)
		if err != nil {
			t.Error(err)
			continue
		}
		if got.Path = w.Path; !reflect.DeepEqual(got, w) {
			t.Errorf("%q:\n got %+v\nwant %+v", w.Path, got, w)
		}
	}
}

// The whole metadata of every type arrives, whatever the umask, and wherever the
// directory around would pass on something else.
func TestApplyMetadata(t *testing.T) {
	testenv.Root(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		for _, mask := range []int{0, 0o22, 0o77, 0o777} {
			t.Run(fmt.Sprintf("%s/%03o", kind, mask), func(t *testing.T) {
				dir := testenv.FS(t, kind)
				defer syscall.Umask(syscall.Umask(mask))
				root := filepath.Join(dir, "t")
				if err := errors.Join(os.Mkdir(root, 0o755), os.Chmod(root, 0o2755), os.Chown(root, 0, 77)); err != nil {
					t.Fatal(err)
				}
				a := newTar()
				want := metaEntries()
				for _, e := range want {
					addEntry(a, &e)
				}
				if err := Apply(t.Context(), root, bytes.NewReader(a.bytes()), ApplyOptions{}); err != nil {
					t.Fatal(err)
				}
				checkEntries(t, root, want)
			})
		}
	}
}

// A file system mounted with grpid gives every file its directory's group.
func TestApplyOwnerOnGrpid(t *testing.T) {
	dir := testenv.FS(t, "ext4", testenv.MountOptions("grpid"))
	if err := os.Chown(dir, 0, 77); err != nil {
		t.Fatal(err)
	}
	want := []Entry{{Path: "f", Type: TypeReg, Mode: 0o644}, {Path: "d", Type: TypeDir, Mode: 0o755}, {Path: "d/l", Type: TypeSymlink, Mode: 0o777, Linkname: "x"}}
	a := newTar()
	for _, e := range want {
		addEntry(a, &e)
	}
	if err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{}); err != nil {
		t.Fatal(err)
	}
	checkEntries(t, dir, want)
}

// An entry of a directory that is there says all about it: what it does not
// mention is gone, xattrs too.
func TestApplyDirectoryEntryIsTheWholeState(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	first, second := newTar(), newTar()
	addEntry(first, &Entry{Path: "d", Type: TypeDir, Mode: 0o2777, UID: 4, GID: 5, Xattrs: map[string]string{"user.a": "1", "user.b": "1", "system.posix_acl_default": testACL, "trusted.t": "x"}})
	addEntry(first, &Entry{Path: "d/f", Type: TypeReg})
	want := []Entry{{Path: "d", Type: TypeDir, Mode: 0o755, GID: 5, ModTime: Timespec{3, 3}, Xattrs: map[string]string{"user.b": "2"}}}
	addEntry(second, &want[0])
	for _, a := range []*testTar{first, second} {
		if err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	checkEntries(t, dir, want)
}

// What the archive does not name keeps its time, however much happens below.
func TestApplyKeepsTimesOfDirectoriesItPassesThrough(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	mustTar(t, dir, parseTar("d a\nd a/b\nf a/b/x=1\nd c\nf c/y=1"))
	before := treeState(t, dir)
	mustTar(t, dir, parseTar("f a/b/z=1\nw a/b/x\nw c/y\nl c/s->../a\nf c/s/n=1"))
	after := treeState(t, dir)
	for _, p := range []string{".", "a", "a/b", "c"} {
		if before[p] != after[p] {
			t.Errorf("%s was %s, is %s", p, before[p], after[p])
		}
	}
}

func mustTar(t testing.TB, dir string, archive []byte) {
	t.Helper()
	if err := Apply(t.Context(), dir, bytes.NewReader(archive), ApplyOptions{Volatile: true}); err != nil {
		t.Fatal(err)
	}
}

// What overlayfs keeps for itself never comes out of an archive.
func TestApplyDropsXattrsOfOverlayfs(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	a := newTar()
	h := dirHeader("d/")
	h.PAXRecords = map[string]string{
		"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/x", "SCHILY.xattr.user.kept": "1",
		"LIBARCHIVE.xattr.trusted.overlay.metacopy": base64.StdEncoding.EncodeToString([]byte("x")),
	}
	a.add(h)
	mustTar(t, dir, a.bytes())
	if x, err := allXattrs(dir + "/d"); err != nil || x != ` "user.kept"="1"` {
		t.Errorf("xattrs%s, %v", x, err)
	}
}

// libarchive's spelling of xattrs: encoded name, value in base64 with or without
// padding.
func TestApplyLibarchiveXattrs(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	a := newTar()
	h := tar.Header{Name: "f", PAXRecords: map[string]string{
		"LIBARCHIVE.xattr.user.k%3Dv": base64.StdEncoding.EncodeToString([]byte("\x00ab\xff")),
		"LIBARCHIVE.xattr.user.raw":   base64.RawStdEncoding.EncodeToString([]byte("q")),
		"LIBARCHIVE.xattr.user.both":  base64.StdEncoding.EncodeToString([]byte("libarchive")),
		"SCHILY.xattr.user.both":      "star",
	}}
	a.add(h, "")
	mustTar(t, dir, a.bytes())
	want := ` "user.both"="star" "user.k=v"="\x00ab\xff" "user.raw"="q"`
	if x, err := allXattrs(dir + "/f"); err != nil || x != want {
		t.Errorf("xattrs%s, %v\nwant%s", x, err, want)
	}
	for k, v := range map[string]string{"LIBARCHIVE.xattr.user.x": "!", "LIBARCHIVE.xattr.user.%zz": "aaaa"} {
		a := newTar()
		a.add(tar.Header{Name: "g", PAXRecords: map[string]string{k: v}}, "")
		err := Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{Volatile: true})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"g"`) {
			t.Errorf("%s=%s: %v", k, v, err)
		}
	}
}

// GNU tar keeps ACLs as text. What it writes is unpacked as the ACL that it read.
func TestApplyTextACLs(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	program := testenv.Program(t, "tar", "tar")
	src, to := filepath.Join(dir, "src"), filepath.Join(dir, "to")
	if err := errors.Join(os.Mkdir(src, 0o755), os.Mkdir(to, 0o755)); err != nil {
		t.Fatal(err)
	}
	a := newTar()
	addEntry(a, &Entry{Path: "f", Type: TypeReg, Mode: 0o775, Xattrs: map[string]string{"system.posix_acl_access": testACL}})
	addEntry(a, &Entry{Path: "d", Type: TypeDir, Mode: 0o755, Xattrs: map[string]string{"system.posix_acl_default": testACL, "user.x": "1"}})
	addEntry(a, &Entry{Path: "plain", Type: TypeReg, Mode: 0o640})
	mustTar(t, src, a.bytes())
	archive, err := exec.Command(program, "--format=posix", "--acls", "--xattrs", "--numeric-owner", "-C", src, "-cf", "-", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(archive, []byte("SCHILY.acl.")) {
		testenv.Optional(t, "this tar has no --acls")
	}
	mustTar(t, to, archive)
	if d := stateDiff(treeState(t, to), treeState(t, src)); d != "" {
		t.Error(d)
	}
}

func TestParseACL(t *testing.T) {
	for text, want := range map[string]string{
		"user::rwx\nuser:1000:rwx\ngroup::r-x\nmask::rwx\nother::r-x\n": testACL,
		"other::r-x,u:joe:rwx:1000,u::rwx,g::r-x,m::rwx # star's":       testACL,
		"user::rwx,group::r-x,mask:rwx,other:r-x,user:1000:rwx":         testACL,
		"user:joe:rwx": "", "user::rwq": "", "nobody::r--": "", "user": "", "mask:5:r--": "", "user:1:r--:2:3": "",
	} {
		got, err := parseACL(text)
		if got != want || (err == nil) != (want != "") || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// A directory that is only below is copied up whole, and the lower stays as it is.
func TestApplyCopiesUpDirectories(t *testing.T) {
	testenv.Root(t)
	fs := testenv.FS(t, "ext4")
	lower, upper := filepath.Join(fs, "l"), filepath.Join(fs, "u")
	if err := errors.Join(os.Mkdir(lower, 0o755), os.Mkdir(upper, 0o755)); err != nil {
		t.Fatal(err)
	}
	dirs := []Entry{
		{Path: "d", Type: TypeDir, Mode: 0o1770, UID: 3, GID: 4, ModTime: Timespec{5, 6}, Xattrs: map[string]string{"user.a": "1", "trusted.b": "2", "system.posix_acl_default": testACL}},
		{Path: "d/e", Type: TypeDir, Mode: 0o2711, UID: 7, GID: 8, ModTime: Timespec{9, 10}},
	}
	a := newTar()
	for _, e := range dirs {
		addEntry(a, &e)
	}
	mustTar(t, lower, a.file("d/e/f", "x").bytes())
	before := treeState(t, lower)
	o := ApplyOptions{Whiteouts: WhiteoutsTrusted, Lower: lower}
	if err := Apply(t.Context(), upper, bytes.NewReader(parseTar("f d/e/new=1\nh d/e/linked->d/e/f")), o); err != nil {
		t.Fatal(err)
	}
	checkEntries(t, upper, dirs)
	if d := stateDiff(treeState(t, lower), before); d != "" {
		t.Errorf("the lower changed:\n%s", d)
	}
	if b, err := os.ReadFile(upper + "/d/e/f"); err != nil || string(b) != "x" {
		t.Errorf("copied up: %q, %v", b, err)
	}
}

// An upper whose lower is not known keeps every whiteout, and Implied names what
// was made up.
func TestApplyWithoutKnowingTheLower(t *testing.T) {
	testenv.Root(t)
	fs := testenv.FS(t, "tmpfs")
	upper := filepath.Join(fs, "u")
	if err := os.Mkdir(upper, 0o755); err != nil {
		t.Fatal(err)
	}
	var implied []string
	o := ApplyOptions{Whiteouts: WhiteoutsTrusted, Implied: func(p string) { implied = append(implied, p) }}
	layer := "w gone\nf a/b/x=1\nd c\nf c/d/y=1\nd c/d\no c\nw e\nf e/f=1\nf g/h/i=1\nf g=1\n" +
		"f k/l/m=1\nf k=1\nd k\nf k/l/n=1"
	if err := Apply(t.Context(), upper, bytes.NewReader(parseTar(layer)), o); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(implied, " "); got != ". a a/b e k/l" {
		t.Errorf("implied %s", got)
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(upper+"/gone", &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFCHR || st.Rdev != 0 {
		t.Errorf("gone is no whiteout: %o %v", st.Mode, err)
	}
	for p, want := range map[string]string{"a": "", "c": ` "trusted.overlay.opaque"="y"`, "c/d": "", "e": ` "trusted.overlay.opaque"="y"`} {
		if x, err := allXattrs(upper + "/" + p); err != nil || x != want {
			t.Errorf("%s has%s, want%s %v", p, x, want, err)
		}
	}
	if err := Apply(t.Context(), upper, bytes.NewReader(parseTar("o .")), o); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("opaque root: %v", err)
	}
}

// Sparse entries in every form that GNU tar writes keep their content, and their
// holes.
func TestApplySparse(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	program := testenv.Program(t, "tar", "tar")
	src := filepath.Join(dir, "src")
	if err := os.Mkdir(src, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(src + "/f")
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(30) {
		if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 5000), i*1_000_000); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(64<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	want := treeState(t, src)["f"]
	for _, format := range []string{"--format=gnu", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0", "--format=posix --hole-detection=raw", ""} {
		args := append(strings.Fields(format), "-cSf", "-", "f")
		if format == "" {
			args = []string{"--format=posix", "-cf", "-", "f"} // whole: Apply finds the holes
		}
		cmd := exec.Command(program, args...)
		cmd.Dir = src
		archive, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, "to")
		if err := os.Mkdir(to, 0o755); err != nil {
			t.Fatal(err)
		}
		mustTar(t, to, archive)
		if got := treeState(t, to)["f"]; got != want && format != "--format=gnu" { // which has whole seconds
			t.Errorf("%q: got %s\nwant %s", format, got, want)
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(to+"/f", &st); err != nil || st.Blocks*512 > 2<<20 || st.Size != 64<<20 {
			t.Errorf("%q: %d bytes in %d: %v", format, st.Size, st.Blocks*512, err)
		}
		err = Apply(t.Context(), to, bytes.NewReader(archive), ApplyOptions{Limits: Limits{Sparse: 1 << 20}})
		if format != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), `"f"`)) {
			t.Errorf("%q: limit on sparse files: %v", format, err)
		}
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
	}
}

// Content of every size around the borders of blocks, holes and parts arrives.
func TestApplyContent(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	a := newTar()
	want := map[string][]byte{}
	add := func(b []byte) {
		name := fmt.Sprint("f", len(want))
		want[name] = b
		a.file(name, string(b))
	}
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*7 + i>>8 + 1)
		}
		return b
	}
	for _, n := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, leastHole - 1, leastHole, leastHole + 1, leastPart, batchBytes - 1, batchBytes, batchBytes + 1, 3*batchBytes + 17} {
		add(random(n))
		add(make([]byte, n))
		add(append(random(n), make([]byte, leastHole+5)...))
		add(append(make([]byte, n), 'x'))
		add(append(append(random(5000), make([]byte, n)...), random(70)...))
	}
	text, _ := listingOf(t, func(l *ListingWriter) error {
		return Apply(t.Context(), dir, bytes.NewReader(a.bytes()), ApplyOptions{Volatile: true, Listing: l})
	})
	for name, b := range want {
		got, err := os.ReadFile(dir + "/" + name)
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: %d bytes differ, %v", name, len(b), err)
		}
	}
	if n := strings.Count(text, "\nf "); n != len(want) {
		t.Errorf("%d files in the listing, want %d", n, len(want))
	}
	for r, err := range ReadListing(strings.NewReader(text)) {
		if err != nil {
			t.Fatal(err)
		}
		if b, ok := want[r.Entry.Path]; ok && r.Digest.Encoded() != fmt.Sprintf("%x", sha256Sum(b)) {
			t.Errorf("%s: wrong digest", r.Entry.Path)
		}
	}
}
