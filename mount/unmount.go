package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/fusermount"
	"github.com/layerctl/layerctl/internal/sys"
)

// UnmountOptions say how Unmount works. The zero value unmounts at once or
// says who keeps the mount busy.
type UnmountOptions struct {
	// Lazy takes the mount out of the tree now; the kernel drops it when its last
	// user goes, and until then an overlay's upper stays in use.
	Lazy bool
	// Wait tries a busy mount again for so long: a process that has just ended may
	// hold it for some milliseconds.
	Wait time.Duration
}

// Unmount undoes the topmost mount at target. A target that does not exist, or
// that nothing is mounted on, is success. A busy mount wraps
// ErrFailedPrecondition and EBUSY and names who holds it (see Holders).
//
// The kernel does not wait for the server of a FUSE mount, which goes on for some
// milliseconds with the layers open. Unmount does, where the mount names the layer
// that the server holds a Claim on.
func Unmount(target string, o UnmountOptions) (err error) {
	flags := 0
	if o.Lazy {
		flags = sys.MNT_DETACH
	} else if layer := servedLayer(target); layer != "" {
		defer func() {
			if err == nil {
				waitServer(layer)
			}
		}()
	}
	end := time.Now().Add(o.Wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err = unmount(target, flags)
		switch {
		case errors.Is(err, syscall.EBUSY) && time.Now().Before(end):
			time.Sleep(pause)
			continue
		case err == nil, errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EINVAL) && !isMountpoint(target):
			return nil
		case errors.Is(err, syscall.EBUSY):
			return busy(target, err)
		}
		return withSentinel("mount: unmount", err)
	}
}

// servedLayer returns the directory that the FUSE mount at target names as its
// source; "" if there is none.
func servedLayer(target string) string {
	infos, err := List()
	if err != nil {
		return ""
	}
	layer := ""
	for _, i := range infos { // a later one covers an earlier one
		if i.Target == target {
			layer = ""
			if strings.HasPrefix(i.Type, "fuse.") && strings.HasPrefix(i.Source, "/") {
				layer = i.Source
			}
		}
	}
	return layer
}

// waitServer waits until nobody has a layer locked, for a while: the server may
// serve another mount of the same file system.
func waitServer(layer string) {
	dir, err := sys.OpenDir(layer)
	if err != nil {
		return
	}
	defer dir.Close()
	_ = poll(context.Background(), goneWait, func() (bool, error) {
		lock, err := dir.TryLock(sys.LockShared)
		if err == nil {
			lock.Close()
		}
		return !sys.IsLocked(err), err
	})
}

// isMountpoint reports whether target is the root of a mount. It says yes where
// it cannot tell, so that an error is not taken for success.
func isMountpoint(target string) bool {
	s, err := sys.StatPath(target)
	return err != nil && !errors.Is(err, os.ErrNotExist) || s.IsMountRoot()
}

// unmount is umount(2), by the set-uid program that made it for a user's own FUSE
// mount.
func unmount(target string, flags int) error {
	err := sys.Umount(target, flags)
	if !errors.Is(err, syscall.EPERM) {
		return err
	}
	s, serr := sys.StatfsPath(target)
	if serr != nil && !errors.Is(serr, syscall.ENOTCONN) || serr == nil && s.Type != sys.FUSE_SUPER_MAGIC {
		return err
	}
	ferr := fusermount.Unmount(target, flags&sys.MNT_DETACH != 0)
	if ferr != nil && !errors.Is(ferr, syscall.EBUSY) {
		return fmt.Errorf("%w; %w", err, ferr)
	}
	return ferr
}

// namedHolders bounds how many holders an error names.
const namedHolders = 5

// busy says who keeps target from being unmounted.
func busy(target string, cause error) error {
	holders, err := Holders(target)
	var words []string
	for i, h := range holders {
		if i == namedHolders {
			words = append(words, fmt.Sprintf("and %d more", len(holders)-i))
			break
		}
		words = append(words, h.String())
	}
	held := "held by " + strings.Join(words, ", ")
	switch {
	case err != nil:
		held = "who holds it could not be found out: " + err.Error()
	case len(words) == 0:
		held = "no holder visible to this process"
	}
	return fmt.Errorf("mount: unmount: %w: %w: %s", errdefs.ErrFailedPrecondition, cause, held)
}
