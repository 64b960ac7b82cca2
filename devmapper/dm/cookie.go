package dm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// A cookie's upper half are flags for udev's rules, its lower half is, below the
// magic number, the key of a semaphore (dm-ioctl.h: event_nr; libdevmapper.h).
const (
	cookieMagic       = 0x0d4d
	cookieMask        = 0xffff
	udevPrimarySource = 0x0040 // this program, not a coldplug, is why
	udevNameOnly      = 0x000e // no rules of subsystems, disks and others: nobody scans it, no link is made of its UUID
	udevControl       = "/run/udev/control"

	cookieTries = 100
	cookiePoll  = 100 * time.Millisecond
)

// UdevRuns reports whether udev makes nodes on this machine.
func UdevRuns() bool {
	_, err := os.Stat(udevControl)
	return err == nil
}

// Cookie is for waiting until udev has done its work on some changes: a semaphore,
// which each change raises, and udev's rules, by `dmsetup udevcomplete`, lower
// again. Its owner calls Wait, which ends it.
type Cookie struct {
	sem  sys.Semaphore
	base uint32
}

// NewCookie makes a cookie.
func NewCookie() (*Cookie, error) {
	for range cookieTries {
		base := 1 + rand.Uint32N(cookieMask)
		sem, err := sys.MakeSemaphore(int32(cookieMagic<<16|base), 1)
		if err == nil {
			return &Cookie{sem, base}, nil
		}
		if !errors.Is(err, syscall.EEXIST) {
			return nil, fmt.Errorf("dm: udev cookie: %w", err)
		}
	}
	return nil, fmt.Errorf("dm: udev cookie: %d keys are in use, which killed programs have left (dmsetup udevcomplete_all): %w", cookieTries, syscall.EEXIST)
}

// With returns the Control whose Resume, Rename and Remove take the cookie along.
// Only c itself is closed.
func (c *Control) With(k *Cookie) *Control { return &Control{c.fd, c.version, k} }

// Wait waits until udev has seen all changes, and ends the cookie, whatever comes.
// Without udev it waits until ctx ends.
func (k *Cookie) Wait(ctx context.Context) error {
	err := k.sem.Add(-1)
	for err == nil {
		if err = ctx.Err(); err != nil {
			break
		}
		if err = k.sem.WaitZero(cookiePoll); err == nil {
			break
		}
		if errors.Is(err, syscall.EAGAIN) {
			err = nil
		}
	}
	if err = errors.Join(err, k.sem.Remove()); err != nil {
		return fmt.Errorf("dm: udev cookie %#x: %w", k.base, err)
	}
	return nil
}

// announced performs a command of which the kernel tells udev.
func (c *Control) announced(cmd uint32, name string, flags uint32, data []byte) error {
	if c.cookie == nil {
		_, _, err := c.named(cmd, name, flags, data)
		return err
	}
	if name == "" {
		return callError(cmd, `""`, errBadName)
	}
	if err := c.cookie.sem.Add(1); err != nil {
		return callError(cmd, name, fmt.Errorf("udev cookie: %w", err))
	}
	h, _, err := c.call(cmd, header{name: name, flags: flags, event: (udevPrimarySource|udevNameOnly)<<16 | c.cookie.base}, data)
	if err != nil || h.flags&DM_UEVENT_GENERATED_FLAG == 0 {
		return errors.Join(err, c.cookie.sem.Add(-1)) // udev hears of nothing
	}
	return nil
}
