package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Inode flags that the kernel's overlayfs keeps in an xattr and enforces itself,
// since they would keep it from renaming or removing the upper file. That the
// caller may change them, the kernel has checked.
const (
	guardFlags     = sys.FS_IMMUTABLE_FL | sys.FS_APPEND_FL
	xflagImmutable = 0x08 // FS_XFLAG_IMMUTABLE
	xflagAppend    = 0x10 // FS_XFLAG_APPEND
	guardXflags    = xflagImmutable | xflagAppend
)

// FileFlags reads the inode flags of a file or directory, as FS_IOC_GETFLAGS
// does; ENOTTY for other types.
func (fs *FS) FileFlags(n *Node) (flags uint32, err error) {
	err = fs.withReal(n, func(fd int) error {
		flags, err = sys.FlagsBare(fd)
		return err
	})
	if err != nil {
		return 0, err
	}
	guards, err := fs.guarded(n)
	if guards&isImmutable != 0 {
		flags |= sys.FS_IMMUTABLE_FL
	}
	if guards&isAppend != 0 {
		flags |= sys.FS_APPEND_FL
	}
	return flags, err
}

// SetFileFlags sets the inode flags, copying the node up.
func (fs *FS) SetFileFlags(c Caller, n *Node, flags uint32) error {
	return fs.changeReal(c, n, func(fd int) error {
		if err := fs.setGuards(n, flags&sys.FS_APPEND_FL != 0, flags&sys.FS_IMMUTABLE_FL != 0); err != nil {
			return err
		}
		return sys.SetFlagsBare(fd, flags&^guardFlags)
	})
}

// FSXattr reads what FS_IOC_FSGETXATTR does.
func (fs *FS) FSXattr(n *Node) (x sys.FSXattr, err error) {
	err = fs.withReal(n, func(fd int) error {
		x, err = sys.FSXattrBare(fd)
		return err
	})
	if err != nil {
		return x, err
	}
	guards, err := fs.guarded(n)
	if guards&isImmutable != 0 {
		x.Xflags |= xflagImmutable
	}
	if guards&isAppend != 0 {
		x.Xflags |= xflagAppend
	}
	return x, err
}

// SetFSXattr sets that, copying the node up.
func (fs *FS) SetFSXattr(c Caller, n *Node, x sys.FSXattr) error {
	return fs.changeReal(c, n, func(fd int) error {
		if err := fs.setGuards(n, x.Xflags&xflagAppend != 0, x.Xflags&xflagImmutable != 0); err != nil {
			return err
		}
		x.Xflags &^= guardXflags
		return sys.SetFSXattrBare(fd, x)
	})
}

// changeReal calls f with a descriptor of the upper's object.
func (fs *FS) changeReal(c Caller, n *Node, f func(fd int) error) error {
	if !n.isDir() && n.typ != sys.S_IFREG {
		return syscall.ENOTTY
	}
	if err := fs.copyUp(c.PID, n, copyMeta); err != nil {
		return err
	}
	n.change.Lock()
	defer n.change.Unlock()
	return fs.withReal(n, f)
}

// withReal calls f with a descriptor, good for ioctls, of the object that shows a
// node's attributes.
func (fs *FS) withReal(n *Node, f func(fd int) error) error {
	flags := sys.O_RDONLY | sys.O_NONBLOCK
	switch {
	case n.isDir():
		flags |= sys.O_DIRECTORY
	case n.typ != sys.S_IFREG:
		return syscall.ENOTTY
	}
	var p place
	if err := fs.locate(n, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	var fd int
	var err error
	if p.name == "" {
		fd, err = sys.ReopenBare(p.fd, flags)
	} else {
		fd, err = sys.OpenBare(p.fd, p.name, flags, 0)
	}
	if err != nil {
		return err
	}
	defer sys.CloseBare(fd)
	return f(fd)
}
