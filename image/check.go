package image

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
)

// CheckOptions say how much is checked.
type CheckOptions struct {
	// Quick looks at documents and at sizes only, not at the bytes of layers.
	Quick bool
	// Platform is what must be whole of an image of several platforms; "" is
	// this machine's.
	Platform string
	// Repair removes rotten blobs, so that nothing takes them for the right ones;
	// loading the image again brings those back.
	Repair bool
	// Progress, if not nil, is told of the reading.
	Progress Progress
}

// Finding is something wrong with the store.
type Finding struct {
	Image    string        // an image that it hurts; "" if none does
	Blob     digest.Digest // the blob; "" where no single one is
	Err      error         // wraps ErrNotFound (missing) or ErrDataLoss (rotten), or says else what is wrong
	Repaired bool          // the rotten blob was removed
}

func (f Finding) String() string {
	s := f.Err.Error()
	if f.Image != "" {
		s = f.Image + ": " + s
	}
	if f.Repaired {
		s += " (removed)"
	}
	return s
}

// Check verifies every blob and that every image is whole, and returns what is
// wrong; nil when nothing is. Its error is for what kept it from looking. It
// excludes whatever deletes blobs, and with Repair also whatever adds them.
func (s *Store) Check(ctx context.Context, o CheckOptions) ([]Finding, error) {
	kind := sys.LockShared
	if o.Repair {
		kind = sys.LockExclusive
	}
	l, err := lock(ctx, s.blobsDir(), kind)
	if err != nil {
		return nil, fmt.Errorf("image: check: %w", err)
	}
	defer l.Close()
	c := &checker{s: s, o: o, users: map[digest.Digest]string{}, rotten: map[digest.Digest]bool{}}
	if err := c.run(ctx); err != nil {
		return c.found, fmt.Errorf("image: check: %w", err)
	}
	return c.found, nil
}

type checker struct {
	s      *Store
	o      CheckOptions
	users  map[digest.Digest]string // an image that needs the blob
	rotten map[digest.Digest]bool
	found  []Finding
}

func (c *checker) run(ctx context.Context) error {
	list, err := c.s.List(ctx)
	if err != nil {
		return err
	}
	for _, img := range list {
		blobs, err := c.s.blobs(ctx, img)
		if interrupted(ctx, err) {
			return err
		}
		for _, d := range blobs { // those before an error, which images reports
			c.users[d.Digest] = img.String()
		}
	}
	if err := c.blobs(ctx); err != nil {
		return err
	}
	return c.images(ctx, list)
}

func interrupted(ctx context.Context, err error) bool { return err != nil && ctx.Err() != nil }

// blobs reads every blob against its name.
func (c *checker) blobs(ctx context.Context) error {
	var sum int64
	if err := c.s.walkBlobs(ctx, func(_ digest.Digest, size int64) error { sum += size; return nil }); err != nil {
		return err
	}
	m := newMeter(c.o.Progress, Event{Step: "check", Total: sum})
	return c.s.walkBlobs(ctx, func(d digest.Digest, size int64) error {
		if c.o.Quick && over(size, Limits{}.withDefaults().Document) {
			return nil
		}
		err := c.s.verifyBlob(ctx, ocispec.Descriptor{Digest: d, Size: size}, m.add)
		if err == nil || interrupted(ctx, err) {
			return err
		}
		return c.rot(d, err)
	})
}

// rot notes a rotten blob, and with Repair removes it.
func (c *checker) rot(d digest.Digest, err error) error {
	f := Finding{Image: c.users[d], Blob: d, Err: err}
	c.rotten[d] = true
	if c.o.Repair {
		if err := c.s.delete(d); err != nil {
			return err
		}
		f.Repaired = true
	}
	c.found = append(c.found, f)
	return nil
}

// verifyBlob reads a blob and compares its bytes with its digest.
func (s *Store) verifyBlob(ctx context.Context, desc ocispec.Descriptor, done func(int64)) error {
	ra, err := s.layout.ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer ra.Close()
	got, err := desc.Digest.Algorithm().FromReader(ctxReader{ctx, &progressReader{content.NewReader(ra), done}})
	if err != nil {
		return fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	if got != desc.Digest {
		return fmt.Errorf("blob %w", wrongDigest(desc.Digest, got))
	}
	return nil
}

// images looks whether every image has what it needs.
func (c *checker) images(ctx context.Context, list []Image) error {
	for _, img := range list {
		m, err := c.s.manifest(ctx, img, c.o.Platform)
		if interrupted(ctx, err) {
			return err
		}
		if err != nil {
			c.note(img, "", err)
			continue
		}
		for _, l := range m.Layers {
			if err := c.layer(img, l.Blob); err != nil {
				c.note(img, l.Blob.Digest, err)
			}
		}
	}
	return nil
}

// layer looks whether a layer's blob is there, unless it was dropped.
func (c *checker) layer(img Image, blob ocispec.Descriptor) error {
	size, ok := c.s.layout.size(blob.Digest)
	switch {
	case !ok && (img.LayersDropped || c.rotten[blob.Digest]):
		return nil
	case !ok:
		return missing(blob.Digest)
	case size != blob.Size:
		return checkSize(blob, size)
	}
	return nil
}

// note adds a finding, unless it only repeats that a blob is rotten.
func (c *checker) note(img Image, d digest.Digest, err error) {
	if errdefs.IsDataLoss(err) && c.rotten[d] {
		return
	}
	c.found = append(c.found, Finding{Image: img.String(), Blob: d, Err: err})
}
