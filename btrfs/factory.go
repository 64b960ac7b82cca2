package btrfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Factory makes btrfs drivers. It has no options.
func Factory() drivers.Factory {
	return drivers.Factory{
		Name:    Name,
		Summary: "btrfs subvolumes: a layer is a snapshot of its parent",
		Probe:   Probe,
		Open:    Open,
	}
}

// Probe tries in a scratch directory below dir what the driver can do there.
func Probe(ctx context.Context, dir string) drivers.Probe {
	if err := onBtrfs(dir); err != nil {
		a := kprobe.No
		if !errors.Is(err, errdefs.ErrUnavailable) {
			a = kprobe.Unknown
		}
		return drivers.Probe{Works: a, Reason: err.Error()}
	}
	f, err := try(ctx, dir)
	p := drivers.Probe{Works: kprobe.Yes, Features: f.results}
	switch {
	case errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		p.Works, p.Reason = kprobe.No, err.Error()
	case err != nil:
		p.Works, p.Reason = kprobe.Unknown, err.Error()
	case f.admin:
		p.Reason = "snapshots of subvolumes; diff by SEND; quota: " + f.quota.String()
	default:
		p.Reason = "snapshots of subvolumes; without CAP_SYS_ADMIN diffs walk whole trees and usage is unknown"
	}
	return p
}

func onBtrfs(dir string) error {
	s, err := sys.StatfsPath(dir)
	if err != nil {
		return err
	}
	if s.Type != sys.BTRFS_SUPER_MAGIC {
		return fmt.Errorf("%s is on %s, not on btrfs: %w", dir, s.Type, errdefs.ErrUnavailable)
	}
	return nil
}

// Open opens or makes the storage at c.Root. ErrUnavailable where that is not on
// btrfs.
func Open(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
	d, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("btrfs: open %s: %w", c.Root, err)
	}
	return d, nil
}

func open(ctx context.Context, c drivers.Config) (*driver, error) {
	if err := drivers.CheckOptions(nil, c.Options); err != nil {
		return nil, err
	}
	if err := onBtrfs(filepath.Dir(filepath.Clean(c.Root))); err != nil {
		return nil, err
	}
	root, err := roots.Make(c.Root)
	if err != nil {
		return nil, err
	}
	if err := onBtrfs(root); err != nil {
		return nil, err
	}
	sweepScratch(root)
	f, err := look(ctx, root)
	if err != nil {
		return nil, err
	}
	d := &driver{root: root, admin: f.admin, quota: f.quota}
	d.caps = drivers.Capabilities{
		Driver: Name, Diff: true, Apply: true, Reflink: true,
		Quota: f.quota != ioctl.QuotaOff, IDMap: f.has(idMap),
		UsageBytes: f.admin, UsageInodes: f.admin, Lost: f.lost,
	}
	return d, nil
}

// The features that are tried beside btrfs's ioctls.
const idMap = "id-mapped mount"

const scratchPrefix = ".probe-"

// found is what try found out.
type found struct {
	admin   bool
	quota   ioctl.QuotaMode
	results []kprobe.Result
	lost    []string
}

func (f *found) has(feature string) bool {
	return slices.ContainsFunc(f.results, func(r kprobe.Result) bool { return r.Feature == feature && r.Answer == kprobe.Yes })
}

// look finds out what the driver can do in dir, without a subvolume: each costs a
// transaction, and Open is called by every command.
func look(ctx context.Context, dir string) (f found, err error) {
	d, err := sys.OpenDir(dir)
	if err != nil {
		return f, err
	}
	defer d.Close()
	_, err = ioctl.Deleted(d) // a tree search; who may search may send
	if f.admin = err == nil; f.admin {
		if f.quota, _, err = ioctl.Quota(d); err != nil {
			return f, err
		}
	} else if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.ENOTTY) {
		return f, err
	}
	f.results = append(f.results, kept(idMap, tryIDMap(ctx, dir), "kernel 5.15, and CAP_SYS_ADMIN where the file system was mounted"))
	if err := f.tryLosses(ctx, dir); err != nil && !errors.Is(err, syscall.EROFS) {
		return f, err
	}
	return f, nil
}

