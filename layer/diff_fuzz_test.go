package layer

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"strings"
	"testing"
)

// compareByComponents is ComparePaths as its comment defines it.
func compareByComponents(a, b string) int {
	if a == "." || b == "." {
		switch {
		case a == b:
			return 0
		case a == ".":
			return -1
		}
		return 1
	}
	x, y := strings.Split(a, "/"), strings.Split(b, "/")
	for i := range min(len(x), len(y)) {
		if c := strings.Compare(x[i], y[i]); c != 0 {
			return c
		}
	}
	return len(x) - len(y)
}

func sign(n int) int {
	switch {
	case n < 0:
		return -1
	case n > 0:
		return 1
	}
	return 0
}

func FuzzComparePaths(f *testing.F) {
	f.Add("a", "a/b", "a.b")
	f.Add(".", "..", "-")
	f.Add("a\x00", "a/", "a")
	f.Add("a-b/c", "a/c", "a\xff")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		for _, p := range []string{a, b, c} {
			if !isCleanPath(p) {
				return
			}
		}
		if got, want := sign(ComparePaths(a, b)), sign(compareByComponents(a, b)); got != want {
			t.Errorf("%q, %q: %d, by components %d", a, b, got, want)
		}
		if sign(ComparePaths(a, b)) != -sign(ComparePaths(b, a)) || (ComparePaths(a, b) == 0) != (a == b) {
			t.Errorf("%q, %q: not antisymmetric", a, b)
		}
		if ComparePaths(a, b) <= 0 && ComparePaths(b, c) <= 0 && ComparePaths(a, c) > 0 {
			t.Errorf("%q, %q, %q: not transitive", a, b, c)
		}
	})
}

// What is read is canonical: written again it is the same text.
func FuzzReadListing(f *testing.F) {
	if b, err := os.ReadFile("testdata/everything.listing"); err == nil {
		f.Add(b)
	}
	f.Add([]byte(listingFirst + "D a\nend 1\n"))
	f.Add([]byte(listingFirst + "R a 0755 0 0 -1.000000001 user.a=\\x00\nhf b a\nend 2\n"))
	f.Add([]byte("\x28\xb5\x2f\xfd"))
	f.Fuzz(func(t *testing.T, text []byte) {
		again, n := []byte(listingFirst), 0
		for r, err := range ReadListing(bytes.NewReader(text)) {
			if err != nil {
				return
			}
			n++
			again = appendRecord(again, &r)
		}
		if bytes.HasPrefix(text, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
			return
		}
		if again = append(again, "end "...); !bytes.HasPrefix(text, again) {
			t.Errorf("%q was read as %q", text, again)
		}
	})
}

// archive/tar reads every header that is written as what it was made of.
func FuzzTarHeader(f *testing.F) {
	f.Add("a/b", "", "user.a", "1", uint32(0o755), uint32(1), uint32(1<<22), int64(-1), uint32(5), int64(10), byte(0))
	f.Add(strings.Repeat("n", 101), strings.Repeat("\xff", 101), "user.k=v%", "\x00", uint32(0), uint32(0), uint32(0), int64(1<<40), uint32(0), int64(1<<34), byte(2))
	f.Add(strings.Repeat("d/", 60)+"x", "t", "", "", uint32(0), uint32(0), uint32(0), int64(0), uint32(0), int64(0), byte(1))
	types := []FileType{TypeReg, TypeDir, TypeSymlink, TypeFifo, TypeChar, TypeBlock}
	f.Fuzz(func(t *testing.T, path, link, attr, value string, mode, uid, gid uint32, sec int64, nsec uint32, size int64, kind byte) {
		e := Entry{Path: path, Type: types[int(kind)%len(types)], Mode: mode & 0o7777, UID: uid, GID: gid, ModTime: Timespec{sec, nsec % 1_000_000_000}}
		if !isCleanPath(path) || strings.IndexByte(link+attr, 0) >= 0 || sec > 1<<55 || sec < -1<<55 || len(path)+len(link)+len(value) > 1<<19 {
			return
		}
		switch e.Type {
		case TypeReg:
			e.Size = size & (1<<62 - 1)
		case TypeSymlink:
			if e.Linkname = link; link == "" {
				return
			}
		case TypeChar, TypeBlock:
			e.Major, e.Minor = uid%4096, gid%(1<<20)
		}
		if attr != "" {
			e.Xattrs = map[string]string{attr: value}
		}
		h, err := headerOf(&e)
		if err != nil {
			t.Fatal(err)
		}
		b := h.append(nil)
		if len(b)%blockSize != 0 {
			t.Fatalf("%d bytes of header", len(b))
		}
		got, err := tar.NewReader(io.MultiReader(bytes.NewReader(b), zeroReader{})).Next()
		if err != nil {
			t.Fatalf("%+v: %v", e, err)
		}
		checkHeader(t, &Change{Kind: Added, Entry: e}, got)
		if got.Size != e.Size {
			t.Errorf("size %d, want %d", got.Size, e.Size)
		}
		if name, v, err := paxXattrOf(got); err != nil || name != attr || v != e.Xattrs[attr] {
			t.Errorf("xattr %q=%q, %v", name, v, err)
		}
	})
}

func paxXattrOf(h *tar.Header) (name, value string, err error) {
	for k, v := range h.PAXRecords {
		if name, value, err = paxXattr(k, v, h.PAXRecords); name != "" || err != nil {
			return name, value, err
		}
	}
	return "", "", nil
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }
