package union

import (
	"bytes"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// withPlace calls f with where the object behind n is.
func (fs *FS) withPlace(n *Node, f func(p *place) error) error {
	if n.has(inUpper) && !n.isDir() {
		n.change.Lock()
		defer n.change.Unlock()
	}
	var p place
	if err := fs.locate(n, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	return f(&p)
}

// Getxattr reads an xattr into dest; with an empty dest it returns the size,
// else ERANGE where dest is too small.
func (fs *FS) Getxattr(n *Node, attr string, dest []byte) (size int, err error) {
	if fs.hides(attr) {
		return 0, syscall.ENODATA
	}
	if fs.noACL(n, attr) {
		return 0, syscall.EOPNOTSUPP
	}
	disk, err := fs.names.toDisk(attr)
	if err != nil {
		return 0, err
	}
	err = fs.withPlace(n, func(p *place) (err error) {
		size, err = sys.GetxattrBare(p.fd, p.name, disk, dest)
		return err
	})
	if err == nil && isACL(attr) {
		fs.owners.showACL(dest[:min(size, len(dest))])
	}
	return size, err
}

// noACL tells whether an xattr is an ACL, where there can be none.
func (fs *FS) noACL(n *Node, attr string) bool {
	return isACL(attr) && (fs.config.NoACL || n.typ == sys.S_IFLNK)
}

func isACL(attr string) bool { return strings.HasPrefix(attr, "system.posix_acl_") }

// Listxattr lists xattrs, each ended by NUL, as Getxattr reads one.
func (fs *FS) Listxattr(n *Node, dest []byte) (int, error) {
	all, err := fs.listxattr(n)
	if err != nil {
		return 0, err
	}
	if len(dest) > 0 && len(all) > len(dest) {
		return 0, syscall.ERANGE
	}
	copy(dest, all)
	return len(all), nil
}

func (fs *FS) listxattr(n *Node) ([]byte, error) {
	var all []byte
	err := fs.withPlace(n, func(p *place) error {
		for size := 512; ; size *= 4 {
			b := make([]byte, size)
			got, err := sys.ListxattrBare(p.fd, p.name, b)
			if err == syscall.ERANGE && size < 1<<20 {
				continue
			}
			all = b[:got]
			return err
		}
	})
	if err == syscall.EOPNOTSUPP {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	shown := make([]byte, 0, len(all))
	for name := range bytes.SplitSeq(all, []byte{0}) {
		if len(name) == 0 || fs.config.NoACL && isACL(string(name)) || fs.hides(string(name)) {
			continue
		}
		if s, ok := fs.names.toShown(string(name)); ok {
			shown = append(append(shown, s...), 0)
		}
	}
	return shown, nil
}

// Setxattr sets an xattr, copying the node up; flags are setxattr(2)'s.
// killSGID: the mode loses setgid, as an ACL set by a stranger makes it.
func (fs *FS) Setxattr(c Caller, n *Node, attr string, value []byte, flags uint32, killSGID bool) error {
	if err := fs.writable(); err != nil {
		return err
	}
	if err := fs.unguarded(n, isImmutable|isAppend); err != nil {
		return err
	}
	if fs.noACL(n, attr) {
		return syscall.EOPNOTSUPP
	}
	if fs.hides(attr) {
		return syscall.EPERM
	}
	disk, err := fs.names.toDisk(attr)
	if err != nil {
		return err
	}
	if attr == xattrACLDefault && !n.isDir() {
		return syscall.EACCES
	}
	if isACL(attr) {
		if value, err = fs.owners.hostACL(value); err != nil {
			return err
		}
	}
	if err := fs.copyUp(c.PID, n, copyMeta); err != nil {
		return err
	}
	n.change.Lock()
	defer n.change.Unlock()
	var p place
	if err := fs.locate(n, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	if err := sys.SetxattrBare(p.fd, p.name, disk, value, int(flags)); err != nil {
		return err
	}
	fs.attrSet(n, attr)
	if !killSGID {
		return nil
	}
	var st sys.Stat
	if err := sys.StatBare(p.fd, p.name, &st); err != nil || st.Mode&0o2000 == 0 {
		return err
	}
	return sys.ChmodBare(p.fd, p.name, st.Mode&0o5777)
}

// attrSet is told that an xattr has changed.
func (fs *FS) attrSet(n *Node, attr string) {
	if attr == xattrACLDefault && n.dir != nil {
		n.dir.acl.Store(aclUnknown)
	}
}

// Removexattr removes an xattr, copying the node up.
func (fs *FS) Removexattr(c Caller, n *Node, attr string) error {
	if err := fs.writable(); err != nil {
		return err
	}
	if err := fs.unguarded(n, isImmutable|isAppend); err != nil {
		return err
	}
	if fs.noACL(n, attr) {
		return syscall.EOPNOTSUPP
	}
	if fs.hides(attr) {
		return syscall.EPERM
	}
	disk, err := fs.names.toDisk(attr)
	if err != nil {
		return err
	}
	if attr == xattrACLDefault && !n.isDir() {
		return nil // there is none, and that is what is asked for
	}
	if !n.has(inUpper) {
		// Nothing is copied up for an xattr that is not there.
		if _, err := fs.Getxattr(n, attr, nil); err != nil {
			return err
		}
	}
	if err := fs.copyUp(c.PID, n, copyMeta); err != nil {
		return err
	}
	n.change.Lock()
	defer n.change.Unlock()
	var p place
	if err := fs.locate(n, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	if err := sys.RemovexattrBare(p.fd, p.name, disk); err != nil {
		return err
	}
	fs.attrSet(n, attr)
	return nil
}

// hasDefaultACL tells whether what is made in dir, which is in the upper, gets
// its mode from an ACL. up is dir's descriptor.
func (fs *FS) hasDefaultACL(dir *Node, up int) bool {
	if a := dir.dir.acl.Load(); a != aclUnknown {
		return a == aclDefault
	}
	_, err := sys.GetxattrBare(up, "", xattrACLDefault, nil)
	if err == nil {
		dir.dir.acl.Store(aclDefault)
		return true
	}
	dir.dir.acl.Store(aclNone)
	return false
}
