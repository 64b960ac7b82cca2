// Package roots has what drivers share that keep each layer under its ID in one of
// three directories of their root: l, new while it is being made, and del while it
// is being removed. A rename between them is one step, so that half a layer is never
// seen as one.
package roots

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// The directories.
const (
	Layers  = "l"
	New     = "new"
	Deleted = "del"
)

// All are the directories, that of layers first.
var All = []string{Layers, New, Deleted}

// Make makes what is missing of a root, of its directories and of more, lasting from
// the start, and returns the root without symlinks: what mountinfo shows.
func Make(path string, more ...string) (string, error) {
	made, err := makeDir(path)
	if err != nil {
		return "", err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	root, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", err
	}
	for _, name := range slices.Concat(All, more) {
		also, err := makeDir(filepath.Join(root, name))
		if err != nil {
			return "", err
		}
		made = made || also
	}
	if !made { // a read-only file system is good enough
		return root, nil
	}
	f, err := sys.OpenDir(root)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return root, f.Sync()
}

// makeDir makes a directory of mode 0700 that hands no ACL of a directory
// above down to the trees below, and reports whether it was missing.
func makeDir(path string) (made bool, err error) {
	err = os.Mkdir(path, 0o700)
	if errors.Is(err, os.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, inheritNothing(path)
}

func inheritNothing(path string) error {
	f, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, acl := range []string{"system.posix_acl_default", "system.posix_acl_access"} {
		err := f.Removexattr("", acl)
		if err != nil && !errors.Is(err, syscall.ENODATA) && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	return f.Chmod(0o700) // without a setgid bit handed down
}

// IDs lists what stands in the three directories, each ID once; driver begins
// errors.
func IDs(ctx context.Context, driver, root string) iter.Seq2[drivers.ID, error] {
	return func(yield func(drivers.ID, error) bool) {
		seen := map[drivers.ID]bool{}
		for _, name := range All {
			ids, err := In(ctx, root, name)
			if err != nil {
				yield(0, fmt.Errorf("%s: ids: %w", driver, err))
				return
			}
			for _, id := range ids {
				if !seen[id] && !yield(id, nil) {
					return
				}
				seen[id] = true
			}
		}
	}
}

// In lists the IDs in one of the directories.
func In(ctx context.Context, root, name string) ([]drivers.ID, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := sys.OpenDir(root + "/" + name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.ReadDir()
	if err != nil {
		return nil, err
	}
	var ids []drivers.ID
	for _, e := range names {
		if id, ok := drivers.ParseID(e.Name); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
