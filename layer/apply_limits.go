package layer

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// The limits that zero means; see Limits.
const (
	defaultEntries   = 4_000_000
	defaultDepth     = 1024
	defaultPathBytes = 4 * 4096
	defaultFileSize  = 8 << 40
	defaultSize      = 1 << 40
	defaultXattrSize = 65_536 // XATTR_SIZE_MAX (include/uapi/linux/limits.h)
	defaultXattrs    = 256
	defaultPAXBytes  = 1 << 20
	defaultSparse    = 64 << 30
	defaultWindow    = 32 << 20
)

func (l Limits) orDefaults() Limits {
	setDefault(&l.Entries, defaultEntries)
	setDefault(&l.Depth, defaultDepth)
	setDefault(&l.PathBytes, defaultPathBytes)
	setDefault(&l.FileSize, defaultFileSize)
	setDefault(&l.Size, defaultSize)
	setDefault(&l.XattrSize, defaultXattrSize)
	setDefault(&l.Xattrs, defaultXattrs)
	setDefault(&l.PAXBytes, defaultPAXBytes)
	setDefault(&l.Sparse, defaultSparse)
	setDefault(&l.Window, defaultWindow)
	return l
}

func setDefault[T int | int64](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// LimitError is a refusal of an archive that asks for more than a limit. It
// wraps ErrResourceExhausted.
type LimitError struct {
	Limit string // the field of Limits that lifts it
	What  string // what there is too much of
	N     int64  // how much; 0 where only known to be more
	Most  int64
}

func (e *LimitError) Error() string {
	if e.N == 0 {
		return fmt.Sprintf("%s: more than the limit of %d", e.What, e.Most)
	}
	return fmt.Sprintf("%s: %d, more than the limit of %d", e.What, e.N, e.Most)
}

func (e *LimitError) Unwrap() error { return errdefs.ErrResourceExhausted }

// within refuses n above most, unless that is negative. limit is the field of
// Limits.
func within[T int | int64](limit string, n, most T, what string) error {
	if most < 0 || n <= most {
		return nil
	}
	return &LimitError{Limit: limit, What: what, N: int64(n), Most: int64(most)}
}
