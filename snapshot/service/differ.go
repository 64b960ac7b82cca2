package service

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

// DifferOptions say how a Differ works. Store and Content are required.
type DifferOptions struct {
	Store   *snapshot.Store
	Content content.Store // in the namespace of the context
	// Leases keeps what is written for a request without a lease, for Lease; nil:
	// nothing does.
	Leases leases.Manager
	Lease  time.Duration // 0 is an hour
	// Limits bound the archives that are applied.
	Limits layer.Limits
	// Rebase says that clients are told of drivers that put a parent below a layer at
	// Commit, so that a layer without a parent may have whiteouts.
	Rebase bool
	// SkipWhiteoutNames leaves out of diffs what cannot be in a layer, a name that
	// begins with .wh.; otherwise it is an error.
	SkipWhiteoutNames bool
	Log               *slog.Logger // nil: none
	// Transferred, if not nil, is told the bytes of each tar that was made ("diff")
	// or unpacked ("apply").
	Transferred func(op string, bytes int64)
}

// Differ makes and applies layers of the store's snapshots, which it knows by
// their mounts. It is safe for concurrent use.
type Differ struct{ o DifferOptions }

var (
	_ diff.Comparer = (*Differ)(nil)
	_ diff.Applier  = (*Differ)(nil)
)

// NewDiffer returns a Differ.
func NewDiffer(o DifferOptions) *Differ {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Lease == 0 {
		o.Lease = time.Hour
	}
	if o.Transferred == nil {
		o.Transferred = func(string, int64) {}
	}
	return &Differ{o}
}

// owner returns the snapshot that mounts show; ErrNotImplemented, so that another
// differ is asked, if it is not the store's.
func (d *Differ) owner(ctx context.Context, ms []mount.Mount) (snapshot.Record, error) {
	r, err := d.o.Store.Owner(ctx, ms)
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("%w: %w", errdefs.ErrNotImplemented, err)
	}
	return r, err
}

// keep takes what forward returned, and returns a context under whose lease what is
// written is kept: the request's, or else one that expires. done is told whether
// anything was written.
func (d *Differ) keep(ctx context.Context) (_ context.Context, done func(written bool), err error) {
	done = func(bool) {}
	if _, ok := leases.FromContext(ctx); ok || d.o.Leases == nil {
		return ctx, done, nil
	}
	l, err := d.o.Leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(d.o.Lease))
	if err != nil {
		return nil, nil, fmt.Errorf("lease for what is written: %w", err)
	}
	done = func(written bool) {
		if written {
			return // whoever asked for the content has until then to name it
		}
		if err := d.o.Leases.Delete(context.WithoutCancel(ctx), l); err != nil {
			d.o.Log.Warn("lease not deleted, it expires", "lease", l.ID, "error", err)
		}
	}
	return leases.WithLease(ctx, l.ID), done, nil
}

// forward makes the request's namespace and lease those of the calls made for it.
func forward(ctx context.Context) (context.Context, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, ns)
	if id, ok := leases.FromContext(ctx); ok {
		ctx = leases.WithLease(ctx, id)
	}
	return ctx, nil
}

// noLater dates files that were changed after t to t (SOURCE_DATE_EPOCH).
func noLater(changes iter.Seq2[layer.Change, error], t *time.Time) iter.Seq2[layer.Change, error] {
	if t == nil {
		return changes
	}
	most := layer.Timespec{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
	return func(yield func(layer.Change, error) bool) {
		for c, err := range changes {
			if m := c.Entry.ModTime; m.Sec > most.Sec || m.Sec == most.Sec && m.Nsec > most.Nsec {
				c.Entry.ModTime = most
			}
			if !yield(c, err) {
				return
			}
		}
	}
}
