package thin

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
)

// Change is what may be done to a pool while nobody else does: see Exclusive. It
// is valid until that returns.
type Change struct {
	pool *Pool
	lock *sys.Fd
	// waits end when udev has seen what was done, or with their context.
	waits []func(context.Context) error
}

// Claim tells other processes, before ids are given out, that they are, and reports
// whether none has said so since our last: then what we know of the ids in use still
// holds. It is not kept over a reboot.
func (c *Change) Claim() (alone bool, err error) {
	var b [8]byte
	if _, err := c.lock.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	n := binary.LittleEndian.Uint64(b[:])
	alone = n != 0 && n == c.pool.claim
	binary.LittleEndian.PutUint64(b[:], n+1)
	if _, err := c.lock.WriteAt(b[:], 0); err != nil {
		return false, err
	}
	c.pool.claim = n + 1
	return alone, nil
}

// MaxID is the largest id of a thin device.
const MaxID = 1<<24 - 1

// message sends the pool one; the pool's metadata is committed when it returns.
func (c *Change) message(format string, args ...any) error {
	p := c.pool
	err := p.running(func() error {
		_, err := p.ctl.Message(p.name, 0, fmt.Sprintf(format, args...))
		return err
	})
	if err == nil { // the kernel does not tell that a commit went wrong
		return p.healthy()
	}
	var sentinel error
	switch {
	case errors.Is(err, syscall.EEXIST):
		sentinel = errdefs.ErrAlreadyExists
	case errors.Is(err, syscall.ENODATA):
		sentinel = errdefs.ErrNotFound
	case errors.Is(err, syscall.EBUSY):
		return err // has one
	default:
		if why := p.Explain(); why != nil {
			return fmt.Errorf("%w: %w", why, noSentinel{err})
		}
		return err
	}
	return fmt.Errorf("%w: %w", sentinel, err)
}

// CreateThin makes a thin device without blocks; ErrAlreadyExists if the id is in
// use.
func (c *Change) CreateThin(id uint32) error { return c.message("create_thin %d", id) }

// CreateSnap makes id a snapshot of origin, which, if it is active and may be
// written to, must be suspended. ErrAlreadyExists; ErrNotFound without the origin.
func (c *Change) CreateSnap(id, origin uint32) error {
	return c.message("create_snap %d %d", id, origin)
}

// Delete deletes a thin device; it is no error if there is none.
func (c *Change) Delete(id uint32) error {
	if err := c.message("delete %d", id); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// SetTransaction changes the pool's transaction id, if it is from.
func (c *Change) SetTransaction(from, to uint64) error {
	err := c.message("set_transaction_id %d %d", from, to)
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("somebody else changes pool %s: %w: %w", c.pool.name, errdefs.ErrAborted, err)
	}
	return err
}

// Volume is a thin device as it is shown.
type Volume struct {
	Name     string // with the pool's Prefix
	ID       uint32
	Sectors  uint64
	ReadOnly bool
}

// Node is the path of a device's node.
func Node(name string) string { return "/dev/mapper/" + name }

// Activate makes v's device if it is not there; where udev runs its node is there when Exclusive
// returns, or after Seen. Idempotent. One that is suspended stays so.
func (c *Change) Activate(v Volume) error {
	p := c.pool
	i, err := p.ctl.Info(v.Name)
	if isGone(err) {
		i, err = p.ctl.Create(v.Name, uuid(v.Name))
	}
	if err != nil {
		return err
	}
	if !i.ActiveTable {
		err = p.loadThin(v)
	}
	if err == nil && !i.ActiveTable {
		err = c.announced(func(ctl *dm.Control) error { return ctl.Resume(v.Name) })
	}
	if err != nil {
		_ = p.ctl.Remove(v.Name, false)
		if why := p.Explain(); why != nil {
			return fmt.Errorf("%w: %w", why, noSentinel{err})
		}
		if errors.Is(err, syscall.ENODATA) {
			err = fmt.Errorf("the pool has no thin device %d: %w: %w", v.ID, errdefs.ErrDataLoss, err)
		}
		return err
	}
	return c.node(v.Name)
}

func (p *Pool) loadThin(v Volume) error {
	pool, err := p.ctl.Info(p.name)
	if err != nil {
		return err
	}
	t := dm.Target{Length: v.Sectors, Type: "thin", Params: fmt.Sprintf("%s %d", pool.Dev, v.ID)}
	return p.running(func() error { return p.ctl.Load(v.Name, []dm.Target{t}, v.ReadOnly) })
}

// Suspend stops writes to the device: what was written is in the pool, and the
// file system on it is frozen, as if it were unmounted. It waits for what is being
// written.
func (p *Pool) Suspend(name string) error { return p.ctl.Suspend(name, dm.SuspendOptions{}) }

// Resume lets a suspended device go on. Its name stays: udev is not waited for.
func (p *Pool) Resume(name string) error { return p.ctl.Resume(name) }

// Deactivate removes a device; ErrFailedPrecondition while somebody has it open.
// It is no error if there is none.
func (c *Change) Deactivate(name string) error { return c.remove(name, false) }

// RemoveLater removes a device when its last user closes it.
func (c *Change) RemoveLater(name string) error { return c.remove(name, true) }

func (c *Change) remove(name string, deferred bool) error {
	err := c.announced(func(ctl *dm.Control) error { return ctl.Remove(name, deferred) })
	if err != nil && !isGone(err) {
		return err
	}
	if dm.UdevRuns() {
		return nil
	}
	return dm.RemoveNode(name)
}

// Info is a device's state; ErrNotFound if there is none.
func (p *Pool) Info(name string) (dm.Info, error) { return p.ctl.Info(name) }

// Ready reports whether a device can be used as it is.
func (p *Pool) Ready(name string) bool {
	i, err := p.ctl.Info(name)
	return err == nil && i.ActiveTable && !i.DeferredRemove && hasNode(i)
}

// Activate is Change.Activate, without a lock where there is nothing to do.
func (p *Pool) Activate(ctx context.Context, v Volume) error {
	if p.Ready(v.Name) {
		return nil
	}
	return p.Exclusive(ctx, func(c *Change) error { return c.Activate(v) })
}

// Release removes a device that its last user is just closing: it tries again for
// as long as patience says, without a lock in between.
func (p *Pool) Release(ctx context.Context, name string, patience time.Duration) error {
	for end := time.Now().Add(patience); ; {
		err := p.Exclusive(ctx, func(c *Change) error { return c.Deactivate(name) })
		if !errdefs.IsFailedPrecondition(err) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
