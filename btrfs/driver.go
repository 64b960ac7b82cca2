package btrfs

import (
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Name is the driver's name in a registry.
const Name = "btrfs"

// driver is one open root. Its fields are immutable.
type driver struct {
	root  string // absolute, without symlinks: what mountinfo shows
	admin bool   // SEND and tree searches are allowed
	quota ioctl.QuotaMode
	caps  drivers.Capabilities
}

var (
	_ drivers.Driver  = (*driver)(nil)
	_ drivers.Differ  = (*driver)(nil)
	_ drivers.Applier = (*driver)(nil)

	_ drivers.Settler      = (*driver)(nil)
	_ drivers.QuotaEnabler = (*driver)(nil)
	_ drivers.Deduper      = (*driver)(nil)
	_ drivers.Inspector    = (*driver)(nil)
)

func (d *driver) Capabilities() drivers.Capabilities { return d.caps }

// Close has nothing to release: no descriptor outlives a call.
func (d *driver) Close() error { return nil }

func (d *driver) wrap(op string, id drivers.ID, err error) error {
	return drivers.Wrap(Name, op, id, err)
}

// keepsStat reports whether what this process may not set is kept in xattrs.
func (d *driver) keepsStat() bool { return len(d.caps.Lost) > 0 }

// Apply unpacks straight into the subvolume.
func (d *driver) Apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	return d.wrap("apply", r.ID, d.apply(ctx, r, tar, o))
}

func (d *driver) apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	l, err := d.layer(r.ID)
	if err != nil {
		return err
	}
	defer l.Close()
	if l.kind != writable {
		return fmt.Errorf("is %s, not writable: %w", l.kind, errdefs.ErrFailedPrecondition)
	}
	o.Whiteouts, o.Lower = layer.WhiteoutsNone, ""
	o.OverrideStat = o.OverrideStat || d.keepsStat()
	return layer.Apply(ctx, d.treePath(r.ID, l.kind), tar, o)
}

// open opens one of the root's directories.
func (d *driver) open(name string) (*sys.Fd, error) { return sys.OpenDir(d.root + "/" + name) }

// IDs lists what stands in l, new and del.
func (d *driver) IDs(ctx context.Context) iter.Seq2[drivers.ID, error] {
	return roots.IDs(ctx, Name, d.root)
}
