package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layout is an OCI image layout directory, opened for reading: the store's own
// or any other. What is below it is resolved inside it (os.Root), so a symlink
// in a layout from elsewhere leads nowhere else. It is a content.Provider.
type layout struct {
	dir  string // for messages
	root *os.Root
}

// openLayout opens the layout at dir. ErrNotFound if the directory is not
// there; ErrInvalidArgument if it is not an image layout of version 1.
func openLayout(dir string) (*layout, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	l := &layout{dir: dir, root: root}
	if err := l.checkVersion(); err != nil {
		root.Close()
		return nil, err
	}
	return l, nil
}

func (l *layout) Close() error { return l.root.Close() }

func (l *layout) checkVersion() error {
	b, err := l.readFile(ocispec.ImageLayoutFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no file %s: not an OCI image layout: %w", ocispec.ImageLayoutFile, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return err
	}
	return checkLayoutVersion(b)
}

func checkLayoutVersion(b []byte) error {
	var v ocispec.ImageLayout
	if err := unmarshal(b, &v); err != nil {
		return fmt.Errorf("%s: %w", ocispec.ImageLayoutFile, err)
	}
	if v.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("%s: version %q, not %q: %w", ocispec.ImageLayoutFile, v.Version, ocispec.ImageLayoutVersion, errdefs.ErrNotImplemented)
	}
	return nil
}

// index reads index.json.
func (l *layout) index(lim Limits) (ocispec.Index, error) {
	b, err := l.readFile(ocispec.ImageIndexFile, lim.Document)
	if errors.Is(err, fs.ErrNotExist) {
		return ocispec.Index{}, fmt.Errorf("no %s: %w", ocispec.ImageIndexFile, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return ocispec.Index{}, err
	}
	idx, err := parseIndex(b, lim)
	if err != nil {
		return idx, fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err)
	}
	return idx, nil
}

// readFile reads a regular file of at most limit bytes.
func (l *layout) readFile(name string, limit int64) ([]byte, error) {
	f, size, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if over(size, limit) {
		return nil, fmt.Errorf("%s: %d bytes, more than %d: %w", name, size, limit, errdefs.ErrResourceExhausted)
	}
	return io.ReadAll(io.LimitReader(f, size))
}

// open opens a regular file below the layout. O_NONBLOCK, because a fifo in its
// place must not hang us.
func (l *layout) open(name string) (*os.File, int64, error) {
	f, err := l.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// blobPath is where a layout keeps the blob of a valid digest.
func blobPath(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

// ReaderAt implements content.Provider. ErrNotFound names the blob.
func (l *layout) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	f, size, err := l.open(blobPath(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, missing(desc.Digest)
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	return blobFile{f, size}, nil
}

func missing(d digest.Digest) error { return fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound) }

// blobFile is an open blob; it reads sequentially by the file itself, which the
// kernel reads ahead for.
type blobFile struct {
	*os.File
	size int64
}

func (b blobFile) Size() int64       { return b.size }
func (b blobFile) Reader() io.Reader { return io.LimitReader(b.File, b.size) }

// size returns the length of a blob, and false if it is not there.
func (l *layout) size(d digest.Digest) (int64, bool) {
	fi, err := l.root.Lstat(blobPath(d))
	if err != nil || !fi.Mode().IsRegular() {
		return 0, false
	}
	return fi.Size(), true
}

// initLayout makes an empty image layout in the existing directory dir, or
// completes one that a crash left half made: oci-layout is written last.
func initLayout(dir string) error {
	if err := os.MkdirAll(dir+"/"+ocispec.ImageBlobsDir+"/"+digest.Canonical.String(), 0o755); err != nil {
		return err
	}
	if _, err := os.Lstat(dir + "/" + ocispec.ImageIndexFile); errors.Is(err, fs.ErrNotExist) {
		if err := writeIndex(dir, ocispec.Index{}); err != nil {
			return err
		}
	}
	b, err := marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return replaceFile(dir, ocispec.ImageLayoutFile, b)
}

// writeIndex replaces index.json.
func writeIndex(dir string, idx ocispec.Index) error {
	idx.Versioned = specs.Versioned{SchemaVersion: 2}
	idx.MediaType = ocispec.MediaTypeImageIndex
	if idx.Manifests == nil {
		idx.Manifests = []ocispec.Descriptor{}
	}
	b, err := marshal(idx)
	if err != nil {
		return err
	}
	return replaceFile(dir, ocispec.ImageIndexFile, b)
}

// replaceFile gives name in dir new bytes so that a reader, and whoever looks
// after a power cut, sees the old or the new ones whole: data, then the name,
// then the directory. The caller holds the lock of dir, so the temporary name is
// fixed and a leftover of a crash is overwritten.
func replaceFile(dir, name string, b []byte) error {
	tmp := dir + "/." + name + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, dir+"/"+name)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
