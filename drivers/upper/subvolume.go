package upper

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// On btrfs whoever has a layer without parents mounted, which is a bind, can make
// a subvolume in it. Its files have inode numbers of their own count, and an
// overlay shows them as if they were of one file system with the rest: two files
// of one number would be taken for one, by Diff and by everybody who looks for
// hard links. So a layer that holds a subvolume is neither committed nor compared.
// It can be mounted, and removed.

// isNested reports whether a file of a layer on device dev is of a subvolume. What
// is mounted there is none.
func isNested(st *sys.Stat, dev uint64) bool { return st.IsDir() && st.Dev != dev && !st.IsMountRoot() }

func nestedError(path string) error {
	return fmt.Errorf("%q is a btrfs subvolume, of which a layer can hold none: make a directory in its place, "+
		"with its files (cp -a --reflink), and delete it (btrfs subvolume delete): %w", path, errdefs.ErrFailedPrecondition)
}

// refuseNested looks for subvolumes in a layer that Commit has not looked at.
func (l *Layers) refuseNested(ctx context.Context, s *state) error {
	if l.fsType != sys.BTRFS_SUPER_MAGIC || !s.writable() {
		return nil
	}
	fs, err := sys.OpenDir(l.Dir(s.id))
	if err != nil {
		return err
	}
	defer fs.Close()
	st, err := fs.Stat("")
	if err != nil {
		return err
	}
	return refuseNestedIn(ctx, fs, "", st.Dev)
}

func refuseNestedIn(ctx context.Context, dir *sys.Fd, path string, dev uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ents, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range ents {
		if e.Type != sys.S_IFDIR {
			continue // btrfs says what each name is
		}
		err := refuseNestedDir(ctx, dir, path+e.Name, e.Name, dev)
		if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTDIR) { // it changes meanwhile
			return err
		}
	}
	return nil
}

func refuseNestedDir(ctx context.Context, in *sys.Fd, path, name string, dev uint64) error {
	sub, err := in.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	st, err := sub.Stat("")
	if err != nil {
		return err
	}
	if isNested(&st, dev) {
		return nestedError(path)
	}
	return refuseNestedIn(ctx, sub, path+"/", dev)
}
