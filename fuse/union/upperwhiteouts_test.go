package union

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// In whatever way whiteouts are written, what is seen is the same, at once and by
// whoever opens the upper next: a deleted file came back where no devices may be made,
// since whiteouts of the upper were looked for as devices alone.
func TestWhiteoutsOfTheUpperInEveryEncoding(t *testing.T) {
	testenv.Root(t)
	base := testenv.FS(t, "tmpfs")
	var want, tree []string
	for _, x := range []struct {
		name string
		kind whiteoutKind
	}{{"device", whiteoutDevice}, {"xattr", whiteoutXattr}, {"file", whiteoutFile}} {
		c := layersFor(t, base, 2, Config{AUFSWhiteouts: true}, func(l []string) {
			plainLowers(t)(l)
			for i := range 4 {
				put(t, l[1], fmt.Sprintf("d/f%d", i), "low")
				put(t, l[1], fmt.Sprintf("g/f%d", i), "low")
			}
		})
		u := openUnion(t, c)
		u.fs.upper.can.whiteouts, u.fs.upper.can.xattrs = x.kind, x.kind != whiteoutFile
		var said []string
		changesOverWhiteouts(u, func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) })
		list := listing(t, u)
		u.close()
		again := openUnion(t, c)
		if d := diffLines(list, listing(t, again)); d != "" {
			t.Errorf("%s: another mount shows otherwise:\n%s", x.name, d)
		}
		again.close()
		if x.kind == whiteoutDevice {
			want, tree = said, list
		}
		if d := diffLines(want, said); d != "" {
			t.Errorf("%s answers otherwise than with devices:\n%s", x.name, d)
		}
		if d := diffLines(tree, list); d != "" {
			t.Errorf("%s shows otherwise than with devices:\n%s", x.name, d)
		}
	}
}

// changesOverWhiteouts makes whiteouts, and everything that can be made over them.
func changesOverWhiteouts(s side, say func(string, ...any)) {
	say("unlink lower %s", errno(s.unlink("d/x")))
	say("unlink again %s", errno(s.unlink("d/x")))
	_, err := s.stat("d/x")
	say("stat of it %s", errno(err))
	say("unlink copied up %s, %s", errno(s.chmod("d/z", 0o600)), errno(s.unlink("d/z")))
	say("rmdir lower %s", errno(s.rmdir("empty")))
	say("mkdir over it %s", errno(s.mkdir("empty", 0o700)))
	say("rmdir again %s", errno(s.rmdir("empty")))
	for i, make := range []func(string) error{
		func(p string) error { return s.create(p, "new") },
		func(p string) error { return s.symlink("to", p) },
		func(p string) error { return s.mkdir(p, 0o755) },
		func(p string) error { return s.link("a", p) },
	} {
		p := fmt.Sprintf("d/f%d", i)
		say("%s: unlink %s, make %s, make twice %s", p, errno(s.unlink(p)), errno(make(p)), errno(make(p)))
	}
	say("rename over a whiteout %s, %s", errno(s.unlink("g/f0")), errno(s.rename("g/f1", "g/f0", 0)))
	say("rename to another directory %s", errno(s.rename("g/f2", "d/x", 0)))
	say("rename to a new name %s", errno(s.rename("g/f3", "e/f3", 0)))
	say("rename a directory over a whiteout %s, %s", errno(s.mkdir("pure", 0o755)), errno(s.rename("pure", "g/f3", 0)))
	say("exchange %s", errno(s.rename("g/f3", "d/f2", sys.RENAME_EXCHANGE)))
	say("rmdir of what shows nothing %s, %s, %s", errno(s.rmdir("g/f3")), errno(s.unlink("g/f0")), errno(s.rmdir("g")))
	say("mkdir anew %s, create in it %s", errno(s.mkdir("g", 0o755)), errno(s.create("g/f1", "new f1")))
	say("remove it %s, %s", errno(s.unlink("g/f1")), errno(s.rmdir("g")))
	say("replace a full directory %s, %s, %s", errno(s.unlink("e/v")), errno(s.unlink("e/f3")), errno(s.rmdir("e")))
	say("by an empty one %s", errno(s.mkdir("e", 0o755)))
}

// An upper that fuse-overlayfs wrote as an ordinary user: replaced directories have a
// file .wh..wh..opq and an xattr of its own, and what it could not make devices for
// is .wh.NAME. What was deleted showed again.
func TestUpperOfFuseOverlayfs(t *testing.T) {
	testenv.Root(t)
	c := layersFor(t, testenv.FS(t, "tmpfs"), 2, Config{AUFSWhiteouts: true, Redirect: RedirectOn}, plainLowers(t))
	put(t, c.Upper, "d/.wh..wh..opq", "")
	put(t, c.Upper, "d/new", "new")
	put(t, c.Upper, ".wh.a", "")
	put(t, c.Upper, "e/.wh.v", "")
	u := openUnion(t, c)
	defer u.close()
	for _, p := range []string{"a", "d/x", "d/z", "d/sub", "e/v", ".wh.a", "d/.wh..wh..opq"} {
		if _, err := u.stat(p); errno(err) != "no such file or directory" {
			t.Errorf("%s: %s", p, errno(err))
		}
	}
	for p, want := range map[string]string{".": "d e empty sym", "d": "new", "e": ""} {
		if got := shownNames(t, u, p); got != want {
			t.Errorf("%s shows %q, not %q", p, got, want)
		}
	}
	must(t, u.create("a", "anew"))
	must(t, u.mkdir("e/v", 0o755))
	must(t, u.rename("d", "e/v/d", 0))
	must(t, u.create("d", "a file now"))
	must(t, u.rename("e/v", "v", 0))
	if _, err := os.Lstat(filepath.Join(c.Upper, ".wh.a")); !os.IsNotExist(err) {
		t.Errorf("the marker of what is there again: %v", err)
	}
	if got := shownNames(t, u, "v/d"); got != "new" {
		t.Errorf("the moved directory shows %q", got)
	}
}

func shownNames(t *testing.T, s side, p string) string {
	t.Helper()
	list, err := s.readdir(p)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}