// try is look, and makes a subvolume and a snapshot of it, on which it tries every
// request.
func try(ctx context.Context, dir string) (f found, err error) {
	if f, err = look(ctx, dir); err != nil {
		return f, err
	}
	err = inScratch(ctx, dir, func(in *sys.Fd) error {
		if err := ioctl.Create(in, "a"); err != nil {
			return err
		}
		a, err := in.Openat("a", sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer a.Close()
		if err := ioctl.Snapshot(a, in, "b", true); err != nil {
			return err
		}
		f.results = append(ioctl.Probe(a), f.results...)
		return nil
	})
	return f, err
}

// inScratch runs f in a directory of its own, which is removed.
func inScratch(ctx context.Context, dir string, f func(*sys.Fd) error) error {
	scratch, err := os.MkdirTemp(dir, scratchPrefix)
	if err != nil {
		return err
	}
	in, err := sys.OpenDir(scratch)
	if err != nil {
		return errors.Join(err, os.Remove(scratch))
	}
	err = f(in)
	in.Close()
	return errors.Join(err, dropScratch(ctx, scratch))
}

// dropScratch removes a scratch directory: files, and subvolumes.
func dropScratch(ctx context.Context, scratch string) error {
	dir, err := sys.OpenDir(scratch)
	if err != nil {
		return err
	}
	defer dir.Close()
	e := &emptier{destroyer: destroyer{ctx: context.WithoutCancel(ctx)}}
	if err := e.dir(dir); err != nil {
		return err
	}
	return os.Remove(scratch)
}

// sweepScratch removes the scratch directories of processes that died in a probe,
// which takes milliseconds: after an hour nobody is at work there.
func sweepScratch(root string) {
	old, _ := filepath.Glob(root + "/" + scratchPrefix + "*")
	for _, dir := range old {
		if st, err := os.Lstat(dir); err == nil && time.Since(st.ModTime()) > time.Hour {
			_ = dropScratch(context.Background(), dir)
		}
	}
}

func kept(feature string, err error, needs string) kprobe.Result {
	if err == nil {
		return kprobe.Result{Feature: feature, Answer: kprobe.Yes}
	}
	return kprobe.Result{Feature: feature, Answer: kprobe.No, Detail: fmt.Sprintf("%v; %s", err, needs), Err: err}
}

func tryIDMap(ctx context.Context, dir string) error {
	one := []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 1}}
	t, err := mount.Detached(ctx, []mount.Mount{bind(dir, drivers.MountOptions{IDMap: drivers.IDMap{UIDs: one, GIDs: one}})})
	if err != nil {
		return err
	}
	return t.Close()
}

// netRaw is struct vfs_cap_data, revision 2, of cap_net_raw+ep
// (include/uapi/linux/capability.h).
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// tryLosses finds out what this process cannot store.
func (f *found) tryLosses(ctx context.Context, dir string) error {
	return inScratch(ctx, dir, func(in *sys.Fd) error {
		file, err := in.Openat("file", sys.O_RDWR|sys.O_CREAT, 0o600)
		if err != nil {
			return err
		}
		defer file.Close()
		for _, l := range []struct {
			feature, lost, needs string
			err                  error
		}{
			{"chown to other ids", "owners outside the user namespace (kept in user.containers.override_stat, where a later chmod or chown is not seen)", "needs CAP_CHOWN", file.Chown("", 12345, 12345)},
			{"device nodes", "device nodes", "needs CAP_MKNOD outside any user namespace", in.Mknod("null", sys.S_IFCHR|0o600, 1, 3)},
			{"trusted.* xattrs", "trusted.* xattrs", "needs CAP_SYS_ADMIN outside any user namespace", file.Setxattr("", "trusted.layerctl", "x")},
			{"file capabilities", "file capabilities", "needs CAP_SETFCAP", file.Setxattr("", "security.capability", netRaw)},
		} {
			if drivers.IsFull(l.err) {
				return l.err
			}
			r := kept(l.feature, l.err, l.needs)
			if f.results = append(f.results, r); r.Answer != kprobe.Yes {
				f.lost = append(f.lost, l.lost)
			}
		}
		return nil
	})
}
