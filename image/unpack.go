package image

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// Labels on the snapshots that Unpack commits. They name the blob that a layer
// came from, so that Save can hand it out again as it was.
const (
	LabelDiffID    = "io.github.layerctl.layer.diff-id"    // digest of the uncompressed tar
	LabelBlob      = "io.github.layerctl.layer.digest"     // digest of the blob
	LabelBlobSize  = "io.github.layerctl.layer.size"       // bytes of the blob
	LabelMediaType = "io.github.layerctl.layer.media-type" // of the blob
)

// LabelUnpack marks the active snapshot that a layer is being unpacked to; its
// value is the ChainID. One that is found when nobody unpacks is a leftover.
const LabelUnpack = "io.github.layerctl.unpack"

// Snapshots is what Unpack and Save need of a view of a snapshot store;
// *snapshot.View is one.
type Snapshots interface {
	Stat(ctx context.Context, key string) (snapshots.Info, error)
	Create(ctx context.Context, key, parent string, o snapshot.CreateOptions) error
	CommitWith(ctx context.Context, name, key string, o snapshot.CommitOptions) error
	Remove(ctx context.Context, key string) error
	Cleanup(ctx context.Context) error
	Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error
	Apply(ctx context.Context, key string, tar io.Reader, o layer.ApplyOptions) error
	Diff(ctx context.Context, from, to string) iter.Seq2[layer.Change, error]
}

var _ Snapshots = (*snapshot.View)(nil)

// UnpackOptions say how an image becomes snapshots. The zero value unpacks for
// this machine's platform, durably.
type UnpackOptions struct {
	// Platform chooses from an image of several ("linux/arm64"); "" is this
	// machine's.
	Platform string
	// Volatile skips flushing.
	Volatile bool
	// Apply is handed on to the unpacking of each layer.
	Apply layer.ApplyOptions
	// Labels are set on every snapshot that is committed, besides the above.
	Labels map[string]string
	// Share are other views of the same store. A layer that was unpacked to one of
	// them by Unpack is not unpacked again: its snapshot gets one more name, and
	// the bytes are shared (snapshot.View.Adopt). The view that is unpacked to must
	// be a *snapshot.View then.
	Share []*snapshot.View
	// Progress, if not nil, is told of each layer, in bytes of its blob.
	Progress Progress
}

// Unpacked says what Unpack did.
type Unpacked struct {
	// ChainID is the name of the snapshot that is the whole image; "" if the
	// image has no layers.
	ChainID digest.Digest
	Layers  int // layers of the image
	New     int // of these, how many had to be unpacked
}

// Unpack makes a committed snapshot in view of each layer of the image, named by
// its ChainID; those that are there already are taken. Blob digest and DiffID are
// verified while the layer is read. After an error, or when ctx ends, the layers
// that were done are whole and nothing else is left; what a killed process left
// is removed by the next Unpack or GC: a view is unpacked to from one Store's
// folder only, whose lock says that nobody does so now.
func (s *Store) Unpack(ctx context.Context, view Snapshots, img Image, o UnpackOptions) (Unpacked, error) {
	u, err := s.unpack(ctx, view, img, o)
	if err != nil {
		return u, fmt.Errorf("image: unpack %s: %w", img, err)
	}
	return u, nil
}

func (s *Store) unpack(ctx context.Context, view Snapshots, img Image, o UnpackOptions) (u Unpacked, err error) {
	l, err := s.lockUnpack(ctx, view)
	if err != nil {
		return u, err
	}
	defer l.Close()
	m, err := s.manifest(ctx, img, o.Platform)
	if err != nil {
		return u, err
	}
	u.Layers = len(m.Layers)
	for i, done := 0, false; i < len(m.Layers); i++ {
		if done, err = isCommitted(ctx, view, m.Layers[i].ChainID.String()); err != nil {
			return u, err
		}
		if !done {
			done, err = share(ctx, view, m.Layers[i], o)
		}
		if err != nil {
			return u, fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
		}
		if !done {
			if err := s.unpackLayer(ctx, view, m.Layers, i, o); err != nil {
				return u, fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
			}
			u.New++
		}
		u.ChainID = m.Layers[i].ChainID
	}
	return u, nil
}

// lockUnpack takes the blobs' lock. Where nobody else has it, leftovers of killed
// unpacks are removed first.
func (s *Store) lockUnpack(ctx context.Context, view Snapshots) (*sys.Lock, error) {
	l, err := tryLock(s.blobsDir(), sys.LockExclusive)
	if err == nil {
		_, err = sweep(ctx, view)
		l.Close()
	}
	if err != nil && !errdefs.IsUnavailable(err) {
		return nil, err
	}
	return lock(ctx, s.blobsDir(), sys.LockShared)
}

