package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/internal/testenv"
)

var compressions = []Compression{None, Gzip, Zstd}

func compress(t testing.TB, c Compression, data []byte, cuts ...int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewCompressor(&b, c)
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for _, n := range append(cuts, len(data)) {
		if _, err := w.Write(data[at:n]); err != nil {
			t.Fatal(err)
		}
		at = n
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// compressible is text-like data of n bytes.
func compressible(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "line %d of %x\n", b.Len(), r.IntN(5000))
	}
	return b.Bytes()[:n]
}

// The same bytes give the same blob, however they are written and on however
// many CPUs, or an image would have another digest each time it is saved.
func TestCompressorIsDeterministic(t *testing.T) {
	testenv.Slow(t)
	data := compressible(3 << 20)
	r := rand.New(rand.NewPCG(3, 4))
	for _, c := range compressions {
		want := digest.FromBytes(compress(t, c, data))
		for procs := 1; procs <= 4; procs++ {
			old := runtime.GOMAXPROCS(procs)
			var cuts []int
			for at := 0; at < len(data); at += 1 + r.IntN(200_000) {
				cuts = append(cuts, at)
			}
			if got := digest.FromBytes(compress(t, c, data, cuts...)); got != want {
				t.Errorf("%s on %d CPUs: %s, want %s", c, procs, got, want)
			}
			runtime.GOMAXPROCS(old)
		}
	}
	if _, err := NewCompressor(io.Discard, "xz"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("xz: %v", err)
	}
}

func TestDecompress(t *testing.T) {
	tarball := truncatedTar()
	twice := func(c Compression) []byte { // members or frames one after another
		return append(compress(t, c, tarball[:3000]), compress(t, c, tarball[3000:])...)
	}
	skippable := append([]byte("\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"), compress(t, Zstd, tarball)...)
	for _, c := range []struct {
		name string
		blob []byte
		want Compression
	}{
		{"tar", tarball, None}, {"gzip", compress(t, Gzip, tarball), Gzip}, {"zstd", compress(t, Zstd, tarball), Zstd},
		{"gzip members", twice(Gzip), Gzip}, {"zstd frames", twice(Zstd), Zstd}, {"zstd after a skippable frame", skippable, Zstd},
		{"a tar whose first name begins like bzip2", newTar().file("BZh91AY", "").bytes(), None},
	} {
		for _, in := range []io.Reader{bytes.NewReader(c.blob), iotest.OneByteReader(bytes.NewReader(c.blob))} {
			r, got, err := Decompress(in, Limits{})
			if err != nil || got != c.want {
				t.Errorf("%s: %s, %v", c.name, got, err)
				continue
			}
			b, err := io.ReadAll(r)
			if err != nil || c.want != None && !bytes.Equal(b, tarball) {
				t.Errorf("%s: %d bytes, %v", c.name, len(b), err)
			}
			if err := r.Close(); err != nil {
				t.Errorf("%s: close: %v", c.name, err)
			}
		}
	}
	if r, c, err := Decompress(strings.NewReader(""), Limits{}); err != nil || c != None {
		t.Errorf("nothing: %v %s %v", r, c, err)
	}
	for name, begin := range map[string]string{"xz": "\xfd7zXZ\x00\x00", "bzip2": "BZh91AY&SY", "zip": "PK\x03\x04", "lz4": "\x04\x22\x4d\x18", "compress": "\x1f\x9d\x90"} {
		_, _, err := Decompress(strings.NewReader(begin+strings.Repeat("x", 600)), Limits{})
		if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Cut or changed anywhere, a compressed blob is an error of the right kind and
// never other data; an error of the stream below stays what it was.
func TestDecompressCorrupt(t *testing.T) {
	testenv.Slow(t)
	tarball := compressible(50_000)
	broken := errors.New("the network is down")
	for _, c := range []Compression{Gzip, Zstd} {
		blob := compress(t, c, tarball)
		for n := range blob {
			if n%7 != 0 {
				continue
			}
			if err := drain(bytes.NewReader(blob[:n])); n > 4 && !errdefs.IsDataLoss(err) {
				t.Errorf("%s cut at %d: %v", c, n, err)
			}
			if err := drain(io.MultiReader(bytes.NewReader(blob[:n]), errReader{broken})); !errors.Is(err, broken) || errdefs.IsDataLoss(err) {
				t.Errorf("%s broken at %d: %v", c, n, err)
			}
			flipped := bytes.Clone(blob)
			flipped[n] ^= 0x40
			if r, got, err := Decompress(bytes.NewReader(flipped), Limits{}); err == nil {
				b, err := io.ReadAll(r)
				if err == nil && got == c && !bytes.Equal(b, tarball) {
					t.Errorf("%s flipped at %d: other data and no error", c, n)
				}
			}
		}
	}
}

func drain(blob io.Reader) error {
	r, _, err := Decompress(blob, Limits{})
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err
}

func TestBlobReader(t *testing.T) {
	tarball := truncatedTar()
	diffID, other := digest.FromBytes(tarball), digest.FromString("other")
	for _, c := range compressions {
		blob := compress(t, c, tarball)
		size, sum := int64(len(blob)), digest.FromBytes(blob)
		for _, w := range []struct {
			want  Blob
			words []string // of the error; none: no error
		}{
			{Blob{}, nil},
			{Blob{sum, size, diffID}, nil},
			{Blob{digest.SHA512.FromBytes(blob), size, diffID}, nil},
			{Blob{sum, size, digest.SHA384.FromBytes(tarball)}, nil},
			{Blob{other, size, diffID}, []string{"digest is " + sum.String(), "expected " + other.String()}},
			{Blob{sum, size, other}, []string{"DiffID is " + diffID.String(), "expected " + other.String()}},
			{Blob{sum, size + 1, diffID}, []string{fmt.Sprintf("%d bytes, expected %d", size, size+1)}},
			{Blob{sum, size - 1, diffID}, []string{fmt.Sprintf("more than the expected %d bytes", size-1)}},
		} {
			b, err := NewBlobReader(bytes.NewReader(blob), w.want, Limits{})
			var got []byte
			if err == nil {
				got, err = io.ReadAll(b)
			}
			for _, words := range w.words {
				if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), words) {
					t.Errorf("%s, %v: %v\nwant %q", c, w.want, err, words)
				}
			}
			if w.words != nil {
				if b != nil && (b.DiffID() != "" || b.Digest() != "") {
					t.Errorf("%s: digests after an error", c)
				}
				continue
			}
			if err != nil || !bytes.Equal(got, tarball) || b.Size() != size || b.Compression() != c {
				t.Errorf("%s, %v: %d bytes, %v", c, w.want, len(got), err)
			}
			if w.want.DiffID == "" && (b.DiffID() != diffID || b.Digest() != sum) {
				t.Errorf("%s: %s %s", c, b.DiffID(), b.Digest())
			}
			if err := errors.Join(b.Close(), b.Close()); err != nil {
				t.Error(err)
			}
		}
	}
	for _, w := range []Blob{{Digest: "sha256:zz"}, {DiffID: "md5:00"}} {
		if _, err := NewBlobReader(bytes.NewReader(tarball), w, Limits{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", w, err)
		}
	}
}

// Apply of a blob fails when the digest does, though the tar is whole: bytes
// after the end of the tar, or of the compressed stream, count.
func TestApplyBlob(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	tarball := truncatedTar()
	long := append(bytes.Clone(tarball), make([]byte, 10_240)...)
	short := tarball[:len(tarball)-1024] // without end mark: the digest vouches for it
	for _, c := range compressions {
		for name, data := range map[string][]byte{"as usual": tarball, "padded": long, "no end mark": short} {
			blob := compress(t, c, data)
			want := Blob{digest.FromBytes(blob), int64(len(blob)), digest.FromBytes(data)}
			if err := applyBlob(t, dir, blob, want); err != nil {
				t.Errorf("%s, %s: %v", c, name, err)
			}
			want.DiffID = digest.FromString("other")
			if err := applyBlob(t, dir, blob, want); !errdefs.IsDataLoss(err) {
				t.Errorf("%s, %s, wrong DiffID: %v", c, name, err)
			}
		}
		blob := compress(t, c, tarball)
		want := Blob{digest.FromBytes(blob), 0, digest.FromBytes(tarball)}
		if err := applyBlob(t, dir, append(bytes.Clone(blob), 0), want); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: a byte too many: %v", c, err)
		}
	}
}

