package btrfs

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// SyncUsage flushes the file system: trees and qgroups are those of the last
// transaction.
func (d *driver) SyncUsage(ctx context.Context) error {
	return d.onRoot(ctx, "sync", (*sys.Fd).SyncFS)
}

// WaitFreed waits for the kernel's cleaner to be done with the subvolumes that are
// deleted now, and for the transaction after it, which gives the blocks back. Snapshots
// that killed diffs left go before that, and qgroups of this driver's after it.
func (d *driver) WaitFreed(ctx context.Context) error {
	return d.onRoot(ctx, "wait for free space", func(root *sys.Fd) error {
		if !d.admin {
			return fmt.Errorf("which deleted subvolumes are still there is told only with CAP_SYS_ADMIN outside any user namespace: %w", errdefs.ErrUnavailable)
		}
		if err := d.sweepLayers(ctx); err != nil {
			return err
		}
		if err := waitFreed(ctx, root); err != nil {
			return err
		}
		return d.dropQgroups(math.MaxInt)
	})
}

// sweepLayers deletes what killed diffs left in any layer.
func (d *driver) sweepLayers(ctx context.Context) error {
	ids, err := roots.In(ctx, d.root, roots.Layers)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if l, err := d.layer(id); err == nil { // or it is gone, or lost
			l.sweepSnapshots(d.destroyer(ctx))
			l.Close()
		}
	}
	return ctx.Err()
}

// freedPoll is how often the deleted subvolumes are looked at.
const freedPoll = 50 * time.Millisecond

func waitFreed(ctx context.Context, root *sys.Fd) error {
	tick := time.NewTicker(freedPoll)
	defer tick.Stop()
	all, err := ioctl.Deleted(root)
	for err == nil {
		if err := ioctl.SyncAll(root); err != nil {
			return err
		}
		var now []uint64
		if now, err = ioctl.Deleted(root); err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(id uint64) bool { return !slices.Contains(now, id) })
		if len(all) == 0 {
			return ioctl.SyncAll(root)
		}
		drivers.ReportProgress(ctx, drivers.Progress{Step: "subvolumes left to free", Entries: int64(len(all))})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// qgroupPrefix begins the names, in del, of the subvolumes whose qgroup is still to
// be dropped. It stays for as long as the subvolume has blocks, and then the kernel
// drops it, or not: before Linux 6.11, and with simple quotas while a snapshot has
// blocks that it wrote.
const qgroupPrefix = ".qgroup-"

// noteQgroup notes a deleted subvolume that left a qgroup. Without the note it may stay,
// and counts nothing.
func (d *driver) noteQgroup(subvol uint64) {
	f, err := sys.Open(d.root+"/"+roots.Deleted+"/"+qgroupPrefix+strconv.FormatUint(subvol, 10), sys.O_WRONLY|sys.O_CREAT|sys.O_NOFOLLOW, 0o600)
	if err == nil {
		f.Close()
	}
}

// someQgroups is how many notes a removal or a diff looks at, which make two at most.
const someQgroups = 4

// dropQgroups looks at some of the noted ones and drops those that count nothing any
// more.
func (d *driver) dropQgroups(some int) error {
	del, err := d.open(roots.Deleted)
	if err != nil {
		return err
	}
	defer del.Close()
	names, err := del.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range names {
		text, ours := strings.CutPrefix(e.Name, qgroupPrefix)
		subvol, err := strconv.ParseUint(text, 10, 64)
		if !ours || err != nil {
			continue
		}
		if some--; some < 0 {
			return nil
		}
		gone, err := dropQgroup(del, subvol)
		if err == nil && gone {
			err = del.Unlink(e.Name, 0)
		}
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

// dropQgroup drops the qgroup of a deleted subvolume if it counts nothing any more, and
// reports whether it is gone. One that still counts something while the accounting is
// right would make that wrong, for the whole file system.
func dropQgroup(fd *sys.Fd, subvol uint64) (gone bool, err error) {
	_, right, err := ioctl.Quota(fd)
	if err != nil {
		return false, err
	}
	u, err := ioctl.Qgroup(fd, subvol)
	if err == nil {
		if right && u != (ioctl.QgroupUsage{}) {
			return false, nil
		}
		err = ioctl.DestroyQgroup(fd, subvol)
	}
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTCONN): // dropped by the kernel, or quota is off
		return true, nil
	case errors.Is(err, syscall.EBUSY):
		return false, nil
	}
	return err == nil, err
}

// The kinds of accounting that EnableQuota takes.
const (
	quotaQgroups = "qgroups"
	quotaSimple  = "simple"
)

// EnableQuota switches qgroups or simple quotas on for the whole file system.
// Simple quotas cost less; a file system that has them cannot be written to by
// kernels before 6.7.
func (d *driver) EnableQuota(ctx context.Context, kind string) error {
	mode, ok := map[string]ioctl.QuotaMode{quotaQgroups: ioctl.QuotaFull, quotaSimple: ioctl.QuotaSimple}[kind]
	if !ok {
		return fmt.Errorf("btrfs: enable quota: %q is neither %s nor %s: %w", kind, quotaQgroups, quotaSimple, errdefs.ErrInvalidArgument)
	}
	return d.onRoot(ctx, "enable quota", func(root *sys.Fd) error {
		if !d.admin {
			return errdefs.ErrPermissionDenied.WithMessage("needs CAP_SYS_ADMIN outside any user namespace")
		}
		return enableQuota(root, mode)
	})
}

func enableQuota(root *sys.Fd, mode ioctl.QuotaMode) error {
	is, _, err := ioctl.Quota(root)
	switch {
	case err != nil:
		return err
	case is != ioctl.QuotaOff && is != mode:
		return fmt.Errorf("%s are on already: `btrfs quota disable` switches them off, with all limits: %w", is, errdefs.ErrFailedPrecondition)
	case is == ioctl.QuotaOff:
		err = ioctl.SetQuota(root, mode)
	}
	if mode == ioctl.QuotaSimple && errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("simple quotas need Linux 6.7: %w: %w", errdefs.ErrUnavailable, err)
	}
	if err != nil || mode == ioctl.QuotaSimple {
		return err
	}
	return ioctl.WaitQuota(root)
}

// onRoot runs f with the root opened.
func (d *driver) onRoot(ctx context.Context, op string, f func(*sys.Fd) error) error {
	root, err := sys.OpenDir(d.root)
	if err == nil {
		defer root.Close()
		err = f(root)
	}
	return drivers.Wrap(Name, op, 0, err)
}
