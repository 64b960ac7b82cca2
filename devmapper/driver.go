package devmapper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// Name is the driver's name in a registry.
const Name = "devmapper"

// driver is one open root.
type driver struct {
	root     string
	dir      *sys.Fd // of root
	pool     *thin.Pool
	template template // of layers without parent; immutable once open
	caps     drivers.Capabilities
	noQuota  error // why caps deny it

	burst burst           // Creates that wait for the pool
	used  map[uint32]bool // guarded by the pool's Exclusive: ids in use; nil: not known
	tx    atomic.Uint64   // a transaction that the pool has reached
	swept atomic.Int64    // when idle devices were last looked for, in Unix seconds
	temps atomic.Uint64   // numbers the private devices of this process
	kept  keptUsages

	alwaysCounts bool // the kernel counts what is written to a device that is told not to
	close        sync.Once
}

var (
	_ drivers.Driver   = (*driver)(nil)
	_ drivers.Differ   = (*driver)(nil)
	_ drivers.Applier  = (*driver)(nil)
	_ drivers.Examiner = (*driver)(nil)
	_ drivers.Idler    = (*driver)(nil)
)

func (d *driver) Capabilities() drivers.Capabilities { return d.caps }

// Close takes away what nobody uses; see the package comment.
func (d *driver) Close() (err error) {
	d.close.Do(func() {
		err = d.pool.Exclusive(context.Background(), func(c *thin.Change) error { return d.sweepTemps(c) })
		err = errors.Join(err, d.pool.Close(), d.dir.Close())
		if err != nil {
			err = fmt.Errorf("devmapper: close: %w", err)
		}
	})
	return err
}

// wrap gives an error its form; one of a pool that is full or broken says so.
func (d *driver) wrap(op string, id drivers.ID, err error) error {
	if err == nil {
		return nil
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && (errno == syscall.EIO || errno == syscall.ENOSPC || errno == syscall.EROFS) {
		if why := d.pool.ExplainWrite(); why != nil && !strings.Contains(err.Error(), why.Error()) {
			err = fmt.Errorf("%w: %w", why, words{err})
		}
	}
	return drivers.Wrap(Name, op, id, err)
}

// words has the text of an error, and of what it wraps its errno alone.
type words struct{ err error }

func (w words) Error() string { return w.err.Error() }

func (w words) As(target any) bool {
	if e, ok := target.(*syscall.Errno); ok {
		return errors.As(w.err, e)
	}
	return false
}

// Apply unpacks into a mount of its own, which nobody else sees.
func (d *driver) Apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	return d.wrap("apply", r.ID, d.apply(ctx, r, tar, o))
}

func (d *driver) apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) (err error) {
	l, err := d.layer(r.ID)
	if err != nil {
		return err
	}
	if l.Kind != writable {
		return fmt.Errorf("is %s, not writable: %w", l.Kind, errdefs.ErrFailedPrecondition)
	}
	v := d.volume(r.ID, l)
	if err := d.activate(ctx, r.ID, v); err != nil {
		return err
	}
	if err := d.unsuspend(ctx, r.ID, v.Name); err != nil { // or mount(2) waits for ever
		return err
	}
	t, err := mount.Detached(ctx, []mount.Mount{l.fs.mount(v, drivers.MountOptions{Volatile: o.Volatile})})
	if err != nil {
		return err
	}
	defer t.Close()
	// Errors of writes that come later are told to whoever was there before them.
	root, err := sys.OpenDir(t.Path())
	if err != nil {
		return err
	}
	defer root.Close()
	o.Whiteouts, o.Lower = layer.WhiteoutsNone, ""
	err = layer.Apply(ctx, t.Path(), tar, o)
	if err == nil && !o.Volatile {
		err = root.SyncFS()
	}
	return err
}

// IDs lists what stands in l, new and del.
func (d *driver) IDs(ctx context.Context) iter.Seq2[drivers.ID, error] {
	return roots.IDs(ctx, Name, d.root)
}

// open opens one of the root's directories.
func (d *driver) open(name string) (*sys.Fd, error) {
	return d.dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// patience is how long a device may stay open that its last user has just let go of:
// a namespace that ends, or udev.
const patience = 2 * time.Second
