package layer

import (
	"context"
	"iter"

	"github.com/layerctl/layerctl/internal/sys"
)

// ReadOptions say how an entry is read.
type ReadOptions struct {
	// OverrideStat reads owner, mode and type from the xattr
	// user.containers.override_stat where it is, and hides it.
	OverrideStat bool
}

// ReadEntry reads the metadata and xattrs of one name of a directory; name ""
// is the directory itself. Path and Hardlink are left empty.
func ReadEntry(dir *sys.Fd, name string) (Entry, error) {
	return ReadEntryOptions(dir, name, ReadOptions{})
}

// ReadEntryOptions is ReadEntry with options.
func ReadEntryOptions(dir *sys.Fd, name string, o ReadOptions) (Entry, error) {
	return Entry{}, nil
}

// Walk yields every entry of a tree in path order, the root first, with its
// hard-link groups resolved.
func Walk(ctx context.Context, dir string) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {}
}
