package native

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// overrideXattr keeps the owner and mode that an unprivileged process may not
// set; see layer.FormatOverride.
const overrideXattr = "user.containers.override_stat"

// metadata gives a copy the owner, xattrs, mode and times of its source, in the
// one order in which none undoes another: chown clears setuid and
// security.capability, a mode without w refuses xattrs to the unprivileged, and a
// change of any of them would move ctime only. An ACL and the mode agree in the
// source, so that setting both is setting each. name "" is the descriptor itself.
func (c *copier) metadata(src *sys.Fd, from string, dst *sys.Fd, to string, st *sys.Stat) error {
	mode, err := c.owner(src, from, dst, to, st)
	if err != nil {
		return err
	}
	if err := copyXattrs(src, from, dst, to); err != nil {
		return err
	}
	if err := chmod(dst, to, st, mode); err != nil {
		return err
	}
	return dst.Utimes(to, st.Atime, st.Mtime)
}

func chmod(dst *sys.Fd, to string, st *sys.Stat, mode uint32) error {
	switch {
	case st.Type() == sys.S_IFLNK:
		return nil
	case to == "":
		return dst.Chmod(mode)
	default:
		return dst.ChmodAt(to, mode)
	}
}

// owner sets uid and gid; where this process may not, it keeps them in
// overrideXattr, unless the source has that already. It returns the mode that the
// copy is to have.
func (c *copier) owner(src *sys.Fd, from string, dst *sys.Fd, to string, st *sys.Stat) (mode uint32, err error) {
	mode = st.Mode & 0o7777
	err = dst.Chown(to, st.UID, st.GID)
	refused := errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL)
	if !refused || !c.keepsStat {
		return mode, err
	}
	c.overridden.Add(1)
	if !st.IsReg() && !st.IsDir() { // user.* xattrs exist only there
		return mode, nil
	}
	if _, has := src.Getxattr(from, overrideXattr); has == nil {
		return mode, nil
	}
	typ := "file"
	if st.IsDir() {
		typ = "dir"
	}
	err = dst.Setxattr(to, overrideXattr, layer.FormatOverride(st.UID, st.GID, mode, typ))
	return layer.HiddenMode(mode, st.IsDir()), err
}

func copyXattrs(src *sys.Fd, from string, dst *sys.Fd, to string) error {
	names, err := src.Listxattr(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		value, err := src.Getxattr(from, name)
		if err == nil {
			err = dst.Setxattr(to, name, value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// shortError is a file that ended before its size: it was changed while it was
// copied, or its blocks cannot be read.
type shortError struct {
	name     string
	at, want int64
}

func (e *shortError) Error() string {
	return fmt.Sprintf("%s: ends at byte %d of %d", e.name, e.at, e.want)
}

func (e *shortError) Unwrap() error { return errdefs.ErrDataLoss }
