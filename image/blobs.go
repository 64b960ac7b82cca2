package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
)

const copyBuffer = 1 << 20

// adopter is a provider whose verified blobs are files of their own on the
// store's file system, so that a link makes them the store's.
type adopter interface {
	// adopt returns the path of a file with exactly these bytes; "" if there is none.
	adopt(d digest.Digest, size int64) (path string)
}

// copyBlob brings a blob into the store unless it is there. The bytes are
// verified against desc on the way. done is told how many bytes were dealt with.
func (s *Store) copyBlob(ctx context.Context, from content.Provider, desc ocispec.Descriptor, done func(int64)) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	if present, err := s.has(ctx, desc); present || err != nil {
		done(desc.Size)
		return err
	}
	if a, ok := from.(adopter); ok {
		if path := a.adopt(desc.Digest, desc.Size); path != "" {
			done(desc.Size)
			return adoptBlob(s.dir, path, desc.Digest)
		}
	}
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if err := checkSize(desc, ra.Size()); err != nil {
		return err
	}
	w, err := s.writer()
	if err != nil {
		return err
	}
	_, err = ingest(ctx, w, &progressReader{r: content.NewReader(ra), done: done}, desc)
	return err
}

// has reports whether the blob is there with the right size. One of another
// size is rotten, and removed to make room for the right one.
func (s *Store) has(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	size, ok := s.layout.size(desc.Digest)
	if !ok || size == desc.Size {
		return ok, nil
	}
	// Looked at again under a lock: another may have brought the right one since.
	l, err := lock(ctx, s.dir, sys.LockExclusive)
	if err != nil {
		return false, err
	}
	defer l.Close()
	if size, ok = s.layout.size(desc.Digest); ok && size != desc.Size {
		return false, s.delete(desc.Digest)
	}
	return ok, nil
}

// ingest writes r to the content store as one blob and returns its descriptor.
// want names what is known of it: with a digest, digest and size must fit. After
// an error nothing is left.
func ingest(ctx context.Context, cs content.Store, r io.Reader, want ocispec.Descriptor) (ocispec.Descriptor, error) {
	if want.Digest != "" {
		r = io.LimitReader(r, want.Size+1)
	}
	return produce(ctx, cs, want, func(w io.Writer) error {
		if _, err := io.CopyBuffer(onlyWriter{w}, ctxReader{ctx, r}, make([]byte, copyBuffer)); err != nil {
			return fmt.Errorf("%s: %w", orBlob(want.Digest), err)
		}
		return nil
	})
}

// produce is ingest of what write writes.
func produce(ctx context.Context, cs content.Store, want ocispec.Descriptor, write func(io.Writer) error) (ocispec.Descriptor, error) {
	ref := "layerctl-" + rand.Text()
	w, err := cs.Writer(ctx, content.WithRef(ref), content.WithDescriptor(want))
	if errdefs.IsAlreadyExists(err) {
		return want, nil
	}
	if err != nil { // on a full disk its directory in ingest/ may be there already
		return want, errors.Join(err, abort(ctx, cs, ref))
	}
	got, err := fill(ctx, w, want, write)
	if err != nil {
		w.Close()
		err = errors.Join(err, abort(ctx, cs, ref))
	}
	return got, err
}

// abort removes what is unfinished; nil where nothing is.
func abort(ctx context.Context, cs content.Store, ref string) error {
	err := cs.Abort(context.WithoutCancel(ctx), ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func fill(ctx context.Context, w content.Writer, want ocispec.Descriptor, write func(io.Writer) error) (ocispec.Descriptor, error) {
	if err := write(w); err != nil {
		return want, err
	}
	st, err := w.Status()
	if err != nil {
		return want, err
	}
	got := want
	got.Digest, got.Size = w.Digest(), st.Offset
	if want.Digest != "" && got.Size != want.Size {
		return want, checkSize(want, got.Size)
	}
	if want.Digest != "" && got.Digest != want.Digest {
		return want, wrongDigest(want.Digest, got.Digest)
	}
	if err := w.Commit(ctx, got.Size, got.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return want, err
	}
	return got, nil
}

func orBlob(d digest.Digest) string {
	if d == "" {
		return "blob"
	}
	return d.String()
}

// onlyWriter hides every method of a writer but Write, so that CopyBuffer uses
// the buffer.
type onlyWriter struct{ io.Writer }

// ctxReader ends with the context's error when that ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// progressReader tells how many bytes passed.
type progressReader struct {
	r    io.Reader
	done func(int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.done(int64(n))
	return n, err
}

// adoptBlob makes the file at path, whose bytes were verified, a blob of the
// layout dir as well: data, then the name, then the directory. The file keeps
// its old name, for whoever still reads it there.
func adoptBlob(dir, path string, d digest.Digest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	target := filepath.Join(dir, blobPath(d))
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if err := os.Link(path, target); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(target))
}
