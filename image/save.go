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
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Destination says where an image is written.
type Destination struct {
	// Kind is the form; "" is KindLayout.
	Kind Kind
	// Path is a directory for KindLayout: a new or empty one, or an image layout
	// that gets one image more. For an archive it is a file, replaced whole.
	Path string
	// Writer takes an archive instead of Path.
	Writer io.Writer
}

func (d Destination) String() string {
	if d.Writer != nil {
		return string(d.Kind)
	}
	return d.Path
}

// SaveOptions say how an image is written. The zero value keeps the image's name.
type SaveOptions struct {
	// Name is the image's name there; "" keeps the one that it has.
	Name string
	// Platform chooses one of several for a docker-archive, which holds no more,
	// and is the platform of an image made without a base; "" is this machine's.
	Platform string
	// Base is the image whose configuration and history a snapshot's image goes on
	// from; "" looks for an image that was unpacked to the snapshot's chain.
	Base string
	// Compression is of layers that have to be made; "" is gzip, which everything
	// reads.
	Compression layer.Compression
	// Created dates what is made: the configuration, history, whiteouts
	// (SOURCE_DATE_EPOCH). Zero takes a snapshot's own time of creation, and 1970
	// for whiteouts, so that saving twice gives the same bytes.
	Created time.Time
	// CreatedBy and Author stand in the history of layers that no base has.
	CreatedBy, Author string
	// Window is how much memory a zstd layer may ask for that a docker-archive has
	// to be given uncompressed; see layer.Limits.
	Window int64
	// Snapshots is where Save finds the layers of an image whose blobs were
	// dropped, unpacked; nil makes that an error.
	Snapshots Snapshots
	// Skipped, if not nil, is told what a layer could not express (a socket).
	Skipped func(path, reason string)
	// Progress, if not nil, is told of the work.
	Progress Progress
}

// Save writes an image as it is: every blob that the store has, with its digest.
// A docker-archive holds the layers uncompressed and a manifest of its own. What
// is at the destination is whole or not there: temporary name, flush, rename.
// Layers that were dropped are made anew from o.Snapshots, with other digests.
func (s *Store) Save(ctx context.Context, img Image, to Destination, o SaveOptions) (ocispec.Descriptor, error) {
	compose := func(context.Context, *sink) (Image, error) { return img, nil }
	if img.LayersDropped {
		compose = func(ctx context.Context, k *sink) (Image, error) { return s.restore(ctx, img, k, o) }
	}
	desc, err := s.save(ctx, to, compose, o)
	if err != nil {
		return desc, fmt.Errorf("image: save %s to %s: %w", img, to, err)
	}
	return desc, nil
}

// SaveSnapshot writes the snapshot key, with the chain below it, as an image of
// one layer per snapshot. Layers that Unpack labelled and whose blobs are kept
// are handed out as they came; others are made by Diff. A snapshot that is an
// image unpacked, with all blobs kept, is that image again, with its digest.
func (s *Store) SaveSnapshot(ctx context.Context, view Snapshots, key string, to Destination, o SaveOptions) (ocispec.Descriptor, error) {
	compose := func(ctx context.Context, k *sink) (Image, error) {
		c := &composer{s: s, view: view, o: o, sink: k}
		return c.compose(ctx, key)
	}
	desc, err := s.save(ctx, to, compose, o)
	if err != nil {
		return desc, fmt.Errorf("image: save snapshot %s to %s: %w", key, to, err)
	}
	return desc, nil
}

// restore makes an image whose layer blobs were dropped of its snapshots.
func (s *Store) restore(ctx context.Context, img Image, k *sink, o SaveOptions) (Image, error) {
	m, err := s.manifest(ctx, img, o.Platform)
	if err != nil {
		return img, err
	}
	if o.Snapshots == nil {
		return img, fmt.Errorf("its layer blobs were dropped; they are in snapshot %s: %w", m.ChainID(), errdefs.ErrNotFound)
	}
	o.Base = img.Target.Digest.String()
	made, err := (&composer{s: s, view: o.Snapshots, o: o, sink: k}).compose(ctx, m.ChainID().String())
	made.Name = img.Name
	return made, err
}

