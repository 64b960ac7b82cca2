package main

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/snapshot"
)

// labelNew marks an active snapshot that becomes a committed one when the
// program that makes it is done; its value is the name it will have. While one
// is being made, store.json is locked shared: who gets it exclusively knows that
// the makers of all such snapshots are gone.
const labelNew = "io.github.layerctl.new"

// halfMade reports whether a snapshot is work that has not ended.
func halfMade(kind snapshots.Kind, labels map[string]string) bool {
	return kind == snapshots.KindActive && (labels[labelNew] != "" || labels[image.LabelUnpack] != "")
}

func (a *app) makersLock() string { return filepath.Join(a.root, "store.json") }

// lockMaking takes the makers' lock, which a sweeper may have for a moment.
func (a *app) lockMaking(ctx context.Context) (*sys.Lock, error) {
	for {
		l, err := sys.LockFile(a.makersLock(), sys.LockShared)
		if !sys.IsLocked(err) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// sweep removes what killed programs left half-made, and says so. While
// something is being made it leaves that to the next one.
func (a *app) sweep(ctx context.Context, v *snapshot.View) (err error) {
	l, err := sys.LockFile(a.makersLock(), sys.LockExclusive)
	if err != nil {
		return nil // somebody is at work, or nothing can be removed here
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	left := map[string]string{}
	err = v.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindActive && i.Labels[labelNew] != "" {
			left[i.Name] = i.Labels[labelNew]
		}
		return nil
	})
	if err != nil || len(left) == 0 {
		return err
	}
	for key, name := range left {
		if err := v.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if !a.quiet {
			a.note("recovered: %s was being made when the program was killed: removed", name)
		}
	}
	return v.Cleanup(ctx)
}

// openSwept opens the view and sweeps it.
func (a *app) openSwept(ctx context.Context) (*snapshot.View, error) {
	v, err := a.openView(ctx)
	if err == nil && !a.readOnly {
		err = a.sweep(ctx, v)
	}
	return v, err
}
