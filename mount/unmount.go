package mount

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

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
func Unmount(target string, o UnmountOptions) error {
	flags := 0
	if o.Lazy {
		flags = sys.MNT_DETACH
	}
	end := time.Now().Add(o.Wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := sys.Umount(target, flags)
		switch {
		case errors.Is(err, syscall.EBUSY) && time.Now().Before(end):
			time.Sleep(pause)
			continue
		case err == nil, errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.EINVAL) && !isMountpoint(target):
			return nil
		case errors.Is(err, syscall.EBUSY):
			return busy(target, err)
		case errors.Is(err, syscall.EPERM) && unmountFUSE(target, o.Lazy):
			return nil
		}
		return withSentinel("mount: unmount", err)
	}
}

// isMountpoint reports whether target is the root of a mount. It says yes where
// it cannot tell, so that an error is not taken for success.
func isMountpoint(target string) bool {
	s, err := sys.StatPath(target)
	return err != nil && !errors.Is(err, os.ErrNotExist) || s.IsMountRoot()
}

// unmountFUSE undoes a user's own FUSE mount by the set-uid program that made
// it.
func unmountFUSE(target string, lazy bool) bool {
	s, err := sys.StatfsPath(target)
	if err != nil && !errors.Is(err, syscall.ENOTCONN) || err == nil && s.Type != sys.FUSE_SUPER_MAGIC {
		return false
	}
	args := []string{"-u", target}
	if lazy {
		args = []string{"-u", "-z", target}
	}
	for _, program := range []string{"fusermount3", "fusermount"} {
		if exec.Command(program, args...).Run() == nil {
			return true
		}
	}
	return false
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
