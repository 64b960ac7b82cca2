package image

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// lockPoll is how often a lock that another has is tried again.
const lockPoll = 10 * time.Millisecond

// tryLock takes the flock of a directory: ErrUnavailable when another has it.
func tryLock(dir string, kind sys.LockKind) (*sys.Lock, error) {
	f, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, err := f.TryLock(kind)
	if sys.IsLocked(err) {
		return nil, fmt.Errorf("in use by another: %w: %w", errdefs.ErrUnavailable, err)
	}
	return l, err
}

// lock is tryLock that waits as long as ctx lasts.
func lock(ctx context.Context, dir string, kind sys.LockKind) (*sys.Lock, error) {
	for {
		l, err := tryLock(dir, kind)
		if !errdefs.IsUnavailable(err) {
			return l, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}
