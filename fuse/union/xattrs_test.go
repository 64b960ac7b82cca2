package union

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestXattrNamesAreEscapedForOverlaysInside(t *testing.T) {
	for _, c := range []struct {
		shown, disk string
		private     bool // disk
	}{
		{"trusted.overlay.opaque", "trusted.overlay.overlay.opaque", false},
		{"trusted.overlay.overlay.opaque", "trusted.overlay.overlay.overlay.opaque", false},
		{"trusted.overlay.", "trusted.overlay.overlay.", false},
		{"trusted.overlay", "trusted.overlay", false},
		{"trusted.overlayx", "trusted.overlayx", false},
		{"user.overlay.opaque", "user.overlay.opaque", false},
		{"security.capability", "security.capability", false},
	} {
		disk, err := trustedNames.toDisk(c.shown)
		if err != nil || disk != c.disk {
			t.Errorf("toDisk(%q) = %q, %v; want %q", c.shown, disk, err, c.disk)
		}
		shown, ok := trustedNames.toShown(c.disk)
		if !ok || shown != c.shown {
			t.Errorf("toShown(%q) = %q, %v; want %q", c.disk, shown, ok, c.shown)
		}
		if trustedNames.private(c.disk) != c.private {
			t.Errorf("private(%q)", c.disk)
		}
	}
	for _, disk := range []string{"trusted.overlay.opaque", "trusted.overlay.", "trusted.overlay.overlay"} {
		if _, ok := trustedNames.toShown(disk); ok || !trustedNames.private(disk) {
			t.Errorf("%q is shown", disk)
		}
	}
	if _, ok := userNames.toShown("trusted.overlay.opaque"); !ok {
		t.Error("with userxattr the other namespace is hidden")
	}
	if _, err := trustedNames.toDisk("trusted.overlay." + strings.Repeat("x", 239)); err != syscall.EOPNOTSUPP {
		t.Errorf("a name that gets too long: %v", err)
	}
}

func TestShowList(t *testing.T) {
	disk := "trusted.overlay.origin\x00user.a\x00trusted.overlay.overlay.opaque\x00security.capability\x00trusted.overlay.impure\x00"
	want := "user.a\x00trusted.overlay.opaque\x00security.capability\x00"
	if got := string(trustedNames.showList([]byte(disk))); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRedirects(t *testing.T) {
	for s, ok := range map[string]bool{
		"a": true, "/a": true, "/a/b": true, "...": true, " ": true,
		"": false, "/": false, "a/b": false, "/a/": false, "//a": false, "/a//b": false, "..": false, ".": false,
		"/a/../b": false, "/./b": false, "a\x00": false, "/" + strings.Repeat("n", 256): false, strings.Repeat("/n", 3000): false,
	} {
		got, err := trustedNames.parseRedirect([]byte(s))
		if (err == nil) != ok || ok && got != s {
			t.Errorf("%.20q: %q, %v", s, got, err)
		}
		if err != nil && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%.20q: %v is not EINVAL, the kernel's answer", s, err)
		}
	}
}

func TestMetacopyValues(t *testing.T) {
	for _, m := range []metacopy{{}, {algo: 1, digest: bytes.Repeat([]byte{7}, 32)}, {algo: 2, digest: make([]byte, 64)}, {flags: 1}} {
		got, err := trustedNames.parseMetacopy(m.encode())
		if err != nil || !reflect.DeepEqual(got, m) {
			t.Errorf("%v: %v, %v", m, got, err)
		}
	}
	for _, b := range [][]byte{{0}, {0, 4, 0}, {1, 4, 0, 0}, {0, 5, 0, 0}, {0, 4, 0, 0, 0}, append([]byte{0, 69, 0, 1}, make([]byte, 65)...)} {
		if m, err := trustedNames.parseMetacopy(b); !errors.Is(err, syscall.EIO) {
			t.Errorf("%x: %v, %v", b, m, err)
		}
	}
}

func TestLinkCounts(t *testing.T) {
	for s, want := range map[string]linkCount{"U+0": {'U', 0}, "U+12": {'U', 12}, "L-3": {'L', -3}, "U-0": {'U', 0}, "L+2147483647": {'L', 1<<31 - 1}} {
		if got, err := trustedNames.parseNlink([]byte(s)); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "U", "U+", "U1", "X+1", "U+1 ", "U+1\n", "U*1", "U+2147483648", "U+999999999999", "u+1"} {
		if got, err := trustedNames.parseNlink([]byte(s)); err == nil {
			t.Errorf("%q is read as %v", s, got)
		}
	}
	for _, c := range []struct {
		c            linkCount
		upper, lower uint32
		want         uint32
		ok           bool
	}{{linkCount{'U', 1}, 2, 9, 3, true}, {linkCount{'L', -1}, 2, 9, 8, true}, {linkCount{'U', -2}, 2, 9, 0, false}, {linkCount{'L', 1<<31 - 1}, 1, 9, 0, false}} {
		if n, ok := c.c.shown(c.upper, c.lower); ok != c.ok || ok && n != c.want {
			t.Errorf("%v over %d, %d: %d, %v", c.c, c.upper, c.lower, n, ok)
		}
	}
}

