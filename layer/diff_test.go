package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

func parseOps(t testing.TB, text string) []treegen.Op {
	t.Helper()
	ops, err := treegen.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return ops
}

const baseTree = `
mkdir path="d" mode=0755 sec=1000
create path="d/f" mode=0644 size=5000 seed=1 sec=1000 nsec=5
create path="d/g" mode=0644 size=10 seed=2 sec=1000
symlink path="l" to="d/f" sec=1000
create path="h1" mode=0644 size=10 seed=3 sec=1000
link path="h1" to="h2"
link path="h1" to="h3"
mknod path="p" mode=010644 sec=1000
utimes path="d" sec=1000
setxattr path="d/g" attr="user.a" value="1"
`

// Every way in which a path can differ, with the aspects that are told of it,
// and the paths beside it that must not be told.
func TestDiffTellsExactlyWhatDiffers(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	for _, c := range []struct {
		name, ops string
		want      []string
	}{
		{"nothing", ``, nil},
		{"a write that changes nothing, mtime put back", `retouch path="d/f"`, nil},
		{"the same bytes by another inode, mtime put back", `
			create path="x" mode=0644 size=10 seed=2 sec=1000
			setxattr path="x" attr="user.a" value="1"
			rename path="x" to="d/g" sec=1
			utimes path="d" sec=1000`, nil},
		{"same size, mtime put back", `rewrite path="d/f" off=4999 size=1 seed=9`, []string{"C d/f (content)"}},
		{"first byte, mtime put back", `rewrite path="d/f" size=1 seed=9`, []string{"C d/f (content)"}},
		{"a nanosecond", `utimes path="d/f" sec=1000 nsec=6`, []string{"C d/f (time)"}},
		{"size and time", `truncate path="d/f" size=5001 sec=1001`, []string{"C d/f (content,time)"}},
		{"zero bytes where bytes were", `rewrite path="d/f" size=5000`, []string{"C d/f (content)"}},
		{"mode", `chmod path="d/f" mode=04644`, []string{"C d/f (mode)"}},
		{"uid", `chown path="d/f" uid=1`, []string{"C d/f (owner)"}},
		{"gid", `chown path="d/f" gid=1`, []string{"C d/f (owner)"}},
		{"owner of a symlink", `chown path="l" gid=1`, []string{"C l (owner)"}},
		{"xattr value", `setxattr path="d/g" attr="user.a" value="2"`, []string{"C d/g (xattr)"}},
		{"xattr removed", `rmxattr path="d/g" attr="user.a"`, []string{"C d/g (xattr)"}},
		{"empty xattr", `setxattr path="d/f" attr="user.e" value=""`, []string{"C d/f (xattr)"}},
		{"overlay's xattr", `setxattr path="d/f" attr="trusted.overlay.opaque" value="y"`, nil},
		{"overlay's user xattr", `setxattr path="d/f" attr="user.overlay.origin" value="y"`, nil},
		{"xattr of a directory", `setxattr path="d" attr="trusted.t" value="y"`, []string{"C d (xattr)"}},
		{"default ACL", `setxattr path="d" attr="system.posix_acl_default" value="\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff \x00\x05\x00\xff\xff\xff\xff"`,
			[]string{"C d (xattr)"}},
		{"capability", `setxattr path="d/f" attr="security.capability" value="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"`, []string{"C d/f (xattr)"}},
		{"symlink's target", `
			unlink path="l"
			symlink path="l" to="d/g" sec=1000`, []string{"C . (time)", "C l (content)"}},
		{"device numbers", `
			unlink path="p"
			mknod path="p" mode=020644 major=1 minor=2 sec=1000`, []string{"C . (time)", "C p (type)"}},
		{"file by directory", `
			unlink path="d/f"
			mkdir path="d/f" mode=0755 sec=1000
			create path="d/f/n" mode=0600 sec=1000
			utimes path="d" sec=1000`, []string{"C d/f (type,mode,time)", "A d/f/n"}},
		{"directory by file", `
			rmtree path="d"
			create path="d" mode=0755 sec=1000`, []string{"C . (time)", "C d (type)"}},
		{"directory made again", `
			recreate path="d" mode=0755 sec=1000
			utimes path="." sec=1000`, []string{"C . (time)", "D d/f", "D d/g"}},
		{"one deletion for a directory", `rmtree path="d" sec=1`, []string{"C . (time)", "D d"}},
		{"a name leaves a group", `
			unlink path="h2"`, []string{"C . (time)", "C h1 (hardlink)", "D h2", "C h3 (hardlink)"}},
		{"a group is split", `
			create path="x" mode=0644 size=10 seed=3 sec=1000
			rename path="x" to="h3"`, []string{"C . (time)", "C h1 (hardlink)", "C h2 (hardlink)", "C h3 (hardlink)"}},
		{"a name joins a group", `link path="h2" to="d/h"`,
			[]string{"C d (time)", "A d/h", "C h1 (hardlink)", "C h2 (hardlink)", "C h3 (hardlink)"}},
		{"content of a group", `rewrite path="h3" size=1 seed=9`, []string{"C h1 (content)", "C h2 (content)", "C h3 (content)"}},
		{"two names become one file", `
			unlink path="d/g"
			link path="d/f" to="d/g" sec=1000`, []string{"C d/f (hardlink)", "C d/g (content,time,xattr,hardlink)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b, _ := trees(t, dir, parseOps(t, baseTree), parseOps(t, c.ops))
			if strings.Contains(strings.Join(c.want, " "), "C . ") {
				if err := sysUtimes(b, epoch.Add(1)); err != nil {
					t.Fatal(err)
				}
			}
			var got []string
			for c, err := range DiffTrees(t.Context(), a, b, DiffOptions{}) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, c.String())
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestDiffLinkGroupsAreWrittenAtTheirFirstName(t *testing.T) {
	_, b, _ := trees(t, t.TempDir(), parseOps(t, `
		mkdir path="z" mode=0755
		create path="z/1" mode=0600 size=3 seed=1
		link path="z/1" to="b"
		link path="z/1" to="a"
		symlink path="s2" to="x"
		link path="s2" to="s1"`), nil)
	heads := map[string]string{}
	for c, err := range DiffTrees(t.Context(), "", b, DiffOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		heads[c.Entry.Path] = c.Entry.Hardlink
		if (c.Open != nil) != (c.Entry.Path == "a") {
			t.Errorf("%s: Open is %v", c.Entry.Path, c.Open != nil)
		}
	}
	want := map[string]string{".": "", "a": "", "b": "a", "s1": "", "s2": "s1", "z": "", "z/1": "a"}
	if fmt.Sprint(heads) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", heads, want)
	}
}

// deep makes n directories, one in the other, with a file in the last.
func deep(t testing.TB, root string, n int, content string) {
	t.Helper()
	at, err := sys.OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := at.Mkdir("directory", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := at.Openat("directory", sys.O_RDONLY|sys.O_DIRECTORY, 0)
		at.Close()
		if err != nil {
			t.Fatal(err)
		}
		at = next
	}
	defer at.Close()
	f, err := at.Openat("file", sys.O_CREAT|sys.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
}

// Paths far beyond PATH_MAX, with few descriptors open.
func TestDiffDeepTrees(t *testing.T) {
	testenv.Slow(t)
	const depth = 1024
	a, b := t.TempDir(), t.TempDir()
	deep(t, a, depth, "one")
	deep(t, b, depth, "two")
	most, last := 0, ""
	for c, err := range DiffTrees(t.Context(), a, b, DiffOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		last = c.Entry.Path
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, len(fds))
		if c.Open == nil {
			continue
		}
		f, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(f); err != nil || string(text) != "two" {
			t.Fatalf("content is %q, %v", text, err)
		}
		f.Close()
	}
	if want := strings.Repeat("directory/", depth) + "file"; last != want {
		t.Errorf("the last change is at depth %d", strings.Count(last, "/"))
	}
	if most > 2*openDirs+30 {
		t.Errorf("%d descriptors were open", most)
	}
	n := 0
	for _, err := range Walk(t.Context(), b) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != depth+2 {
		t.Errorf("Walk met %d entries", n)
	}
}

func TestDiffLeavesOutWhatNoLayerCarries(t *testing.T) {
	a, b, _ := trees(t, t.TempDir(), parseOps(t, `
		mknod path="old" mode=0140644 sec=5
		create path="s" mode=0600 sec=5
		mkdir path=".wh.same" mode=0700 sec=5`), parseOps(t, `
		mknod path="new" mode=0140644 sec=5
		unlink path="s"
		mknod path="s" mode=0140600 sec=5
		create path=".wh.x" mode=0600 sec=5
		mkdir path=".wh.d" mode=0700 sec=5
		create path=".wh.d/f" mode=0600 sec=5
		link path=".wh.x" to="x" sec=5`))
	_, err := Collect(DiffTrees(t.Context(), a, b, DiffOptions{}))
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), ".wh.d:") {
		t.Errorf("error is %v", err)
	}
	var skipped []string
	got, err := Collect(DiffTrees(t.Context(), a, b, DiffOptions{
		SkipWhiteoutNames: true,
		Skipped:           func(p, why string) { skipped = append(skipped, p) },
	}))
	if want := []string{"D s", "A x"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
	if want := []string{".wh.d", ".wh.d/f", ".wh.x", "new", "s"}; !slices.Equal(skipped, want) {
		t.Errorf("skipped %q", skipped)
	}
}

// A name that is left out is no member of a group: the file beside it is the same.
func TestDiffWhiteoutNamesAreNoMembers(t *testing.T) {
	a, b, _ := trees(t, t.TempDir(), parseOps(t, `create path="x" mode=0600 sec=5`), parseOps(t, `link path="x" to=".wh.y" sec=5`))
	got, err := Collect(DiffTrees(t.Context(), a, b, DiffOptions{SkipWhiteoutNames: true}))
	if err != nil || len(got) != 0 {
		t.Errorf("got %q, %v", got, err)
	}
}

// Collect gives the changes as lines.
func Collect(s func(func(Change, error) bool)) ([]string, error) {
	var lines []string
	for c, err := range s {
		if err != nil {
			return lines, err
		}
		lines = append(lines, c.String())
	}
	return lines, nil
}

func TestDiffOverrideStat(t *testing.T) {
	a, b, _ := trees(t, t.TempDir(), parseOps(t, `
		create path="f" mode=0600 sec=5
		create path="n" mode=0600 sec=5
		setxattr path="f" attr="user.containers.override_stat" value="1:2:0644:file"`), parseOps(t, `
		setxattr path="f" attr="user.containers.override_stat" value="1:3:04755"
		setxattr path="n" attr="user.containers.override_stat" value="0:0:0666:char-1-3"`))
	o := DiffOptions{OverrideStat: true}
	got, err := Collect(DiffTrees(t.Context(), a, b, o))
	if want := []string{"C f (mode,owner)", "C n (type,mode)"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
	for c := range DiffTrees(t.Context(), a, b, o) {
		if c.Entry.Path == "n" && (c.Entry.Major != 1 || c.Entry.Minor != 3 || c.Open != nil || c.Entry.Xattrs != nil) {
			t.Errorf("n is %+v", c.Entry)
		}
	}
	for _, bad := range []string{"", "1:2", "x:0:0644", "0:0:0999", "0:0:0644:what", "0:0:0644:char", "0:0:0644:dir"} {
		e := Entry{Type: TypeReg, Xattrs: map[string]string{overrideXattr: bad}}
		if err := applyOverride(&e); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: error is %v", bad, err)
		}
	}
}

func TestDiffStopsAndLeavesNothingOpen(t *testing.T) {
	_, b, _ := trees(t, t.TempDir(), parseOps(t, baseTree), nil)
	before := openFds(t)
	for range DiffTrees(t.Context(), "", b, DiffOptions{}) {
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	var last error
	for _, err := range DiffTrees(ctx, "", b, DiffOptions{}) {
		n++
		last = err
		cancel()
	}
	if n != 2 || !errors.Is(last, context.Canceled) {
		t.Errorf("%d steps, the last with %v", n, last)
	}
	_, err := Collect(DiffTrees(t.Context(), "", filepath.Join(b, "none"), DiffOptions{}))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if after := openFds(t); after != before {
		t.Errorf("%d descriptors were open before, %d are now", before, after)
	}
}

func openFds(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// A tree must be read as the layer says, whoever changes names meanwhile.
func TestDiffOpensOnlyTheFileThatItMet(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	for _, p := range []string{dir + "/f", secret} {
		if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for c, err := range DiffTrees(t.Context(), "", dir, DiffOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		if c.Entry.Path != "f" {
			continue
		}
		if err := errors.Join(os.Remove(dir+"/f"), os.Symlink(secret, dir+"/f")); err != nil {
			t.Fatal(err)
		}
		if f, err := c.Open(); err == nil {
			t.Error("a symlink was followed")
			f.Close()
		}
		if err := errors.Join(os.WriteFile(dir+"/g", []byte("y"), 0o600), os.Rename(dir+"/g", dir+"/f")); err != nil {
			t.Fatal(err)
		}
		if f, err := c.Open(); !errdefs.IsAborted(err) {
			t.Errorf("another file was opened: %v, %v", f, err)
		}
	}
}

func TestWalkResolvesGroups(t *testing.T) {
	_, b, _ := trees(t, t.TempDir(), parseOps(t, baseTree), nil)
	var got []string
	for e, err := range Walk(t.Context(), b) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.Path+">"+e.Hardlink)
	}
	want := []string{".>", "d>", "d/f>", "d/g>", "h1>", "h2>h1", "h3>h1", "l>", "p>"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestWriteTarRefusesFilesThatChangeMeanwhile(t *testing.T) {
	for name, content := range map[string]string{"grew": "1234", "shrank": "12"} {
		c := Change{Kind: Added, Entry: Entry{Path: "f", Type: TypeReg, Size: 3}}
		c.Open = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }
		_, err := WriteTar(t.Context(), io.Discard, changesOf(c), TarOptions{})
		if !errdefs.IsAborted(err) || !strings.Contains(err.Error(), "f: it "+name) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func changesOf(cs ...Change) func(func(Change, error) bool) {
	return func(yield func(Change, error) bool) {
		for _, c := range cs {
			if !yield(c, nil) {
				return
			}
		}
	}
}

func TestWriteTarRefusals(t *testing.T) {
	dir := func(p string) Change { return Change{Kind: Added, Entry: Entry{Path: p, Type: TypeDir}} }
	for name, cs := range map[string][]Change{
		"out of order":     {dir("b"), dir("a")},
		"twice":            {dir("a"), dir("a")},
		"whiteout name":    {dir("a/.wh.b")},
		"no type":          {{Kind: Added, Entry: Entry{Path: "a"}}},
		"no content":       {{Kind: Added, Entry: Entry{Path: "a", Type: TypeReg, Size: 1}}},
		"root deleted":     {{Kind: Deleted, Entry: Entry{Path: "."}}},
		"no path":          {dir("")},
		"NUL in the path":  {dir("a\x00b")},
		"whiteout deleted": {{Kind: Deleted, Entry: Entry{Path: "a/.wh.b"}}},
	} {
		if _, err := WriteTar(t.Context(), io.Discard, changesOf(cs...), TarOptions{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	wrong := errors.New("wrong")
	_, err := WriteTar(t.Context(), io.Discard, func(yield func(Change, error) bool) { yield(Change{}, wrong) }, TarOptions{})
	if !errors.Is(err, wrong) {
		t.Errorf("error is %v", err)
	}
	full := writerFunc(func(p []byte) (int, error) { return 0, wrong })
	if _, err := WriteTar(t.Context(), full, changesOf(dir("a")), TarOptions{}); !errors.Is(err, wrong) {
		t.Errorf("error is %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Equal trees give equal bytes, whatever they lie on.
func TestTarIsTheSameOnEveryFileSystem(t *testing.T) {
	testenv.Root(t)
	gen := treegen.New(newRand(3), treegen.Config{Root: true})
	base, more := gen.Ops(200), gen.Ops(100)
	var first []byte
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		a, b, _ := trees(t, testenv.FS(t, kind), base, more)
		var out bytes.Buffer
		r, err := WriteTar(t.Context(), &out, DiffTrees(t.Context(), a, b, DiffOptions{}), TarOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Size != int64(out.Len()) || r.Entries < 10 {
			t.Errorf("%s: %+v of %d bytes", kind, r, out.Len())
		}
		if first == nil {
			first = out.Bytes()
		}
		if !bytes.Equal(first, out.Bytes()) {
			t.Errorf("%s gives another tar than ext4", kind)
		}
	}
}
