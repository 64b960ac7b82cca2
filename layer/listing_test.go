package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
	"github.com/opencontainers/go-digest"
)

var emptyDigest = digest.FromString("")

// listing closes l and returns its text.
func listingOf(t testing.TB, fill func(*ListingWriter) error) (string, digest.Digest) {
	t.Helper()
	var out bytes.Buffer
	l := NewListingWriter(&out)
	if err := fill(l); err != nil {
		t.Fatal(err)
	}
	sum, err := l.Close()
	if err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewReader(&out)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(text); got != sum {
		t.Errorf("Close gave %s for a text of %s", sum, got)
	}
	return string(text), sum
}

func TestListingGolden(t *testing.T) {
	text, _ := listingOf(t, func(l *ListingWriter) error {
		return ListChanges(t.Context(), changesOf(sortedChanges(everything())...), l)
	})
	golden(t, "testdata/everything.listing", []byte(text))
	n := 0
	cs := sortedChanges(everything())
	for r, err := range ReadListing(strings.NewReader(text)) {
		if err != nil {
			t.Fatal(err)
		}
		c := cs[n]
		n++
		if c.Entry.Hardlink != "" {
			c.Entry = Entry{Path: c.Entry.Path, Type: c.Entry.Type, Hardlink: c.Entry.Hardlink}
		}
		if got, want := fmt.Sprintf("%+v", r.Entry), fmt.Sprintf("%+v", c.Entry); got != want || r.Deleted != (c.Kind == Deleted) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	if n != len(cs) {
		t.Errorf("%d records", n)
	}
}

func TestListingRecordsMayComeInAnyOrder(t *testing.T) {
	dir := func(p string) Entry { return Entry{Path: p, Type: TypeDir, Mode: 0o755} }
	fifo := func(p string) Entry { return Entry{Path: p, Type: TypeFifo} }
	link := func(p, to string) Entry { return Entry{Path: p, Type: TypeFifo, Hardlink: to} }
	type step any // an Entry to add or a path to delete
	for name, c := range map[string]struct {
		steps []step
		want  string
	}{
		"sorted":                         {[]step{fifo("b"), fifo("a/b"), dir("."), fifo("a.b"), dir("a")}, "d . d a p a/b p a.b p b"},
		"later wins":                     {[]step{dir("a"), fifo("a")}, "p a"},
		"a file takes a subtree":         {[]step{dir("a"), fifo("a/b"), fifo("a"), fifo("a.b")}, "p a p a.b"},
		"a deletion takes a subtree":     {[]step{dir("a"), fifo("a/b"), "a"}, "D a"},
		"what comes after stays":         {[]step{fifo("a/b"), "a", dir("a"), fifo("a/c")}, "R a p a/c"},
		"a directory over a file":        {[]step{fifo("a"), dir("a"), fifo("a/b")}, "R a p a/b"},
		"a directory twice":              {[]step{dir("a"), fifo("a/b"), dir("a")}, "d a p a/b"},
		"a replaced directory twice":     {[]step{"a", dir("a"), dir("a")}, "R a"},
		"from the root":                  {[]step{fifo("a"), "."}, "D ."},
		"inner deletion before an outer": {[]step{"a/b/c", "a/b", dir("a")}, "d a D a/b"},
		"first name is the head":         {[]step{fifo("z"), link("a", "z"), link("m", "a")}, "p a hp m a hp z a"},
		"head replaced":                  {[]step{fifo("a"), link("b", "a"), link("c", "b"), dir("a")}, "R a p b hp c b"},
		"head deleted":                   {[]step{fifo("a"), link("b", "a"), link("c", "a"), "a"}, "D a p b hp c b"},
		"head made anew":                 {[]step{fifo("a"), link("b", "a"), fifo("a"), link("c", "a")}, "p a p b hp c a"},
		"one name is left":               {[]step{fifo("a"), link("b", "a"), "a"}, "D a p b"},
		"a link over its group":          {[]step{fifo("a"), link("b", "a"), link("b", "a")}, "p a hp b a"},
		"a link replaced":                {[]step{fifo("a"), link("b", "a"), fifo("b")}, "p a p b"},
		"a link to a layer below":        {[]step{link("b", "low")}, "hp b low"},
	} {
		text, _ := listingOf(t, func(l *ListingWriter) error {
			l.sort.full = 40 // each record is a run
			var errs []error
			for _, s := range c.steps {
				switch s := s.(type) {
				case string:
					errs = append(errs, l.Delete(s))
				case Entry:
					errs = append(errs, l.Add(s, ""))
				}
			}
			return errors.Join(errs...)
		})
		if got := shortListing(text); got != c.want {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

// shortListing leaves out the states.
func shortListing(text string) string {
	var short []string
	for _, line := range strings.Split(text, "\n") {
		if f := strings.Fields(line); len(f) > 1 && len(f[0]) < 3 {
			short = append(short, f[0], f[1])
			if f[0][0] == 'h' {
				short = append(short, f[2])
			}
		}
	}
	return strings.Join(short, " ")
}

// modelListing is the writer without sorting: a map, and inodes as numbers.
type modelListing struct {
	records  map[string]ListingRecord
	files    map[string]int
	next     int
	contents map[int]ListingRecord
}

func (m *modelListing) removeBelow(p string) {
	for q := range m.records {
		if liesBelow(q, p) {
			delete(m.records, q)
			delete(m.files, q)
		}
	}
}

func (m *modelListing) apply(e Entry, sum digest.Digest, deleted bool) {
	old, had := m.records[e.Path]
	file, isFile := m.files[e.Hardlink]
	if deleted || !e.IsDir() {
		m.removeBelow(e.Path)
	}
	delete(m.files, e.Path)
	m.records[e.Path] = ListingRecord{
		Entry: e, Digest: sum, Deleted: deleted,
		Replaced: e.IsDir() && !deleted && had && (old.Deleted || old.Replaced || !old.Entry.IsDir()),
	}
	if deleted || e.IsDir() {
		return
	}
	if !isFile || e.Hardlink == "" {
		m.next++
		file = m.next
		m.contents[file] = m.records[e.Path]
	}
	m.files[e.Path] = file
}

func (m *modelListing) text() string {
	b := []byte(listingFirst)
	heads := map[int]string{}
	for _, p := range slices.SortedFunc(maps.Keys(m.records), ComparePaths) {
		r := m.records[p]
		if f, ok := m.files[p]; ok {
			r = m.contents[f]
			if head := heads[f]; head != "" {
				r.Entry.Hardlink = head
			} else {
				heads[f] = p
			}
		}
		r.Entry.Path = p
		b = appendRecord(b, &r)
	}
	return string(b) + fmt.Sprintf("end %d\n", len(m.records))
}

func TestListingWriterIsTheModel(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 5))
		m := modelListing{records: map[string]ListingRecord{}, files: map[string]int{}, contents: map[int]ListingRecord{}}
		path := func() string {
			p := []string{"a", "b", "c", "a.b", "x\xff y"}[r.IntN(5)]
			for r.IntN(2) == 0 {
				p += "/" + []string{"a", "b", "-"}[r.IntN(3)]
			}
			return p
		}
		text, _ := listingOf(t, func(l *ListingWriter) error {
			l.sort.full = 50 + r.IntN(2000)
			for range r.IntN(80) {
				e := Entry{Path: path(), Mode: uint32(r.IntN(4096)), UID: r.Uint32(), ModTime: Timespec{r.Int64(), uint32(r.IntN(1e9))}}
				var sum digest.Digest
				var err error
				switch r.IntN(6) {
				case 0:
					m.apply(e, "", true)
					if err := l.Delete(e.Path); err != nil {
						return err
					}
					continue
				case 1, 2:
					e.Type = TypeDir
				case 3, 4:
					files := slices.Sorted(maps.Keys(m.files))
					if len(files) == 0 {
						continue
					}
					to := files[r.IntN(len(files))]
					if to == e.Path || liesBelow(to, e.Path) {
						continue // it would replace its own target
					}
					e = Entry{Path: e.Path, Type: TypeReg, Hardlink: to}
				default:
					e.Type, e.Size, sum = TypeReg, r.Int64(), digest.FromString(e.Path)
					e.Xattrs = map[string]string{"user.b": "1", "user.a": "\x00"}
				}
				m.apply(e, sum, false)
				if err = l.Add(e, sum); err != nil {
					return err
				}
			}
			return nil
		})
		if want := m.text(); text != want {
			t.Fatalf("seed %d: got\n%swant\n%s", seed, text, want)
		}
		if _, err := readAll(strings.NewReader(text)); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func readAll(r io.Reader) (n int, err error) {
	for _, err := range ReadListing(r) {
		if err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

func TestReadListingRefuses(t *testing.T) {
	good := listingFirst + "d . 0755 0 0 1.000000000\nf a 0644 0 0 1.000000000 0 " + emptyDigest.Encoded() + " user.a=1\nend 2\n"
	if n, err := readAll(strings.NewReader(good)); n != 2 || err != nil {
		t.Fatalf("%d records, %v", n, err)
	}
	for old, bad := range map[string]string{
		"layerctl listing 1": "layerctl listing 2",
		"end 2\n":            "",
		"end 2":              "end 3",
		"2\n":                "2\nx",
		"d .":                "d b",
		"f a":                "f ../a",
		"0755":               "755",
		"0 0 1.":             "00 0 1.",
		"1.000000000\nf":     "1.0\nf",
		"user.a=1":           "user.a",
		" user.a=1":          " user.b=1 user.a=1",
		"user.a":             `user.\x61`,
		"=1":                 `=\xZZ`,
		"0644 0 0":           "0644 0 4294967296",
		"\nf a ":             "\nq a ",
		"f a ":               "D a ",
		"e3b0":               "E3b0",
		"d . ":               "d  . ",
	} {
		text := strings.Replace(good, old, bad, 1)
		if text == good {
			t.Fatalf("%q changes nothing", bad)
		}
		if n, err := readAll(strings.NewReader(text)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%q: %d records, %v", bad, n, err)
		}
	}
	var last error
	for _, err := range ReadListingDigest(strings.NewReader(good), emptyDigest) {
		last = err
	}
	if !errdefs.IsDataLoss(last) {
		t.Errorf("a wrong digest: %v", last)
	}
}

func TestListingWriterRefuses(t *testing.T) {
	for name, f := range map[string]func(*ListingWriter) error{
		"no digest":    func(l *ListingWriter) error { return l.Add(Entry{Path: "a", Type: TypeReg}, "") },
		"bad digest":   func(l *ListingWriter) error { return l.Add(Entry{Path: "a", Type: TypeReg}, "sha256:1") },
		"absolute":     func(l *ListingWriter) error { return l.Delete("/a") },
		"dots":         func(l *ListingWriter) error { return l.Delete("a/../b") },
		"socket":       func(l *ListingWriter) error { return l.Add(Entry{Path: "a", Type: TypeSocket}, "") },
		"link to self": func(l *ListingWriter) error { return l.Add(Entry{Path: "a", Type: TypeFifo, Hardlink: "a"}, "") },
	} {
		var out bytes.Buffer
		l := NewListingWriter(&out)
		if err := f(l); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Close(); !errdefs.IsInvalidArgument(err) || out.Len() > 0 {
			t.Errorf("%s: Close: %v, %d bytes", name, err, out.Len())
		}
	}
	l := NewListingWriter(writerFunc(func([]byte) (int, error) { return 0, io.ErrClosedPipe }))
	if _, err := l.Close(); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a full disk: %v", err)
	}
	if err := l.Delete("a"); err == nil {
		t.Error("a closed writer takes a record")
	}
}

// A million records, a tenth of them links, in a few MiB.
func TestListingMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		testenv.Optional(t, "memory is measured without -short and -race")
	}
	before := openFds(t)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	base, peak := m.HeapInuse, uint64(0)
	look := func() {
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapInuse-min(base, m.HeapInuse))
	}
	n := 0
	l := NewListingWriter(writerFunc(func(p []byte) (int, error) {
		if n++; n%16 == 0 {
			look()
		}
		return len(p), nil
	}))
	sum := digest.Digest("sha256:" + strings.Repeat("ab", 32))
	for i := range 1_000_000 {
		p := fmt.Sprintf("usr/share/doc/%06x/some-file-name-%d", (i*7919)%100_003, i)
		e := Entry{Path: p, Type: TypeReg, Mode: 0o644, Size: 1, ModTime: Timespec{1_600_000_000, 1}}
		if i%10 == 9 {
			e = Entry{Path: p, Type: TypeReg, Hardlink: fmt.Sprintf("usr/share/doc/%06x/some-file-name-%d", ((i-1)*7919)%100_003, i-1)}
		}
		if err := l.Add(e, sum); err != nil {
			t.Fatal(err)
		}
		if i%20_000 == 0 {
			look()
		}
	}
	if _, err := l.Close(); err != nil {
		t.Fatal(err)
	}
	look()
	t.Logf("peak %d KiB", peak>>10)
	if peak > 24<<20 {
		t.Errorf("peak %d KiB of heap", peak>>10)
	}
	if after := openFds(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// The tree digest is the same whoever takes it: the writer of a layer, who
// unpacks it, and who looks at a commit made by hand; and it is true of the tree.
func TestListingsOfAllMakersAgree(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	for seed := range uint64(40) {
		gen := treegen.New(newRand(seed), treegen.Config{Root: true})
		base, more := gen.Ops(100), gen.Ops(50)
		a, b, c := trees(t, dir, base, more)
		var layer bytes.Buffer
		written, sum := listingOf(t, func(l *ListingWriter) error {
			_, err := WriteTar(t.Context(), &layer, DiffTrees(t.Context(), a, b, DiffOptions{}), TarOptions{Listing: l})
			return err
		})
		hand, handSum := listingOf(t, func(l *ListingWriter) error {
			return ListChanges(t.Context(), DiffTrees(t.Context(), a, b, DiffOptions{}), l)
		})
		if sum != handSum {
			t.Errorf("seed %d: ListChanges gives\n%sWriteTar\n%s", seed, hand, written)
		}
		applied, appliedSum := listingOf(t, func(l *ListingWriter) error {
			return Apply(t.Context(), c, bytes.NewReader(layer.Bytes()), ApplyOptions{Volatile: true, Listing: l})
		})
		if sum != appliedSum {
			t.Errorf("seed %d: Apply gives\n%sWriteTar\n%s\nbase\n%smore\n%s", seed, applied, written, treegen.Format(base), treegen.Format(more))
		}
		for p, err := range VerifyListing(t.Context(), c, ReadListing(strings.NewReader(applied)), DiffTrees(t.Context(), a, c, DiffOptions{}), VerifyOptions{}) {
			if err != nil {
				t.Fatal(err)
			}
			t.Errorf("seed %d: %s", seed, &p)
		}
	}
}

// What is done to a layer behind its back is found, and named.
func TestVerifyFindsRot(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "ext4")
	more := parseOps(t, `
		mkdir path="n" mode=0755 sec=5
		create path="n/f" mode=0644 size=100000 seed=1 sec=5
		create path="n/h" mode=0644 size=10 seed=2 sec=5
		link path="n/h" to="n/i"
		symlink path="n/l" to="f" sec=5
		mknod path="n/dev" mode=020644 major=1 minor=3 sec=5
		unlink path="d/g"
		utimes path="d" sec=1000
		utimes path="n" sec=5`)
	for what, c := range map[string]struct{ ops, want string }{
		"nothing":           {"", ""},
		"a flipped byte":    {`rewrite path="n/f" off=77777 size=1 seed=3`, "n/f content"},
		"cut":               {`truncate path="n/f" size=99999 sec=5`, "n/f content"},
		"mode":              {`chmod path="n/f" mode=0600`, "n/f mode"},
		"owner":             {`chown path="n/l" uid=7`, "n/l owner"},
		"time":              {`utimes path="n" sec=6`, "n time"},
		"xattr":             {`setxattr path="n/f" attr="user.x" value="1"`, "n/f xattr"},
		"a deleted file":    {"unlink path=\"n/f\"\nutimes path=\"n\" sec=5", "n/f missing"},
		"a link broken":     {"create path=\"x\" mode=0644 size=10 seed=2 sec=5\nrename path=\"x\" to=\"n/i\"\nutimes path=\"n\" sec=5", "n/i hardlink"},
		"back from deleted": {"create path=\"d/g\" mode=0644\nutimes path=\"d\" sec=1000", "d/g exists"},
		"a stranger":        {"create path=\"n/new\" mode=0644\nutimes path=\"n\" sec=5", "n/new not in the listing"},
		"a change below":    {`chmod path="d/f" mode=0600`, "d/f not in the listing"},
		"another type":      {"unlink path=\"n/l\"\nmknod path=\"n/l\" mode=010777 sec=5\nutimes path=\"n\" sec=5", "n/l type"},
		"device":            {"unlink path=\"n/dev\"\nmknod path=\"n/dev\" mode=020644 major=1 minor=5 sec=5\nutimes path=\"n\" sec=5", "n/dev rdev"},
		"a directory gone":  {"rmtree path=\"n\"", "n missing,n/dev missing,n/f missing,n/h missing,n/i missing,n/l missing"},
	} {
		t.Run(what, func(t *testing.T) {
			a, b, _ := trees(t, dir, parseOps(t, baseTree), more)
			text, _ := listingOf(t, func(l *ListingWriter) error {
				return ListChanges(t.Context(), DiffTrees(t.Context(), a, b, DiffOptions{}), l)
			})
			if _, err := treegen.Apply(b, parseOps(t, c.ops)); err != nil {
				t.Fatal(err)
			}
			if err := sysUtimes(b, epoch); err != nil {
				t.Fatal(err)
			}
			var got []string
			for p, err := range VerifyListing(t.Context(), b, ReadListing(strings.NewReader(text)), DiffTrees(t.Context(), a, b, DiffOptions{}), VerifyOptions{}) {
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, p.Path+" "+p.What)
			}
			if strings.Join(got, ",") != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// An archive says less than the trees differ by: a directory that it replaces
// takes what was in it, a file that it replaces leaves its link group.
func TestVerifyAcceptsWhatAnArchiveImplies(t *testing.T) {
	testenv.Root(t)
	a, _, c := trees(t, testenv.FS(t, "ext4"), parseOps(t, baseTree), nil)
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	for _, h := range []*tar.Header{
		{Name: ".wh.d", Typeflag: tar.TypeReg},
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "d/n", Typeflag: tar.TypeReg, Mode: 0o600},
		{Name: "h1", Typeflag: tar.TypeReg, Mode: 0o600},
	} {
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	tw.Close()
	text, _ := listingOf(t, func(l *ListingWriter) error {
		return Apply(t.Context(), c, &archive, ApplyOptions{Volatile: true, Listing: l})
	})
	if got := shortListing(text); got != "R d f d/n f h1" {
		t.Errorf("the listing is %q", got)
	}
	for p, err := range VerifyListing(t.Context(), c, ReadListing(strings.NewReader(text)), DiffTrees(t.Context(), a, c, DiffOptions{}), VerifyOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		t.Error(&p)
	}
}

func TestVerifyQuickReadsNoContent(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/f", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	text, _ := listingOf(t, func(l *ListingWriter) error {
		return ListChanges(ctx, DiffTrees(ctx, "", dir, DiffOptions{}), l)
	})
	text = strings.Replace(text, fmt.Sprintf("%x", sha256.Sum256([]byte("x"))), emptyDigest.Encoded(), 1)
	for _, quick := range []bool{true, false} {
		n := 0
		for range VerifyListing(ctx, dir, ReadListing(strings.NewReader(text)), nil, VerifyOptions{Quick: quick}) {
			n++
		}
		if (n == 0) != quick {
			t.Errorf("quick %v: %d problems", quick, n)
		}
	}
}

// endless is content without an end, which cancels a context when it is read.
type endless struct{ cancel func() }

func (e endless) Read(p []byte) (int, error) { e.cancel(); return len(p), nil }
func (e endless) Close() error               { return nil }

func TestListChangesEndsWithinAFile(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	big := Change{Kind: Added, Entry: Entry{Path: "f", Type: TypeReg, Size: 1 << 40}, Open: func() (io.ReadCloser, error) { return endless{cancel}, nil }}
	if err := ListChanges(ctx, changesOf(big), NewListingWriter(io.Discard)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
