package layer

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

var update = flag.Bool("update", false, "write the golden files anew")

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// content makes a regular file's change.
func content(e Entry, text string) Change {
	e.Type, e.Size = TypeReg, int64(len(text))
	return Change{Kind: Added, Entry: e, Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(text)), nil }}
}

func added(e Entry) Change { return Change{Kind: Added, Entry: e} }

// everything is a changeset with each thing that a header can say.
func everything() []Change {
	long := strings.Repeat("l", 200)
	longRaw := strings.Repeat("\xe9", 200)
	var slash []string
	for range 30 {
		slash = append(slash, "component")
	}
	return []Change{
		{Kind: Modified, Aspects: AspectTime, Entry: Entry{Path: ".", Type: TypeDir, Mode: 0o755, ModTime: Timespec{Sec: 1}}},
		{Kind: Deleted, Entry: Entry{Path: "deleted"}},
		added(Entry{Path: "dir", Type: TypeDir, Mode: 0o1777, UID: 1, GID: 2, ModTime: Timespec{1_700_000_000, 0}}),
		{Kind: Deleted, Entry: Entry{Path: "dir/deleted"}},
		content(Entry{Path: "dir/file", Mode: 0o4755, ModTime: Timespec{1_700_000_000, 123_456_789}}, "hello\n"),
		added(Entry{Path: "dir/zlink", Type: TypeReg, Mode: 0o4755, Hardlink: "dir/file", ModTime: Timespec{1_700_000_000, 123_456_789}}),
		added(Entry{Path: "fifo", Type: TypeFifo, Mode: 0o600, ModTime: Timespec{-2, 500_000_000}}),
		added(Entry{Path: "late", Type: TypeFifo, ModTime: Timespec{1 << 34, 0}}),
		content(Entry{Path: long, UID: 2_097_151, GID: 2_097_152}, strings.Repeat("x", 513)),
		added(Entry{Path: longRaw, Type: TypeSymlink, Mode: 0o777, Linkname: long}),
		added(Entry{Path: "null", Type: TypeChar, Mode: 0o666, Major: 1, Minor: 3}),
		added(Entry{Path: "old", Type: TypeFifo, ModTime: Timespec{-1, 0}}),
		added(Entry{Path: "raw\xff", Type: TypeSymlink, Mode: 0o777, Linkname: "\xfe"}),
		added(Entry{Path: "sda", Type: TypeBlock, Mode: 0o660, Major: 259, Minor: 1_048_575}),
		added(Entry{Path: strings.Join(slash[:15], "/"), Type: TypeDir, Mode: 0o700}),
		added(Entry{Path: strings.Join(slash, "/"), Type: TypeDir, Mode: 0o700}),
		content(Entry{Path: "x", UID: 4_294_967_294, Xattrs: map[string]string{
			"user.b": "bin\x00\n=", "user.a": "", "user.k=v": "x", "user.p%25": "\xff", "security.capability": "\x01\x00\x00\x02",
		}}, ""),
	}
}

func sortedChanges(cs []Change) []Change {
	for i := 1; i < len(cs); i++ {
		for j := i; j > 0 && ComparePaths(cs[j-1].Entry.Path, cs[j].Entry.Path) > 0; j-- {
			cs[j-1], cs[j] = cs[j], cs[j-1]
		}
	}
	return cs
}

func everythingTar(t testing.TB) []byte {
	t.Helper()
	var out bytes.Buffer
	r, err := WriteTar(t.Context(), &out, changesOf(sortedChanges(everything())...), TarOptions{Epoch: 86_400})
	if err != nil {
		t.Fatal(err)
	}
	if int64(out.Len()) != r.Size {
		t.Errorf("Size is %d of %d", r.Size, out.Len())
	}
	return out.Bytes()
}