func TestFileIDs(t *testing.T) {
	id := fileID{uuid: [16]byte{1, 2, 3}, inUpper: true}
	id.handle.Type, id.handle.Len = 0x81, 12
	copy(id.handle.Data[:], "abcdefghijkl")
	b := id.appendTo(nil)
	if want := append([]byte{0, 0xfb, 33, 4 | thisEndian, 0x81, 1, 2, 3}, append(make([]byte, 13), "abcdefghijkl"...)...); !bytes.Equal(b, want) {
		t.Errorf("encoded %x, want %x", b, want)
	}
	var back fileID
	if known, err := back.parse("x", b); !known || err != nil || back != id {
		t.Errorf("%v, %v, %v", back, known, err)
	}
	if known, err := back.parseIndexName(id.indexName()); !known || err != nil || back != id {
		t.Errorf("by index name: %v, %v, %v", back, known, err)
	}
	change := func(i int, v byte) []byte { c := bytes.Clone(b); c[i] = v; return c }
	for what, c := range map[string]struct {
		b       []byte
		invalid bool
	}{
		"empty":              {nil, false},
		"later version":      {change(0, 1), false},
		"unknown flag":       {change(3, 8), false},
		"other byte order":   {change(3, 1^thisEndian), false},
		"no magic":           {change(1, 0), true},
		"shorter than said":  {b[:32], true},
		"header alone, half": {b[:20], true},
		"says too little":    {change(2, 5), true},
		"odd size":           {change(2, 32), true},
		"handle too long":    {append(change(2, 250), make([]byte, 250)...), true},
	} {
		if known, err := back.parse("x", c.b); known || (err != nil) != c.invalid {
			t.Errorf("%s: known %v, %v", what, known, err)
		}
	}
	any := change(3, 2|1^thisEndian)
	if known, err := back.parse("x", any); !known || err != nil {
		t.Errorf("any byte order: %v, %v", known, err)
	}
	for _, n := range []string{"", "0", "zz", "00fb"} {
		if known, err := back.parseIndexName(n); known || err == nil {
			t.Errorf("index name %q: %v, %v", n, known, err)
		}
	}
}

// TestReadFacts: one call tells everything about an object, however it is named.
func TestReadFacts(t *testing.T) {
	dir := testenv.FS(t, "ext4")
	f, err := sys.Open(dir, sys.O_PATH, 0)
	must(t, err)
	defer f.Close()
	must(t, os.Mkdir(dir+"/d", 0o700))
	must(t, os.WriteFile(dir+"/f", nil, 0o600))
	set := func(name, attr, value string) {
		t.Helper()
		must(t, sys.SetxattrBare(f.Int(), name, attr, []byte(value), 0))
	}
	var id fileID
	must(t, identify(f.Int(), "f", [16]byte{1}, &id))
	set("d", "trusted.overlay.opaque", "x")
	set("d", "trusted.overlay.impure", "y")
	set("d", "trusted.overlay.redirect", "/"+strings.Repeat("long/", 100)+"name")
	set("d", "user.overlay.redirect", "not/ours")
	set("f", "trusted.overlay.origin", string(id.appendTo(nil)))
	set("f", "trusted.overlay.metacopy", "")
	set("f", "trusted.overlay.nlink", "U-1")
	set("f", "trusted.overlay.protattr", "ai")
	set("f", "trusted.overlay.whiteout", "")
	set("f", "trusted.overlay.overlay.opaque", "y")
	var got facts
	must(t, trustedNames.readFacts(f.Int(), "d", &got))
	want := facts{xwhiteouts: true, impure: true, redirect: "/" + strings.Repeat("long/", 100) + "name", others: true}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	n, err := sys.OpenBare(f.Int(), "f", sys.O_PATH, 0)
	must(t, err)
	defer sys.CloseBare(n)
	must(t, trustedNames.readFacts(n, "", &got))
	want = facts{hasOrigin: true, originKnown: true, origin: id, metacopy: true, hasNlink: true, nlink: linkCount{'U', -1},
		append: true, immutable: true, whiteout: true, others: true}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	set("f", "trusted.overlay.nlink", "garbage")
	set("f", "trusted.overlay.metacopy", "garbage")
	set("f", "trusted.overlay.origin", "garbage")
	err = trustedNames.readFacts(f.Int(), "f", &got)
	var bad *corruptError
	if !errors.As(err, &bad) || bad.attr != "trusted.overlay.metacopy" || bad.errno != syscall.EIO {
		t.Errorf("corrupt: %v", err)
	}
	if got.hasNlink || got.originKnown || !got.hasOrigin || !got.metacopy || !got.append {
		t.Errorf("corrupt: %+v", got)
	}
	// More than fits any first guess.
	for i := range 40 {
		set("f", "trusted."+strings.Repeat("x", 50)+string(rune('a'+i)), "")
	}
	err = trustedNames.readFacts(f.Int(), "f", &got)
	if !errors.As(err, &bad) || !got.immutable {
		t.Errorf("of many xattrs: %+v, %v", got, err)
	}
	if allocs := testing.AllocsPerRun(50, func() { _ = trustedNames.readFacts(f.Int(), "", &got) }); allocs > 0 {
		t.Errorf("%v allocations for an object without", allocs)
	}
}

