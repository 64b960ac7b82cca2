package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
)

// GCReport says what GC removed.
type GCReport struct {
	Blobs    int   // blobs that no image needs
	Bytes    int64 // of those blobs
	Ingests  int   // leftovers of writes that did not end
	Unpacked int   // leftovers of unpacks that did not end, in the given views
}

// GC removes what no image in index.json needs: blobs, leftovers of interrupted
// loads and saves, and in each of views what an interrupted Unpack left. It
// waits until no Load, Unpack or Save is under way in any process, as long as
// ctx lasts. It removes nothing if a document that says what is needed cannot be
// read.
func (s *Store) GC(ctx context.Context, views ...Snapshots) (GCReport, error) {
	r, err := s.gc(ctx, views)
	if err != nil {
		return r, fmt.Errorf("image: gc: %w", err)
	}
	return r, nil
}

func (s *Store) gc(ctx context.Context, views []Snapshots) (r GCReport, err error) {
	l, err := lock(ctx, s.blobsDir(), sys.LockExclusive)
	if err != nil {
		return r, err
	}
	defer l.Close()
	needed, err := s.needed(ctx)
	if err != nil {
		return r, err
	}
	for _, v := range views {
		n, err := sweep(ctx, v)
		r.Unpacked += n
		if err != nil {
			return r, err
		}
	}
	err = s.walkBlobs(ctx, func(d digest.Digest, size int64) error {
		if needed[d] {
			return nil
		}
		r.Blobs++
		r.Bytes += size
		return s.delete(d)
	})
	if err != nil {
		return r, err
	}
	r.Ingests, err = s.sweepIngest()
	return r, err
}

// needed are the digests of all blobs that the images lead to, but for layers
// that were dropped. The caller holds the blobs' lock, so no image is being
// added that relies on a blob which is not listed yet.
func (s *Store) needed(ctx context.Context) (map[digest.Digest]bool, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	set := map[digest.Digest]bool{}
	for _, img := range list {
		if _, err := present(ctx, s.layout, img.Target); err != nil {
			return nil, fmt.Errorf("%s: %w", img, err)
		}
		blobs, err := s.blobs(ctx, img)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", img, err)
		}
		for _, d := range blobs {
			set[d.Digest] = true
		}
	}
	return set, nil
}

// blobs lists every blob of an image, children first; without layers where they
// were dropped.
func (s *Store) blobs(ctx context.Context, img Image) ([]ocispec.Descriptor, error) {
	r := newReachable(walker{p: s.layout, lim: kept})
	r.skipLayers = img.LayersDropped
	err := r.add(ctx, img.Target, 1)
	return r.list, err
}

// walkBlobs calls f for each blob file. Files with other names are not blobs,
// and none of ours.
func (s *Store) walkBlobs(ctx context.Context, f func(d digest.Digest, size int64) error) error {
	algs, err := os.ReadDir(s.blobsDir())
	if err != nil {
		return err
	}
	for _, alg := range algs {
		names, err := os.ReadDir(s.blobsDir() + "/" + alg.Name())
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			d := digest.NewDigestFromEncoded(digest.Algorithm(alg.Name()), n.Name())
			fi, err := n.Info()
			if errors.Is(err, fs.ErrNotExist) || d.Validate() != nil {
				continue
			}
			if err != nil {
				return err
			}
			if err := f(d, fi.Size()); err != nil {
				return err
			}
		}
	}
	return nil
}

// delete removes a blob; whoever may need it is excluded by the caller.
func (s *Store) delete(d digest.Digest) error {
	err := s.layout.root.Remove(blobPath(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// sweepIngest empties ingest/ and removes what an interrupted probe of the
// content store left. Nobody is writing: the caller holds the blobs' lock
// exclusively.
func (s *Store) sweepIngest() (int, error) {
	n := 0
	for _, dir := range []string{s.dir + "/ingest", s.dir} {
		names, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return n, err
		}
		for _, e := range names {
			if dir == s.dir && !strings.HasPrefix(e.Name(), ".fsverity-check-") {
				continue
			}
			n++
			if err := os.RemoveAll(dir + "/" + e.Name()); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// DropLayers deletes the layer blobs of an image that no other image needs, for
// those who keep layers only as snapshots. The image stays listed, and Save of it
// makes its layers anew from the snapshots, with digests of their own. It waits
// as GC does, and returns the bytes that were freed.
func (s *Store) DropLayers(ctx context.Context, ref string) (int64, error) {
	n, err := s.dropLayers(ctx, ref)
	if err != nil {
		return n, fmt.Errorf("image: drop layers of %s: %w", ref, err)
	}
	return n, nil
}

func (s *Store) dropLayers(ctx context.Context, ref string) (int64, error) {
	l, err := lock(ctx, s.blobsDir(), sys.LockExclusive)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	img, err := s.Resolve(ctx, ref)
	if err != nil {
		return 0, err
	}
	before, err := s.blobs(ctx, img)
	if err != nil {
		return 0, err
	}
	// First the mark, then the blobs: a crash in between leaves blobs that GC
	// removes, and never an image that looks whole and is not.
	if err := s.markDropped(ctx, img.Target.Digest); err != nil {
		return 0, err
	}
	needed, err := s.needed(ctx)
	if err != nil {
		return 0, err
	}
	var freed int64
	for _, d := range before {
		if size, ok := s.layout.size(d.Digest); ok && !needed[d.Digest] {
			if err := s.delete(d.Digest); err != nil {
				return freed, err
			}
			freed += size
		}
	}
	return freed, nil
}

// markDropped marks every entry of the image: they share their blobs.
func (s *Store) markDropped(ctx context.Context, target digest.Digest) error {
	return s.update(ctx, func(all []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		found := false
		for i, d := range all {
			if d.Digest == target {
				img := entryImage(d)
				img.LayersDropped, found = true, true
				all[i] = indexEntry(img)
			}
		}
		if !found {
			return nil, fmt.Errorf("%s: %w", target, errdefs.ErrNotFound)
		}
		return all, nil
	})
}
