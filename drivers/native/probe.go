package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/moby/sys/userns"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// The features that are tried, as `layerctl info` shows them.
const (
	reflink   = "FICLONE"
	bindMount = "bind mount"
	idMap     = "id-mapped mount"
	owners    = "chown to other ids"
	devices   = "device nodes"
	trusted   = "trusted.* xattrs"
	filecaps  = "file capabilities"
)

// losses is what is lost where a feature is missing.
var losses = []struct{ feature, lost string }{
	{owners, "owners outside the user namespace (kept in " + overrideXattr + "; mounts show the own ones)"},
	{devices, "device nodes"},
	{trusted, "trusted.* xattrs"},
	{filecaps, "file capabilities"},
}

const scratchPrefix = ".probe-"

// capabilities tries what the driver can do at root. Where nothing can be
// written, on a read-only or a full file system, nothing can be tried: what was
// lost when the layers were made is then told by the namespace alone.
func capabilities(ctx context.Context, root string) (drivers.Capabilities, error) {
	c := drivers.Capabilities{
		Driver: Name, Diff: true, Apply: true, Copies: true,
		UsageBytes: true, UsageInodes: true, SharedWriter: true,
	}
	sweepScratch(root)
	scratch, err := os.MkdirTemp(root, scratchPrefix)
	if errors.Is(err, syscall.EROFS) || drivers.IsFull(err) {
		if userns.RunningInUserNS() || os.Geteuid() != 0 {
			for _, l := range losses {
				c.Lost = append(c.Lost, l.lost)
			}
		}
		return c, nil
	}
	if err != nil {
		return c, err
	}
	defer os.RemoveAll(scratch)
	fs := features(ctx, scratch)
	c.Reflink, c.IDMap = has(fs, reflink), has(fs, idMap)
	for _, l := range losses {
		if !has(fs, l.feature) {
			c.Lost = append(c.Lost, l.lost)
		}
	}
	return c, nil
}

// sweepScratch removes the scratch directories of processes that died in a
// probe, which takes milliseconds: after an hour nobody is at work there.
func sweepScratch(root string) {
	old, _ := filepath.Glob(root + "/" + scratchPrefix + "*")
	for _, dir := range old {
		if st, err := os.Lstat(dir); err == nil && time.Since(st.ModTime()) > time.Hour {
			_ = os.RemoveAll(dir)
		}
	}
}

func has(fs []kprobe.Result, feature string) bool {
	return slices.ContainsFunc(fs, func(r kprobe.Result) bool { return r.Feature == feature && r.Answer == kprobe.Yes })
}

// features tries each feature in a scratch directory of its own.
func features(ctx context.Context, scratch string) []kprobe.Result {
	dir, err := sys.OpenDir(scratch)
	if err != nil {
		return nil
	}
	defer dir.Close()
	return []kprobe.Result{
		answer(reflink, tryClone(dir), "btrfs, xfs made with reflink=1, bcachefs"),
		answer(bindMount, tryMount(ctx, bind(scratch, drivers.MountOptions{})), "needs CAP_SYS_ADMIN in a user namespace"),
		answer(idMap, tryMount(ctx, bind(scratch, drivers.MountOptions{IDMap: oneID})), "kernel 5.12 (tmpfs 6.3), and CAP_SYS_ADMIN where the file system was mounted"),
		answer(owners, tryMeta(dir, func(f *sys.Fd) error { return f.Chown("", 12345, 12345) }), "needs CAP_CHOWN"),
		answer(devices, tryDevice(dir), "needs CAP_MKNOD outside any user namespace"),
		answer(trusted, tryMeta(dir, func(f *sys.Fd) error { return f.Setxattr("", "trusted.layerctl", "x") }), "needs CAP_SYS_ADMIN outside any user namespace"),
		answer(filecaps, tryMeta(dir, func(f *sys.Fd) error { return f.Setxattr("", "security.capability", netRaw) }), "needs CAP_SETFCAP"),
	}
}

var oneID = drivers.IDMap{
	UIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 1}},
	GIDs: []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 1}},
}

// netRaw is struct vfs_cap_data, revision 2, of cap_net_raw+ep
// (include/uapi/linux/capability.h).
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func answer(feature string, err error, needs string) kprobe.Result {
	if err == nil {
		return kprobe.Result{Feature: feature, Answer: kprobe.Yes}
	}
	return kprobe.Result{Feature: feature, Answer: kprobe.No, Detail: fmt.Sprintf("%v; %s", err, needs), Err: err}
}

func tryClone(dir *sys.Fd) error {
	src, err := dir.Openat("clone-from", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := dir.Openat("clone-to", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := src.Write(make([]byte, 4096)); err != nil {
		return err
	}
	return dst.Clone(src)
}

// tryMount performs a mount that is attached nowhere.
func tryMount(ctx context.Context, m mount.Mount) error {
	t, err := mount.Detached(ctx, []mount.Mount{m})
	if err != nil {
		return err
	}
	return t.Close()
}

func tryMeta(dir *sys.Fd, set func(*sys.Fd) error) error {
	f, err := dir.Openat("meta", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	defer dir.Unlink("meta", 0)
	return set(f)
}

func tryDevice(dir *sys.Fd) error { return dir.Mknod("null", sys.S_IFCHR|0o600, 1, 3) }
