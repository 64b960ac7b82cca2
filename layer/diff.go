package layer

import (
	"context"
	"iter"

	"github.com/layerctl/layerctl/internal/sys"
)

// DiffOptions say how two trees are compared. The zero value compares every
// name and the bytes of every pair of files that are not one and the same.
type DiffOptions struct {
	// Candidates, if not nil, prunes: it names what may differ in directory dir
	// (a path as Entry.Path), in any order; all says that every name at every
	// depth below dir may, and then it is not asked again there. It is asked only
	// for directories of both trees that it named itself (and for "."). A name
	// that it leaves out must be the same in both trees with all below it, but for
	// membership of link groups, which is always found out. An error ends the walk.
	Candidates func(dir string) (names []string, all bool, err error)
	// SameFile, if not nil, is asked about two regular files of the same metadata
	// and reports that they are certain to be one file, content and xattrs, without
	// a look at the bytes. One inode of one file system is known to be the same
	// without it.
	SameFile func(from, to *sys.Stat) bool
	// SkipWhiteoutNames leaves out names that begin with ".wh.", which no OCI
	// layer can carry, and reports them; otherwise such a change is an error that
	// names it and wraps ErrInvalidArgument.
	SkipWhiteoutNames bool
	// Skipped, if not nil, is told of each changed path that was left out, and why.
	Skipped func(path, reason string)
	// OverrideStat reads owner, mode and type from the xattr
	// user.containers.override_stat where it is, on both sides, and hides it.
	OverrideStat bool
}

// DiffTrees compares two directory trees exactly and yields what turns from
// into to, in path order. from "" is the empty tree. Paths are trusted; what is
// below them is opened one component at a time and never through a symlink. An
// error ends the sequence.
func DiffTrees(ctx context.Context, from, to string, o DiffOptions) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {}
}
