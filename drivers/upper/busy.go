package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	lmount "github.com/layerctl/layerctl/mount"
)

// A layer is in use when this mount namespace shows it mounted (mountinfo), when
// somebody has its directory locked, as a server of a union does for its life
// (mount.Claim), or when a kernel's overlay anywhere has its upper: the kernel marks
// the inode, whatever the namespace, and after a lazy unmount too, for as long as a
// process is inside. A bind mount of a layer without parents is not marked; in
// another namespace it cannot be seen, and a Remove takes its files away.

// InUse implements drivers.UseTeller.
func (l *Layers) InUse(ctx context.Context, id drivers.ID) error {
	return l.wrap("in use", id, l.refuseMounted(ctx, id))
}

// refuseMounted refuses to remove what is mounted.
func (l *Layers) refuseMounted(ctx context.Context, id drivers.ID) error {
	if where, err := l.mountedAt(id, func(lmount.Info) bool { return true }); err != nil || where != "" {
		return inUse(where, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := l.refuseServed(ctx, id); err != nil {
		return err
	}
	return l.refuseUpper(id)
}

// serverGone bounds the wait for a server whose mount is gone already: it ends
// within milliseconds, on a loaded machine later.
const serverGone = 2 * time.Second

// refuseServed refuses a layer whose directory somebody has locked, and keeps
// locked.
func (l *Layers) refuseServed(ctx context.Context, id drivers.ID) error {
	fs, err := sys.OpenDir(l.Dir(id))
	if err != nil {
		return nil // half-made
	}
	defer fs.Close()
	lock, err := fs.TryLock(sys.LockExclusive)
	for end := time.Now().Add(serverGone); sys.IsLocked(err) && time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
		lock, err = fs.TryLock(sys.LockExclusive)
	}
	if sys.IsLocked(err) {
		return fmt.Errorf("is locked: a server shows it, or somebody is mounting it: unmount it first: %w: %w", errdefs.ErrFailedPrecondition, syscall.EBUSY)
	}
	if err == nil {
		lock.Close()
	}
	return nil
}

// refuseWriters refuses to freeze what this namespace shows mounted for writing.
// A writer elsewhere is Capabilities.SharedWriter's hazard.
func (l *Layers) refuseWriters(_ context.Context, id drivers.ID) error {
	where, err := l.mountedAt(id, func(i lmount.Info) bool { return !i.ReadOnly() })
	if err != nil || where != "" {
		return inUse(where, err)
	}
	return nil
}

func inUse(where string, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("is mounted at %s: unmount it first: %w: %w", where, errdefs.ErrFailedPrecondition, syscall.EBUSY)
}

// mountedAt returns where this mount namespace shows the layer, "" if nowhere.
func (l *Layers) mountedAt(id drivers.ID, counts func(lmount.Info) bool) (string, error) {
	infos, err := lmount.List()
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(infos, func(i lmount.Info) bool { return counts(i) && l.shows(i, id) })
	if i < 0 {
		return "", nil
	}
	return infos[i].Target, nil
}

// shows reports whether a mount is of the layer: by its paths, or for a bind by
// where in the file system it begins.
func (l *Layers) shows(i lmount.Info, id drivers.ID) bool {
	if i.Type == "overlay" || i.Type == "fuse" || strings.HasPrefix(i.Type, "fuse.") {
		owner, ok := l.Owner([]lmount.Mount{i.Mount()})
		return ok && owner == id
	}
	if l.fsRoot == "" || i.Major != l.major || i.Minor != l.minor {
		return false
	}
	return i.Root == l.fsRoot+"/"+id.String()+"/"+fsDir
}

// refuseUpper asks the kernel whether an overlay has the layer's upper.
func (l *Layers) refuseUpper(id drivers.ID) error {
	s, err := l.load(id)
	if err != nil || !s.writable() || s.parent() == 0 && !s.applied {
		return nil // half-made, or never an upper
	}
	if _, err := sys.LstatPath(l.path(id.String(), workDir, workDir)); errors.Is(err, os.ErrNotExist) {
		return nil // overlayfs makes work/work when it mounts: it never has
	}
	used, where, err := lmount.UpperInUse(l.Dir(id), l.path(id.String(), workDir))
	if err != nil || used != kprobe.Yes {
		return nil // the directories are not there, or the kernel does not say
	}
	if where == "" {
		where = "a place that no mount namespace shows (unmounted lazily, a process is still inside)"
	}
	return inUse(where, nil)
}
