package btrfs

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// SyncUsage flushes the file system: trees and qgroups are those of the last
// transaction.
func (d *driver) SyncUsage(ctx context.Context) error {
	return d.onRoot(ctx, "sync", (*sys.Fd).SyncFS)
}

// WaitFreed waits for the kernel's cleaner, and for the transaction after it, which
// gives the blocks back. The qgroups of subvolumes that are gone go, too, where the
// kernel leaves them, as with `btrfs qgroup clear-stale`.
func (d *driver) WaitFreed(ctx context.Context) error {
	return d.onRoot(ctx, "wait for free space", func(root *sys.Fd) error {
		if !d.admin {
			return fmt.Errorf("which deleted subvolumes are still there is told only with CAP_SYS_ADMIN outside any user namespace: %w", errdefs.ErrUnavailable)
		}
		return waitFreed(ctx, root)
	})
}

// freedPoll is how often the deleted subvolumes are looked at.
const freedPoll = 50 * time.Millisecond

func waitFreed(ctx context.Context, root *sys.Fd) error {
	tick := time.NewTicker(freedPoll)
	defer tick.Stop()
	for {
		if err := ioctl.SyncAll(root); err != nil {
			return err
		}
		left, err := ioctl.Deleted(root)
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return errors.Join(ioctl.SyncAll(root), dropStaleQgroups(root))
		}
		drivers.ReportProgress(ctx, drivers.Progress{Step: "subvolumes left to free", Entries: int64(len(left))})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func dropStaleQgroups(root *sys.Fd) error {
	stale, err := ioctl.StaleQgroups(root)
	if err != nil {
		return err
	}
	for _, id := range stale {
		if err := ioctl.DestroyQgroup(root, id); err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	return nil
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
	return d.onRoot(ctx, "enable quota", func(root *sys.Fd) error { return enableQuota(root, mode) })
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
