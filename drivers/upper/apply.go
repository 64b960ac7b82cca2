package upper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
)

// Apply unpacks tar straight into the layer's upper, in overlayfs's encoding. A
// layer without parents may get them at Commit, so applied.json is written first
// and says afterwards which directories were made up.
func (l *Layers) Apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	return l.wrap("apply", r.ID, l.apply(ctx, r, tar, o))
}

func (l *Layers) apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	s, err := l.loadRef(r)
	if err != nil {
		return err
	}
	if !s.writable() {
		return fmt.Errorf("is not writable: %w", errdefs.ErrFailedPrecondition)
	}
	if err := refuseRebasing(s); err != nil {
		return err
	}
	if s.hostIDs() {
		return fmt.Errorf("has an id map, and an archive has container ids: %w", errdefs.ErrNotImplemented)
	}
	if err := l.refuseWriters(ctx, r.ID); err != nil {
		return err
	}
	o.Whiteouts = l.whiteouts()
	o.OverrideStat = o.OverrideStat || l.keepsStat()
	if len(r.Parents) == 0 {
		return l.applyAlone(ctx, r, tar, o)
	}
	lower, err := l.chainTree(ctx, r.Parents)
	if err != nil {
		return err
	}
	defer lower.Close()
	o.Lower = lower.Path()
	return layer.Apply(ctx, l.Dir(r.ID), tar, o)
}

// applyAlone applies a layer whose parents are not known.
func (l *Layers) applyAlone(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	dir, err := l.openLayer(r.ID)
	if err != nil {
		return err
	}
	defer dir.Close()
	var a applied
	err = ReadJSON(dir, appliedFile, &a)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	rootNamed := err == nil && !a.implies(".") // by an archive before this one
	if err := WriteJSON(dir, appliedFile, a, false); err != nil {
		return err
	}
	if err := l.step(ctx, "apply: marked"); err != nil {
		return err
	}
	caller := o.Implied
	o.Implied = func(p string) {
		if a.implies(p) || p == "." && rootNamed {
			return
		}
		a.Implied = append(a.Implied, []byte(p))
		if caller != nil {
			caller(p)
		}
	}
	o.Lower = ""
	if err := layer.Apply(ctx, l.Dir(r.ID), tar, o); err != nil {
		return err
	}
	return WriteJSON(dir, appliedFile, a, !o.Volatile)
}

// keepsStat reports whether owners that this process may not set are kept in an
// xattr, as Capabilities.Lost says.
func (l *Layers) keepsStat() bool { return l.userxattr() }