func applyBlob(t testing.TB, dir string, blob []byte, want Blob) error {
	b, err := NewBlobReader(bytes.NewReader(blob), want, Limits{})
	if err != nil {
		return err
	}
	defer b.Close()
	return Apply(t.Context(), dir, b, ApplyOptions{Volatile: true})
}

func TestMediaTypes(t *testing.T) {
	for _, c := range compressions {
		got, err := ParseMediaType(MediaType(c))
		if err != nil || got != c {
			t.Errorf("%s: %s, %v", c, got, err)
		}
		if got, err := ParseCompression(string(c)); err != nil || got != c {
			t.Errorf("%s: %s, %v", c, got, err)
		}
	}
	for s, want := range map[string]Compression{
		"application/vnd.docker.image.rootfs.diff.tar.gzip":         Gzip,
		"application/vnd.oci.image.layer.v1.tar+zstd; charset=x":    Zstd,
		"application/vnd.oci.image.layer.nondistributable.v1.tar":   None,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": Gzip,
		"application/vnd.oci.image.config.v1+json":                  "",
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":     "",
		"application/vnd.oci.image.layer.v1.tar+xz":                 "",
		"": "",
	} {
		got, err := ParseMediaType(s)
		if got != want || (err == nil) != (want != "") || err != nil && !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
	if _, err := ParseCompression("xz"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// The example of the image spec (config.md): ChainID(A|B|C).
func TestChainIDs(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	ab := digest.FromString(a.String() + " " + b.String())
	abc := digest.FromString(ab.String() + " " + c.String())
	for _, w := range []struct {
		in   []digest.Digest
		want digest.Digest
	}{{nil, ""}, {[]digest.Digest{a}, a}, {[]digest.Digest{a, b}, ab}, {[]digest.Digest{a, b, c}, abc}} {
		if got := ChainID(w.in); got != w.want {
			t.Errorf("%v: %s, want %s", w.in, got, w.want)
		}
	}
	if got := ChainIDs([]digest.Digest{a, b, c}); len(got) != 3 || got[0] != a || got[1] != ab || got[2] != abc {
		t.Errorf("%v", got)
	}
}

func TestParseTarName(t *testing.T) {
	for name, w := range map[string]struct {
		kind   TarName
		victim string
		bad    bool
	}{
		"a": {}, ".wh": {}, "x.wh.a": {}, "": {}, ".wh.a": {NameWhiteout, "a", false}, ".wh..a": {NameWhiteout, ".a", false},
		".wh..wh..opq": {NameOpaque, "", false}, ".wh..wh.plnk": {NameAUFS, "", false}, ".wh..wh.": {NameAUFS, "", false},
		".wh.": {bad: true}, ".wh..": {bad: true}, ".wh...": {bad: true}, ".wh....": {NameWhiteout, "...", false}, ".wh.a/b": {bad: true},
	} {
		kind, victim, err := ParseTarName(name)
		if kind != w.kind || victim != w.victim || (err != nil) != w.bad {
			t.Errorf("%q: %d %q %v", name, kind, victim, err)
		}
	}
}
