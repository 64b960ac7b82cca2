package drivers

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/faults"
)

// Step marks the place between two steps of a driver's change, named by what
// has been done: "native: create: copied". A driver calls it after each step that
// leaves another state on disk and returns its error: package drivertest fails,
// cancels and crashes the driver at every step that it meets. It returns
// ctx.Err() when the context is done.
func Step(ctx context.Context, name string) error { return faults.Point(ctx, name) }

// Progress is what a long call has done so far.
type Progress struct {
	Step    string // what is being done: "copy", "remove"
	Entries int64  // files done
	Bytes   int64  // apparent bytes of the regular files among them
}

type progressKey struct{}

// WithProgress returns a context in which the O(files) calls of a driver tell f
// how far they are, every few hundred files. f may be called by several
// goroutines at once.
func WithProgress(ctx context.Context, f func(Progress)) context.Context {
	return context.WithValue(ctx, progressKey{}, f)
}

// ReportProgress tells what WithProgress put into ctx, if anything.
func ReportProgress(ctx context.Context, p Progress) {
	if f, ok := ctx.Value(progressKey{}).(func(Progress)); ok {
		f(p)
	}
}

// Wrap gives an error of a driver its one form: "native: create 1a: ...", with a
// sentinel of containerd/errdefs chosen by the errno where err wraps none. nil
// stays nil. The errno stays reachable by errors.As.
func Wrap(driver, op string, id ID, err error) error {
	if err == nil {
		return nil
	}
	if id != 0 {
		op += " " + id.String()
	}
	if s := sentinel(err); s != nil {
		return fmt.Errorf("%s: %s: %w: %w", driver, op, s, err)
	}
	return fmt.Errorf("%s: %s: %w", driver, op, err)
}

// sentinel returns the sentinel that err lacks, nil if it has one.
func sentinel(err error) error {
	if errdefs.Resolve(err) != errdefs.ErrUnknown {
		return nil
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return errdefs.ErrInternal
	}
	switch errno {
	case syscall.ENOENT:
		return errdefs.ErrNotFound
	case syscall.EEXIST, syscall.ENOTEMPTY:
		return errdefs.ErrAlreadyExists
	case syscall.EPERM, syscall.EACCES:
		return errdefs.ErrPermissionDenied
	case syscall.EINVAL, syscall.ENAMETOOLONG:
		return errdefs.ErrInvalidArgument
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM:
		return errdefs.ErrResourceExhausted
	case syscall.EBUSY, syscall.EROFS, syscall.ETXTBSY:
		return errdefs.ErrFailedPrecondition
	case syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.EXDEV:
		return errdefs.ErrNotImplemented
	case syscall.EIO, syscall.EUCLEAN, syscall.EBADMSG:
		return errdefs.ErrDataLoss
	}
	return errdefs.ErrInternal
}

// IsFull reports whether err is that of a full disk or quota.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
