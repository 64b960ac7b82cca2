package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// Kind is the form in which images came.
type Kind string

// The kinds.
const (
	KindLayout        Kind = "oci"            // an OCI image layout directory
	KindLayoutArchive Kind = "oci-archive"    // a tar of one
	KindDockerArchive Kind = "docker-archive" // what docker save writes
)

// source is images being read: their index, and their blobs.
type source struct {
	content.Provider
	kind  Kind
	index ocispec.Index
	close func() error
}

// openSource opens the layout directory or archive at path.
func (s *Store) openSource(ctx context.Context, path string, lim Limits) (*source, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if fi.IsDir() {
		f.Close()
		return layoutSource(path, lim)
	}
	if plain, err := isPlain(f, fi); err != nil || !plain {
		defer f.Close()
		if err != nil {
			return nil, err
		}
		return s.streamSource(ctx, f, lim)
	}
	a, err := openArchive(ctx, f, lim)
	if err != nil {
		return nil, err
	}
	return archiveSource(ctx, a, lim, a.Close)
}

// isPlain reports whether a file is an uncompressed archive that can be read at
// any place.
func isPlain(f *os.File, fi os.FileInfo) (bool, error) {
	if !fi.Mode().IsRegular() {
		return false, nil
	}
	comp, err := sniff(f)
	return comp == layer.None, err
}

func layoutSource(path string, lim Limits) (*source, error) {
	l, err := openLayout(path)
	if err != nil {
		return nil, err
	}
	idx, err := l.index(lim)
	if err != nil {
		l.Close()
		return nil, err
	}
	return &source{Provider: l, kind: KindLayout, index: idx, close: l.Close}, nil
}

// streamSource reads an archive, compressed or not, that can be read only once:
// to its end, into files on the store's file system.
func (s *Store) streamSource(ctx context.Context, r io.Reader, lim Limits) (*source, error) {
	dir, err := s.staging("load-")
	if err != nil {
		return nil, err
	}
	remove := func() error { return os.RemoveAll(dir) }
	src, err := spoolSource(ctx, r, dir, lim, remove)
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	return src, nil
}

func spoolSource(ctx context.Context, r io.Reader, dir string, lim Limits, remove func() error) (*source, error) {
	plain, _, err := layer.Decompress(ctxReader{ctx, r}, lim.archive())
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	a, err := spoolArchive(ctx, plain, dir, lim)
	if err != nil {
		return nil, err
	}
	return archiveSource(ctx, a, lim, remove)
}

// archiveSource tells the two kinds of archive apart. One that is both (docker's,
// since 25) is taken as the layout that it is.
func archiveSource(ctx context.Context, a *archive, lim Limits, close func() error) (*source, error) {
	src, err := readArchive(ctx, a, lim)
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	src.close = close
	return src, nil
}

func readArchive(ctx context.Context, a *archive, lim Limits) (*source, error) {
	switch {
	case a.has(ocispec.ImageLayoutFile) && a.has(ocispec.ImageIndexFile):
		return readLayoutArchive(a, lim)
	case a.has(dockerManifest) || a.has(dockerRepositories):
		d, err := newDockerArchive(ctx, a, lim)
		if err != nil {
			return nil, err
		}
		return &source{Provider: d, kind: KindDockerArchive, index: d.index}, nil
	}
	return nil, fmt.Errorf("no %s with %s and no %s in it: neither an OCI layout nor a docker-archive: %w",
		ocispec.ImageLayoutFile, ocispec.ImageIndexFile, dockerManifest, errdefs.ErrInvalidArgument)
}

func readLayoutArchive(a *archive, lim Limits) (*source, error) {
	b, err := a.readFile(ocispec.ImageLayoutFile, 64<<10)
	if err != nil {
		return nil, err
	}
	if err := checkLayoutVersion(b); err != nil {
		return nil, err
	}
	if b, err = a.readFile(ocispec.ImageIndexFile, lim.Document); err != nil {
		return nil, err
	}
	idx, err := parseIndex(b, lim)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ocispec.ImageIndexFile, err)
	}
	return &source{Provider: a, kind: KindLayoutArchive, index: idx}, nil
}

// entryName is what the entry of a foreign index.json calls its image: docker
// and containerd put the whole name into an annotation of theirs and only the
// tag into OCI's.
func entryName(d ocispec.Descriptor) string {
	if n := d.Annotations[images.AnnotationImageName]; n != "" {
		return n
	}
	return d.Annotations[ocispec.AnnotationRefName]
}

// staging makes a directory for what must not be seen yet, on the file system of
// the blobs. What a crash leaves of it goes with the next GC.
func (s *Store) staging(prefix string) (string, error) {
	ingest := s.dir + "/ingest"
	if err := os.MkdirAll(ingest, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(ingest, prefix)
}
