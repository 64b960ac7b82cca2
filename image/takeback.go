package image

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
)

// TakeBack undoes what a Load has listed, where what was to follow it failed: in
// index.json images get back what they had before r, unless somebody changed
// that since. An image that was listed under the same name before stays. Blobs
// stay until GC.
func (s *Store) TakeBack(ctx context.Context, r LoadResult, images ...Image) error {
	err := s.update(ctx, func(all []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		for _, img := range images {
			all = s.takeBack(all, r.before, img)
		}
		return all, nil
	})
	if err != nil {
		return fmt.Errorf("image: take back: %w", err)
	}
	return nil
}

func (s *Store) takeBack(all, before []ocispec.Descriptor, img Image) []ocispec.Descriptor {
	is := func(d ocispec.Descriptor) bool {
		return d.Digest == img.Target.Digest && entryImage(d).Name == img.Name
	}
	if slices.ContainsFunc(before, is) || !slices.ContainsFunc(all, is) {
		return all
	}
	all = slices.DeleteFunc(all, is)
	for _, d := range before {
		if !replaces(img, d) {
			continue
		}
		if _, whole := s.layout.size(d.Digest); whole { // no GC came in between
			all = append(all, d)
		}
	}
	return all
}

// Discard removes from view the layers that an Unpack of img which failed has
// made, u: those that no listed image has and nothing is built on. While somebody
// else works with the store it removes none, since that may just be building on
// them.
func (s *Store) Discard(ctx context.Context, view Snapshots, img Image, u Unpacked, platform string) error {
	if u.New == 0 {
		return nil
	}
	l, err := tryLock(s.blobsDir(), sys.LockExclusive)
	if errdefs.IsUnavailable(err) {
		return nil
	}
	if err == nil {
		defer l.Close()
		err = s.discard(ctx, view, img, u, platform)
	}
	if err != nil {
		return fmt.Errorf("image: discard layers of %s: %w", img, err)
	}
	return nil
}

func (s *Store) discard(ctx context.Context, view Snapshots, img Image, u Unpacked, platform string) error {
	m, err := s.manifest(ctx, img, platform)
	if err != nil {
		return err
	}
	needed, err := s.neededLayers(ctx)
	if err != nil {
		return err
	}
	done := slices.IndexFunc(m.Layers, func(l Layer) bool { return l.ChainID == u.ChainID }) + 1
	for i := done - 1; i >= 0 && i >= done-u.New; i-- {
		if needed[m.Layers[i].ChainID] {
			break
		}
		err := view.Remove(ctx, m.Layers[i].ChainID.String())
		if errdefs.IsFailedPrecondition(err) {
			break // something is built on it
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return view.Cleanup(ctx)
}

// neededLayers are the ChainIDs of the layers of every image that is listed.
func (s *Store) neededLayers(ctx context.Context) (map[digest.Digest]bool, error) {
	list, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	needed := map[digest.Digest]bool{}
	for _, img := range list {
		m, err := s.manifest(ctx, img, "")
		if errdefs.IsNotFound(err) {
			continue // of another platform: nothing of it is unpacked here
		}
		if err != nil {
			return nil, err
		}
		for _, l := range m.Layers {
			needed[l.ChainID] = true
		}
	}
	return needed, nil
}