func TestSplitName(t *testing.T) {
	n := func(n int) string { return strings.Repeat("n", n) }
	for _, c := range []struct {
		name   string
		prefix int
		fits   bool
	}{
		{n(100), 0, true},
		{n(101), 0, false},
		{n(99) + "/", 0, true},
		{n(100) + "/", 0, false}, // the slash is part of the name
		{n(155) + "/" + n(100), 155, true},
		{n(156) + "/" + n(100), 0, false},
		{n(155) + "/" + n(101), 0, false},
		{n(155) + "/" + n(99) + "/", 155, true},
		{n(50) + "/" + n(50) + "/" + n(90) + "/", 101, true},
		{n(1) + "/" + n(100), 1, true},
		{"/" + n(100), 0, false},
	} {
		prefix, rest, fits := splitName(c.name)
		if fits != c.fits || fits && (len(prefix) != c.prefix || prefix != "" && prefix+"/"+rest != c.name) {
			t.Errorf("%d bytes %q: %d and %d bytes, %v", len(c.name), c.name, len(prefix), len(rest), fits)
		}
	}
}

// The bytes are the layer's name: they may never change.
func TestTarGolden(t *testing.T) {
	golden(t, "testdata/everything.tar", everythingTar(t))
}

func golden(t testing.TB, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, want %d; -update writes it anew", file, len(got), len(want))
	}
}

func TestTarReadByArchiveTar(t *testing.T) {
	tr := tar.NewReader(bytes.NewReader(everythingTar(t)))
	for _, c := range sortedChanges(everything()) {
		h, err := tr.Next()
		if err != nil {
			t.Fatal(err)
		}
		checkHeader(t, &c, h)
	}
	if _, err := tr.Next(); err != io.EOF {
		t.Errorf("after the last entry: %v", err)
	}
}

func checkHeader(t testing.TB, c *Change, h *tar.Header) {
	t.Helper()
	e := c.Entry
	got := fmt.Sprintf("%q %q %o %d:%d %d.%09d %d:%d", strings.TrimSuffix(h.Name, "/"), h.Linkname, h.Mode, h.Uid, h.Gid,
		h.ModTime.Unix(), h.ModTime.Nanosecond(), h.Devmajor, h.Devminor)
	link := e.Linkname + e.Hardlink
	want := fmt.Sprintf("%q %q %o %d:%d %d.%09d %d:%d", e.Path, link, e.Mode, e.UID, e.GID, e.ModTime.Sec, e.ModTime.Nsec, e.Major, e.Minor)
	if c.Kind == Deleted {
		want = fmt.Sprintf("%q \"\" 0 0:0 86400.000000000 0:0", strings.Replace(e.Path, "deleted", ".wh.deleted", 1))
	}
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for name, value := range e.Xattrs {
		k, v := paxXattrRecord(name, value)
		if h.PAXRecords[k] != v {
			t.Errorf("%s: xattr %s is %q", e.Path, name, h.PAXRecords[k])
		}
	}
}

// Programs of the field read the same names, types, targets and sizes.
func TestTarReadByPrograms(t *testing.T) {
	file := filepath.Join(t.TempDir(), "t.tar")
	if err := os.WriteFile(file, everythingTar(t), 0o600); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range sortedChanges(everything()) {
		name := c.Entry.Path
		if c.Kind == Deleted {
			name = strings.Replace(name, "deleted", ".wh.deleted", 1)
		} else if c.Entry.IsDir() {
			name += "/"
		}
		names = append(names, name)
	}
	want := strings.Join(names, "\n") + "\n"
	for name, command := range map[string][]string{
		"tar":     {"tar", "--quoting-style=literal", "--show-stored-names", "-tf", file},
		"bsdtar":  {"python3", "-c", bsdtarNames, file},
		"python3": {"python3", "-c", pythonNames, file},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(name); err != nil {
				testenv.Optional(t, name+" is not installed")
			}
			cmd := exec.Command(command[0], command[1:]...)
			cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
			var errs bytes.Buffer
			cmd.Stderr = &errs
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, &errs)
			}
			if string(out) != want {
				t.Errorf("got  %q\nwant %q", out, want)
			}
		})
	}
}

const pythonNames = `
import sys, tarfile
out = sys.stdout.buffer
for m in tarfile.open(sys.argv[1]):
    out.write(m.name.encode("utf-8", "surrogateescape") + (b"/" if m.isdir() else b"") + b"\n")
`

// bsdtar escapes names that it cannot print; it unpacks them as they are.
const bsdtarNames = `
import re, subprocess, sys
out = subprocess.run(["bsdtar", "-tf", sys.argv[1]], check=True, capture_output=True).stdout
out = re.sub(rb"\\(\d{3})", lambda m: bytes([int(m.group(1), 8)]), out)
sys.stdout.buffer.write(out)
`