func FuzzRedirect(f *testing.F) {
	for _, s := range []string{"a", "/a/b", "..", "/../x", "//"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := trustedNames.parseRedirect(b)
		if err != nil {
			return
		}
		if s != string(b) {
			t.Fatalf("%q became %q", b, s)
		}
		for i, n := range strings.Split(strings.TrimPrefix(s, "/"), "/") {
			if n == "" || n == "." || n == ".." || strings.Contains(n, "\x00") || i > 0 && s[0] != '/' {
				t.Fatalf("%q leads elsewhere", s)
			}
		}
	})
}

func FuzzMetacopy(f *testing.F) {
	f.Add([]byte{0, 4, 0, 0})
	f.Add(append([]byte{0, 36, 0, 1}, make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := trustedNames.parseMetacopy(b)
		if err != nil {
			return
		}
		if again, err := trustedNames.parseMetacopy(m.encode()); err != nil || m.algo != 0 && !reflect.DeepEqual(again, m) {
			t.Fatalf("%x: %v, then %v, %v", b, m, again, err)
		}
	})
}

func FuzzNlink(f *testing.F) {
	f.Add([]byte("U+1"))
	f.Add([]byte("L-2147483648"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, _ = trustedNames.parseProtattr(b)
		c, err := trustedNames.parseNlink(b)
		if err != nil {
			return
		}
		if again, err := trustedNames.parseNlink(c.appendTo(nil)); err != nil || again != c {
			t.Fatalf("%q: %v, then %v, %v", b, c, again, err)
		}
	})
}

func FuzzFileID(f *testing.F) {
	f.Add(append([]byte{0, 0xfb, 29, 0, 1}, make([]byte, 24)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		var id, again fileID
		var r record
		copy(r[:], b)
		_ = r.parse(&id)
		id = fileID{}
		known, err := id.parse("x", b)
		if !known || err != nil {
			return
		}
		if ok, err := again.parse("x", id.appendTo(nil)); !ok || err != nil || again != id {
			t.Fatalf("%x: %v, then %v, %v", b, id, again, err)
		}
		if ok, err := again.parseIndexName(id.indexName()); !ok || err != nil || again != id {
			t.Fatalf("%x: %v, then %v, %v by index name", b, id, again, err)
		}
	})
}

func FuzzXattrList(f *testing.F) {
	f.Add([]byte("trusted.overlay.overlay.a\x00user.b\x00trusted.overlay.c\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var want []string
		for n := range strings.SplitAfterSeq(string(b), "\x00") {
			if n, whole := strings.CutSuffix(n, "\x00"); whole {
				if shown, ok := trustedNames.toShown(n); ok {
					want = append(want, shown+"\x00")
				}
			}
		}
		if got := string(trustedNames.showList(slices.Clone(b))); got != strings.Join(want, "") {
			t.Fatalf("%q shows %q, want %q", b, got, want)
		}
		_ = trustedNames.sortOut(b, -1, "", &facts{})
	})
}

func FuzzStored(f *testing.F) {
	for _, s := range []string{"0:0:755", "1:2:4755:file", "0:0:600:block-8-1", "0:0:600:char-1-3", "0:0:777:symlink", "0:0:600:pipe"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, v string) {
		was := sys.Stat{Mode: sys.S_IFREG | 0o600, Size: 7}
		st := was
		if !parseStored(v, &st) {
			return
		}
		again := was
		if back := string(appendStored(&st, sys.S_IFREG)); !parseStored(back, &again) || again != st || st.IsWhiteout() {
			t.Fatalf("%q: %+v, then %q: %+v", v, st, back, again)
		}
	})
}
