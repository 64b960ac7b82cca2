package layer

import (
	"fmt"
	"hash"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Blob is what is known of a layer's blob. A zero field is not known, and not
// checked.
type Blob struct {
	Digest digest.Digest // of the blob as it is stored
	Size   int64         // bytes of it
	DiffID digest.Digest // of the uncompressed tar
}

// BlobReader is the uncompressed tar of a blob. It checks digest, size and
// DiffID in the same pass: at the end, when the blob's last byte has been read,
// Read returns an error that names what was expected and what came, wrapping
// ErrDataLoss, instead of io.EOF. Who stops before that has checked nothing.
type BlobReader struct {
	want        Blob
	in          *blobInput
	out         io.ReadCloser
	compression Compression
	diff        hash.Hash // nil where the blob is the tar itself
	tarSize     int64     // bytes of the tar that were read
	err         error     // once set, every Read returns it
}

// NewBlobReader begins to read the blob r. It reads the first bytes, to find the
// compression; see Decompress. A digest that is malformed or of an unknown
// algorithm wraps ErrInvalidArgument.
func NewBlobReader(r io.Reader, want Blob, lim Limits) (*BlobReader, error) {
	for _, d := range []digest.Digest{want.Digest, want.DiffID} {
		if d == "" {
			continue
		}
		if err := d.Validate(); err != nil {
			return nil, fmt.Errorf("layer: blob: digest %q: %w: %w", d, err, errdefs.ErrInvalidArgument)
		}
	}
	b := &BlobReader{want: want, in: &blobInput{r: r, limit: want.Size}}
	b.in.hash = algorithm(want.Digest).Hash()
	out, c, err := Decompress(b.in, lim)
	if err != nil {
		return nil, err
	}
	b.out, b.compression = out, c
	if c != None || algorithm(want.Digest) != algorithm(want.DiffID) {
		b.diff = algorithm(want.DiffID).Hash()
	}
	return b, nil
}

// algorithm is a digest's, or the usual one.
func algorithm(d digest.Digest) digest.Algorithm {
	if d == "" {
		return digest.Canonical
	}
	return d.Algorithm()
}

// Compression is the blob's.
func (b *BlobReader) Compression() Compression { return b.compression }

// DiffID is the digest of the tar, once Read has returned io.EOF; "" before.
func (b *BlobReader) DiffID() digest.Digest {
	if b.err != io.EOF {
		return ""
	}
	return b.diffID()
}

func (b *BlobReader) diffID() digest.Digest {
	if b.diff == nil {
		return b.digest()
	}
	return digest.NewDigest(algorithm(b.want.DiffID), b.diff)
}

// Digest is the digest of the blob, once Read has returned io.EOF; "" before.
func (b *BlobReader) Digest() digest.Digest {
	if b.err != io.EOF {
		return ""
	}
	return b.digest()
}

func (b *BlobReader) digest() digest.Digest {
	return digest.NewDigest(algorithm(b.want.Digest), b.in.hash)
}

// Size is how many bytes of the blob have been read.
func (b *BlobReader) Size() int64 { return b.in.n }

// TarSize is how many bytes of the tar have been read.
func (b *BlobReader) TarSize() int64 { return b.tarSize }

func (b *BlobReader) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.out.Read(p)
	b.tarSize += int64(n)
	if b.diff != nil {
		b.diff.Write(p[:n])
	}
	if err == io.EOF {
		err = b.finish()
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("layer: blob %s: %w", b.name(), err)
	}
	b.err = err
	return n, err
}

// name is how errors call the blob.
func (b *BlobReader) name() string {
	if b.want.Digest == "" {
		return "(digest not known)"
	}
	return b.want.Digest.String()
}

// finish reads what follows the compressed stream, so that the digest covers it,
// and compares; io.EOF if all is as it should be.
func (b *BlobReader) finish() error {
	if _, err := io.Copy(io.Discard, b.in); err != nil {
		return err
	}
	if w := b.want.Size; w > 0 && b.in.n != w {
		return fmt.Errorf("%d bytes, expected %d: %w", b.in.n, w, errdefs.ErrDataLoss)
	}
	if got := b.digest(); b.want.Digest != "" && got != b.want.Digest {
		return fmt.Errorf("digest is %s, expected %s: %w", got, b.want.Digest, errdefs.ErrDataLoss)
	}
	if got := b.diffID(); b.want.DiffID != "" && got != b.want.DiffID {
		return fmt.Errorf("DiffID is %s, expected %s: %w", got, b.want.DiffID, errdefs.ErrDataLoss)
	}
	return io.EOF
}

// Close frees buffers. It does not close the blob. Idempotent.
func (b *BlobReader) Close() error {
	if b.out == nil {
		return nil
	}
	err := b.out.Close()
	b.out = nil
	if b.err == nil {
		b.err = io.ErrClosedPipe
	}
	return err
}

// blobInput hashes and counts the blob's bytes, and stops a blob that is longer
// than it should be.
type blobInput struct {
	r     io.Reader
	hash  hash.Hash
	n     int64
	limit int64 // 0: none
}

func (i *blobInput) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	i.hash.Write(p[:n])
	i.n += int64(n)
	if i.limit > 0 && i.n > i.limit {
		return n, fmt.Errorf("more than the expected %d bytes: %w", i.limit, errdefs.ErrDataLoss)
	}
	return n, err
}
