package layer

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// target is what metadata is set on: an open file (name ""), or a name.
type target struct {
	fd   *sys.Fd
	name string
}

func (u *unpacker) target(s spot, fd *sys.Fd) target {
	if fd != nil {
		return target{fd: fd}
	}
	return target{s.d.up, s.name}
}

// chmod changes the mode. A name is one that was just made and is no symlink.
func (t target) chmod(mode uint32) error {
	if t.name == "" {
		return t.fd.Chmod(mode)
	}
	return t.fd.ChmodAt(t.name, mode)
}

// birthMode is what a file is made with; umask takes from it. Without privilege
// its owner must be able to work on it first.
func (u *unpacker) birthMode(e *Entry) uint32 {
	mode := e.Mode & 0o777
	if !u.privileged {
		mode |= 0o600
	}
	if e.Type == TypeDir {
		mode |= 0o700
	}
	return mode
}

// errOwner says that a file's owner cannot be set, and that an xattr is to tell it.
var errOwner = errors.New("the owner cannot be set")

// stamp gives a file that was just made at s its owner, mode, xattrs and, but
// for a directory, its time. fd is the open file, or nil for what cannot be
// opened. Few files need more than the time: the rest is what they were made with.
//
// The order matters: a chown takes setuid bits and capabilities away, and an ACL
// is part of the mode. Without privilege xattrs come first, as setting them
// needs write permission.
func (u *unpacker) stamp(s spot, fd *sys.Fd, it *item) error {
	t := u.target(s, fd)
	switch err := u.setOwner(s, t, &it.e); {
	case errors.Is(err, errOwner) && it.e.Type == TypeSymlink:
		if u.o.Skipped != nil {
			u.o.Skipped(s.path, fmt.Sprintf("owner %d:%d of a symlink", it.e.UID, it.e.GID))
		}
	case errors.Is(err, errOwner) && (it.e.Type == TypeReg || it.e.Type == TypeDir):
		return u.stampOverridden(s, fd, it)
	case err != nil:
		return err
	}
	steps := []func() error{
		func() error { return u.setMode(s, t, &it.e) },
		func() error { return u.setXattrs(s, t, it.xattrs) },
	}
	if !u.privileged {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return u.setTime(s, t, &it.e)
}

func (u *unpacker) setOwner(s spot, t target, e *Entry) error {
	if u.hidesMode(e) {
		return errOwner
	}
	// A setgid directory, or the mount option grpid, gives files its own group.
	if e.UID == u.uid && e.GID == u.gid && s.d.gid == u.gid {
		return nil
	}
	err := t.fd.Chown(t.name, e.UID, e.GID)
	if u.o.OverrideStat && (errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL)) {
		return errOwner
	}
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("owner %d:%d: %w: %w", e.UID, e.GID, err, errdefs.ErrPermissionDenied)
	}
	return err
}

// hidesMode reports whether the mode would lock its unprivileged owner out, who
// then could not read the tree again.
func (u *unpacker) hidesMode(e *Entry) bool {
	return u.o.OverrideStat && !u.privileged &&
		(e.Type == TypeReg && e.Mode&0o600 != 0o600 || e.Type == TypeDir && e.Mode&0o700 != 0o700)
}

func (u *unpacker) setMode(s spot, t target, e *Entry) error {
	if e.Type == TypeSymlink {
		return nil
	}
	if s.d.defaultACL {
		if err := dropInherited(t, e); err != nil {
			return err
		}
	}
	inherits := s.d.defaultACL || s.d.setgid && e.Type == TypeDir
	if !inherits && e.Mode == u.birthMode(e)&^u.umask {
		return nil
	}
	return t.chmod(e.Mode)
}

// dropInherited removes the ACLs that a file got from its directory.
func dropInherited(t target, e *Entry) error {
	for _, attr := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
		if attr == "system.posix_acl_default" && e.Type != TypeDir {
			continue
		}
		if err := noXattr(t.fd.Removexattr(t.name, attr)); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) setXattrs(s spot, t target, attrs []xattr) error {
	for _, x := range attrs {
		err := t.fd.Setxattr(t.name, x.name, x.value)
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EOPNOTSUPP) {
			err = u.skip(s.path, fmt.Errorf("xattr %q: %w", x.name, err))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dropXattrs removes from a directory what an entry without them says is not there.
func (u *unpacker) dropXattrs(fd *sys.Fd, keep []xattr) error {
	names, err := fd.Listxattr("")
	if err != nil {
		return err
	}
	for _, n := range names {
		if !keepXattr(n) || slices.ContainsFunc(keep, func(x xattr) bool { return x.name == n }) {
			continue
		}
		err := fd.Removexattr("", n)
		if strings.HasPrefix(n, "security.") && !errors.Is(err, syscall.ENODATA) {
			err = nil // a label that the system keeps itself (SELinux refuses to remove it)
		}
		if err := noXattr(err); err != nil {
			return err
		}
	}
	return nil
}

// Times outside this range do not fit every file system; ext4 with small inodes
// has the least.
const (
	leastTime = -1 << 31
	mostTime  = 1<<31 - 1
)

func (u *unpacker) setTime(s spot, t target, e *Entry) error {
	if e.Type == TypeDir && e.ModTime.Sec >= leastTime && e.ModTime.Sec <= mostTime {
		return nil
	}
	want := sys.Time{Sec: e.ModTime.Sec, Nsec: e.ModTime.Nsec}
	if err := t.fd.Utimes(t.name, sys.TimeOmit, want); err != nil {
		return err
	}
	if want.Sec >= leastTime && want.Sec <= mostTime {
		return nil
	}
	st, err := t.fd.Stat(t.name)
	if err != nil || st.Mtime == want {
		return err
	}
	e.ModTime = Timespec{st.Mtime.Sec, st.Mtime.Nsec}
	return u.skip(s.path, fmt.Errorf("mtime %d s does not fit the file system: %w", want.Sec, errdefs.ErrInvalidArgument))
}

// stampOverridden is stamp for a file whose owner or mode this process may not
// set: they go into an xattr, and the file's own mode lets its real owner work.
func (u *unpacker) stampOverridden(s spot, fd *sys.Fd, it *item) error {
	e := &it.e
	if err := fd.Setxattr("", overrideXattr, formatOverride(e)); err != nil {
		return err
	}
	t := target{fd: fd}
	if s.d.defaultACL {
		if err := dropInherited(t, e); err != nil {
			return err
		}
	}
	if err := u.setXattrs(s, t, it.xattrs); err != nil {
		return err
	}
	if s.d.gid != u.gid { // it got its directory's group
		if err := fd.Chown("", u.uid, u.gid); err != nil {
			return err
		}
	}
	if err := fd.Chmod(HiddenMode(e.Mode, e.Type == TypeDir)); err != nil {
		return err
	}
	return u.setTime(s, t, e)
}

// formatOverride is the value of overrideXattr for an entry.
func formatOverride(e *Entry) string {
	typ := "file"
	switch e.Type {
	case TypeDir:
		typ = "dir"
	case TypeFifo:
		typ = "pipe"
	case TypeBlock:
		typ = fmt.Sprintf("block-%d-%d", e.Major, e.Minor)
	case TypeChar:
		typ = fmt.Sprintf("char-%d-%d", e.Major, e.Minor)
	}
	return FormatOverride(e.UID, e.GID, e.Mode, typ)
}