// sweep removes the active snapshots of unpacks that did not end. The caller
// holds the blobs' lock exclusively.
func sweep(ctx context.Context, view Snapshots) (int, error) {
	var keys []string
	err := view.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindActive && i.Labels[LabelUnpack] != "" {
			keys = append(keys, i.Name)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for n, k := range keys {
		if err := view.Remove(ctx, k); err != nil && !errdefs.IsNotFound(err) {
			return n, err
		}
	}
	return len(keys), nil
}

// share adopts a layer from one of o.Share, if it was unpacked there; by the same
// driver, and on a parent that is shared as well, or else it is none.
func share(ctx context.Context, view Snapshots, l Layer, o UnpackOptions) (bool, error) {
	v, ok := view.(*snapshot.View)
	if !ok {
		return false, nil
	}
	name := l.ChainID.String()
	for _, from := range o.Share {
		i, err := from.Stat(ctx, name)
		if err == nil && i.Kind == snapshots.KindCommitted && i.Labels[LabelDiffID] == l.DiffID.String() {
			err = v.Adopt(ctx, name, from, name, layerLabels(l, o.Labels))
		} else if err == nil {
			continue // not Unpack's
		}
		switch {
		case err == nil, errdefs.IsAlreadyExists(err): // another was faster
			return isCommitted(ctx, view, name)
		case !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err):
			return false, err
		}
	}
	return false, nil
}

// isCommitted reports whether a snapshot of that name is there and committed.
func isCommitted(ctx context.Context, view Snapshots, name string) (bool, error) {
	i, err := view.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if i.Kind != snapshots.KindCommitted {
		return false, fmt.Errorf("snapshot %s is %s, not committed: %w", name, i.Kind, errdefs.ErrFailedPrecondition)
	}
	return true, nil
}

// unpackLayer unpacks layer i: under a key of its own, committed last. Another
// process that does the same at the same time is no harm: the first to commit
// wins.
func (s *Store) unpackLayer(ctx context.Context, view Snapshots, layers []Layer, i int, o UnpackOptions) error {
	key := "unpack-" + rand.Text()
	name, parent := layers[i].ChainID.String(), ""
	if i > 0 {
		parent = layers[i-1].ChainID.String()
	}
	// Create, not Prepare: nobody gets mounts, so the listing that Apply takes
	// counts.
	if err := view.Create(ctx, key, parent, snapshot.CreateOptions{Labels: map[string]string{LabelUnpack: name}}); err != nil {
		return err
	}
	err := s.apply(ctx, view, key, layers, i, o)
	if err == nil {
		err = view.CommitWith(ctx, name, key, snapshot.CommitOptions{Labels: layerLabels(layers[i], o.Labels), Volatile: o.Volatile})
		if err == nil {
			return nil
		}
		if errdefs.IsAlreadyExists(err) {
			err = nil
		}
	}
	// The key must go even if it is ctx that ended, and its bytes: the disk may be
	// full of them.
	ctx = context.WithoutCancel(ctx)
	rerr := view.Remove(ctx, key)
	if errdefs.IsNotFound(rerr) {
		rerr = nil
	}
	if rerr == nil {
		rerr = view.Cleanup(ctx)
	}
	return errors.Join(err, rerr)
}

func layerLabels(l Layer, more map[string]string) map[string]string {
	labels := map[string]string{
		LabelDiffID:    l.DiffID.String(),
		LabelBlob:      l.Blob.Digest.String(),
		LabelBlobSize:  strconv.FormatInt(l.Blob.Size, 10),
		LabelMediaType: l.Blob.MediaType,
	}
	for k, v := range more {
		labels[k] = v
	}
	return labels
}

// apply reads the layer's blob into the snapshot and verifies it to its last
// byte, which need not be part of the tar.
func (s *Store) apply(ctx context.Context, view Snapshots, key string, layers []Layer, i int, o UnpackOptions) error {
	l := layers[i]
	ra, err := s.layout.ReaderAt(ctx, l.Blob)
	if err != nil {
		return err
	}
	defer ra.Close()
	if err := checkSize(l.Blob, ra.Size()); err != nil {
		return err
	}
	m := newMeter(o.Progress, Event{Step: "unpack", Item: l.DiffID, Index: i, Count: len(layers), Total: l.Blob.Size})
	raw := &progressReader{ctxReader{ctx, content.NewReader(ra)}, m.add}
	br, err := layer.NewBlobReader(raw, layer.Blob{Digest: l.Blob.Digest, Size: l.Blob.Size, DiffID: l.DiffID}, o.Apply.Limits)
	if err != nil {
		return err
	}
	defer br.Close()
	ao := o.Apply
	ao.Volatile = ao.Volatile || o.Volatile
	if err = view.Apply(ctx, key, br, ao); err == nil {
		_, err = io.Copy(io.Discard, br)
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob.Digest, err)
	}
	return nil
}
