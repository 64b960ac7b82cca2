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
)

const copyBuffer = 1 << 20

// adopter is a provider whose verified blobs are files of their own on the
// store's file system, so that a link makes them the store's.
type adopter interface {
	// adopt returns the path of a file with exactly these bytes; "" if there is none.
	adopt(d digest.Digest, size int64) (path string)
}

// copyBlob brings a blob into the store unless it is there. What is there is
// read against its digest: a load is what heals a store, and reading is cheaper
// than fetching. The bytes that come are verified against desc on the way. done
// is told how many bytes were dealt with.
func (s *Store) copyBlob(ctx context.Context, from content.Provider, desc ocispec.Descriptor, done func(int64)) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	size, kept := s.layout.size(desc.Digest)
	if kept && size == desc.Size {
		err := s.verifyBlob(ctx, desc, done)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Wrong bytes, or some that the disk does not give: what comes takes its place.
		done = func(int64) {} // these bytes were told of
	}
	path := ""
	if a, ok := from.(adopter); ok {
		path = a.adopt(desc.Digest, desc.Size)
	}
	if path != "" {
		done(desc.Size)
	}
	switch {
	case kept:
		return s.replaceBlob(ctx, from, path, desc, done)
	case path != "":
		return adoptBlob(s.dir, path, desc.Digest)
	}
	w, err := s.writer()
	if err != nil {
		return err
	}
	return fetch(ctx, from, desc, done, func(r io.Reader) error {
		_, err := ingest(ctx, w, r, desc)
		return err
	})
}

// fetch gives use what from says is the blob, with the right size, unverified.
func fetch(ctx context.Context, from content.Provider, desc ocispec.Descriptor, done func(int64), use func(io.Reader) error) error {
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	if err := checkSize(desc, ra.Size()); err != nil {
		return err
	}
	return use(&progressReader{r: content.NewReader(ra), done: done})
}

// replaceBlob puts the right bytes, of the file at path if it is not "", in the
// place of a rotten blob, in one rename when they are verified and durable: what
// comes may be no better than what is there. Who has the old one open keeps it.
func (s *Store) replaceBlob(ctx context.Context, from content.Provider, path string, desc ocispec.Descriptor, done func(int64)) (err error) {
	dir, err := s.staging("heal-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	healed := dir + "/blob"
	if path != "" {
		err = os.Link(path, healed)
	} else {
		err = fetch(ctx, from, desc, done, func(r io.Reader) error { return writeVerified(ctx, healed, r, desc) })
	}
	if err != nil {
		return err
	}
	if err := seal(healed); err != nil {
		return err
	}
	target := filepath.Join(s.dir, blobPath(desc.Digest))
	if err := os.Rename(healed, target); err != nil {
		return err
	}
	return syncDir(filepath.Dir(target))
}

// writeVerified writes the blob desc, which r should be, to a new file.
func writeVerified(ctx context.Context, path string, r io.Reader, desc ocispec.Descriptor) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	h := desc.Digest.Algorithm().Hash()
	n, err := io.CopyBuffer(io.MultiWriter(onlyWriter{f}, h), ctxReader{ctx, io.LimitReader(r, desc.Size+1)}, make([]byte, copyBuffer))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if err := checkSize(desc, n); err != nil {
		return err
	}
	if got := digest.NewDigest(desc.Digest.Algorithm(), h); got != desc.Digest {
		return wrongDigest(desc.Digest, got)
	}
	return nil
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
	if err := seal(path); err != nil {
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

// seal makes a file what a blob is: durable, and nobody's to write.
func seal(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	return f.Sync()
}