func (s *Store) save(ctx context.Context, to Destination, compose func(context.Context, *sink) (Image, error), o SaveOptions) (ocispec.Descriptor, error) {
	if o.Name != "" {
		if err := checkName(o.Name); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	l, err := lock(ctx, s.blobsDir(), sys.LockShared)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer l.Close()
	k, err := s.openSink(ctx, to)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer k.close()
	img, err := compose(ctx, k)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if o.Name != "" {
		img.Name = o.Name
	}
	return img.Target, k.write(ctx, img, o)
}

// sink is a destination being written to.
type sink struct {
	from *Store // the blobs that are kept
	to   Destination

	layout *Store    // what blobs are made in: a layout destination, or a temporary one
	final  string    // the layout's path in the end; "" if it is there already
	tmp    string    // directory that goes in the end; "" if none
	held   *sys.Lock // of an existing layout's blobs
}

// openSink looks at the destination and refuses it before any work is done.
func (s *Store) openSink(ctx context.Context, to Destination) (*sink, error) {
	k := &sink{from: s, to: to}
	var err error
	switch to.Kind {
	case "", KindLayout:
		err = k.openLayout(ctx)
	case KindLayoutArchive, KindDockerArchive:
		if (to.Path == "") == (to.Writer == nil) {
			err = fmt.Errorf("an archive needs a path or a writer: %w", errdefs.ErrInvalidArgument)
		}
	default:
		err = fmt.Errorf("form %q: %w", to.Kind, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

// openLayout opens an existing layout, or makes a new one next to where it goes.
func (k *sink) openLayout(ctx context.Context) (err error) {
	if k.to.Path == "" {
		return fmt.Errorf("a layout needs a path: %w", errdefs.ErrInvalidArgument)
	}
	path, err := filepath.Abs(k.to.Path)
	if err != nil {
		return err
	}
	if names, err := os.ReadDir(path); len(names) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return k.openExisting(ctx, path)
	}
	tmp := temporary(path)
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	k.tmp, k.final = tmp, path
	k.layout, err = Open(k.tmp)
	return err
}

func (k *sink) openExisting(ctx context.Context, path string) (err error) {
	if k.layout, err = Open(path); err != nil {
		return fmt.Errorf("there is something else: %w", err)
	}
	if path == k.from.dir {
		return nil // its lock is held already
	}
	if err := os.MkdirAll(k.layout.blobsDir(), 0o755); err != nil {
		return err
	}
	k.held, err = lock(ctx, k.layout.blobsDir(), sys.LockShared)
	return err
}

// store returns the layout in which blobs are made.
func (k *sink) store() (content.Store, error) {
	if k.layout == nil {
		var err error
		if k.tmp, err = k.from.staging("save-"); err != nil {
			return nil, err
		}
		if k.layout, err = Open(k.tmp); err != nil {
			return nil, err
		}
	}
	return k.layout.writer()
}

// ReaderAt implements content.Provider: kept blobs and made ones.
func (k *sink) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if k.layout != nil {
		if ra, err := k.layout.layout.ReaderAt(ctx, desc); err == nil {
			return ra, nil
		}
	}
	return k.from.layout.ReaderAt(ctx, desc)
}

func (k *sink) close() {
	k.held.Close()
	if k.layout != nil {
		k.layout.Close()
	}
	if k.tmp != "" {
		os.RemoveAll(k.tmp)
	}
}

// write writes img, whose blobs the sink provides.
func (k *sink) write(ctx context.Context, img Image, o SaveOptions) error {
	if k.to.Kind == KindDockerArchive {
		return k.archive(func(w io.Writer) error { return k.writeDocker(ctx, w, img, o) })
	}
	m, err := k.readWhole(ctx, img, o.Platform)
	if err != nil {
		return err
	}
	blobs := newReachable(walker{p: k, lim: kept})
	if err := blobs.add(ctx, img.Target, 1); err != nil {
		return err
	}
	img.LayersDropped = false
	if k.to.Kind == KindLayoutArchive {
		return k.archive(func(w io.Writer) error { return k.writeArchive(ctx, w, img, blobs.list, m, o) })
	}
	return k.writeLayout(ctx, img, blobs.list, m, o)
}

// readWhole reads the manifest for the platform, whose blobs must all be there,
// and returns their digests.
func (k *sink) readWhole(ctx context.Context, img Image, platform string) (map[digest.Digest]bool, error) {
	match, err := matcher(platform)
	if err != nil {
		return nil, err
	}
	m, err := (&walker{p: k, lim: kept}).manifest(ctx, img.Target, match)
	if err != nil {
		return nil, err
	}
	required := map[digest.Digest]bool{img.Target.Digest: true, m.Target.Digest: true, m.config.Digest: true}
	for i, l := range m.Layers {
		if _, err := present(ctx, k, l.Blob); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
		}
		required[l.Blob.Digest] = true
	}
	return required, nil
}

// writeLayout brings the blobs into the destination and lists the image there,
// then gives a new layout its name.
func (k *sink) writeLayout(ctx context.Context, img Image, blobs []ocispec.Descriptor, required map[digest.Digest]bool, o SaveOptions) error {
	m := newMeter(o.Progress, Event{Step: "save", Total: total(blobs)})
	if err := k.layout.copyAll(ctx, k, blobs, required, m); err != nil {
		return err
	}
	if _, err := k.layout.put(ctx, img); err != nil {
		return err
	}
	if k.layout.dir != k.from.dir {
		os.Remove(k.layout.dir + "/ingest") // if nobody else writes there
	}
	if k.final == "" {
		return nil
	}
	if err := syncDir(k.tmp); err != nil {
		return err
	}
	// os.Rename refuses even an empty directory; Remove refuses any other.
	if err := os.Remove(k.final); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(k.tmp, k.final); err != nil {
		return err
	}
	k.tmp = ""
	return syncDir(filepath.Dir(k.final))
}

// archive runs write on the destination's file, which is replaced in the end, or
// on its writer. A path that is no regular file (a pipe) is written to as it is.
func (k *sink) archive(write func(io.Writer) error) error {
	if k.to.Writer != nil {
		return write(k.to.Writer)
	}
	fi, err := os.Stat(k.to.Path)
	if err == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(k.to.Path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return write(f)
	}
	return writeFile(k.to.Path, write)
}

// writeFile replaces path by what write writes: data, then the name, then the
// directory.
func writeFile(path string, write func(io.Writer) error) (err error) {
	f, err := os.OpenFile(temporary(path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// temporary is a name next to path that nobody has.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp-"+rand.Text())
}

// reversed returns a copy, last first: what names blobs before the blobs.
func reversed(list []ocispec.Descriptor) []ocispec.Descriptor {
	list = slices.Clone(list)
	slices.Reverse(list)
	return list
}
