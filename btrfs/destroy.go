package btrfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// destroyer deletes subvolumes with all that is in them.
type destroyer struct {
	ctx context.Context
	// kept is told of a subvolume that left a qgroup; nil: nobody is.
	kept func(subvol uint64)
}

func (d *driver) destroyer(ctx context.Context) destroyer {
	return destroyer{ctx: ctx, kept: d.noteQgroup}
}

// layer deletes the directory of a layer with all its subvolumes; fs before ro,
// without which a committed layer would look writable.
func (r destroyer) layer(dir *sys.Fd, name string) error {
	l, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	names, err := l.ReadDir()
	if err != nil {
		return err
	}
	slices.SortFunc(names, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, e := range names {
		if strings.HasPrefix(e.Name, diffPrefix) {
			err = r.layer(l, e.Name)
		} else {
			err = (&emptier{destroyer: r}).name(l, e) // a subvolume, or in a copy of a store a directory
		}
		if err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
		if err := drivers.Step(r.ctx, "btrfs: remove: "+stepWord(e.Name)+" deleted"); err != nil {
			return err
		}
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

func stepWord(name string) string {
	if strings.HasPrefix(name, diffPrefix) {
		return "snapshot"
	}
	return name
}

// subvolume deletes a subvolume, those in it first.
func (r destroyer) subvolume(dir *sys.Fd, name string) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	s, err := dir.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	err = r.children(s)
	if errors.Is(err, syscall.ENAMETOOLONG) { // the kernel cannot tell where they are
		return r.byHand(dir, s, name)
	}
	if err != nil {
		return err
	}
	number, err := ioctl.SubvolID(s)
	if err != nil {
		return err
	}
	err = ioctl.Destroy(dir, name)
	if errors.Is(err, syscall.EROFS) { // with user_subvol_rm_allowed: only root deletes what is read-only
		if err = ioctl.SetReadOnly(s, false); err == nil {
			err = ioctl.Destroy(dir, name)
		}
	}
	if errors.Is(err, syscall.EPERM) && unprotect(s) == nil {
		err = ioctl.Destroy(dir, name)
	}
	if errors.Is(err, syscall.EPERM) {
		if _, no := ioctl.Deleted(dir); no == nil { // who may see that may delete
			return fmt.Errorf("subvolume %d is being sent, or is what this file system mounts by default: %w: %w", number, errdefs.ErrFailedPrecondition, err)
		}
		err = r.byHand(dir, s, name)
	}
	if err == nil && r.kept != nil { // or its qgroup may stay for ever; without quota there is none
		if _, none := ioctl.Qgroup(dir, number); none == nil {
			r.kept(number)
		}
	}
	return err
}

// unprotect takes what chattr +i or +a gave a subvolume's own directory away, by
// which it could not be deleted.
func unprotect(s *sys.Fd) error {
	st, err := s.Stat("")
	if err != nil || st.Attributes&(sys.STATX_ATTR_IMMUTABLE|sys.STATX_ATTR_APPEND) == 0 {
		return err
	}
	if err := ioctl.SetReadOnly(s, false); err != nil {
		return err
	}
	return s.Unprotect("")
}

// children deletes the subvolumes in a subvolume.
func (r destroyer) children(s *sys.Fd) error {
	children, err := ioctl.Children(s)
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := r.child(s, c); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

func (r destroyer) child(s *sys.Fd, c ioctl.Child) error {
	path, name, err := ioctl.UserPath(s, c)
	if err != nil {
		return err
	}
	if path == "" {
		return r.subvolume(s, name)
	}
	in, err := s.Openat2(path, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer in.Close()
	return r.subvolume(in, name)
}

// byHand deletes file by file what this process may not delete at once, and what
// has subvolumes where no path reaches: rmdir(2) takes an empty subvolume (Linux
// 4.18).
func (r destroyer) byHand(dir, s *sys.Fd, name string) error {
	if ro, err := ioctl.ReadOnly(s); err != nil || ro {
		if err == nil {
			err = ioctl.SetReadOnly(s, false)
		}
		if err != nil {
			return err
		}
	}
	e := &emptier{destroyer: r}
	if err := e.dir(s); err != nil {
		return err
	}
	return dir.Unlink(name, sys.AT_REMOVEDIR)
}

// emptier deletes trees, one open directory for each level.
type emptier struct {
	destroyer
	entries int64
}

func (r *emptier) dir(d *sys.Fd) error {
	if err := d.Chmod(0o700); err != nil {
		return err
	}
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range names {
		if err := r.name(d, e); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil
}

func (r *emptier) name(d *sys.Fd, e sys.Dirent) error {
	if r.entries++; r.entries%512 == 0 {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		drivers.ReportProgress(r.ctx, drivers.Progress{Step: "remove", Entries: r.entries})
	}
	if e.Type != sys.S_IFDIR {
		return d.Unlink(e.Name, 0)
	}
	st, err := d.Stat(e.Name)
	if err != nil {
		return err
	}
	if st.Ino == ioctl.BTRFS_FIRST_FREE_OBJECTID {
		return r.subvolume(d, e.Name)
	}
	if err := d.ChmodAt(e.Name, 0o700); err != nil { // or it cannot be read
		return err
	}
	sub, err := d.Openat(e.Name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	if err := r.dir(sub); err != nil {
		return err
	}
	return d.Unlink(e.Name, sys.AT_REMOVEDIR)
}
