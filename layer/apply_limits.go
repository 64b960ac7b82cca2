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
	return l
}

func setDefault[T int | int64](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// within refuses n above limit, unless that is negative.
func within[T int | int64](n, limit T, what string) error {
	if limit < 0 || n <= limit {
		return nil
	}
	return fmt.Errorf("%s: %d, more than the limit of %d: %w", what, n, limit, errdefs.ErrResourceExhausted)
}
