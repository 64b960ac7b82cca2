package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// guarded tells which of isImmutable and isAppend hold for n: those that the inode
// in a layer has itself, known since it was looked up, and for the upper those in
// xattr protattr, since an upper that had them itself could be neither renamed nor
// marked. That is read when a change first asks, not at each lookup. n is not
// locked.
func (fs *FS) guarded(n *Node) (uint32, error) {
	if !n.has(guardsKnown) {
		n.change.Lock()
		defer n.change.Unlock()
		if err := fs.readGuards(n); err != nil {
			return 0, err
		}
	}
	return n.guards(), nil
}

func (n *Node) guards() uint32 { return n.flags.Load() & (isImmutable | isAppend) }

// readGuards reads them, where they are not known; n.change is held.
func (fs *FS) readGuards(n *Node) error {
	if n.has(guardsKnown) {
		return nil
	}
	var p place
	err := fs.locate(n, &p)
	if err == syscall.ESTALE || err == syscall.ENOENT {
		return nil // it has no name: what it is asked for says that
	}
	if err != nil {
		return err
	}
	defer fs.leave(&p)
	if n.isDir() {
		p.name = "" // asks for no search permission
	}
	n.set(fs.keptGuards(p.fd, p.name, n.typ) | guardsKnown)
	return nil
}

// ownGuards are those that an inode of a layer has itself.
func ownGuards(st *sys.Stat) (guards uint32) {
	if st.Attributes&sys.STATX_ATTR_IMMUTABLE != 0 {
		guards |= isImmutable
	}
	if st.Attributes&sys.STATX_ATTR_APPEND != 0 {
		guards |= isAppend
	}
	return guards
}

// keptGuards are those in the xattr of name below dir, in the upper. One that is
// not valid is said, and counts for nothing, as the kernel has it.
func (fs *FS) keptGuards(dir int, name string, typ uint32) (guards uint32) {
	if typ != sys.S_IFREG && typ != sys.S_IFDIR {
		return 0
	}
	var b [protattrMax]byte
	size, err := sys.GetxattrBare(dir, name, fs.names.protattr, b[:])
	if err != nil {
		return 0 // no such xattr, or none at all
	}
	appendOnly, immutable, err := fs.names.parseProtattr(b[:size])
	if err != nil {
		fs.say("%q: %v", name, err)
		return 0
	}
	if appendOnly {
		guards |= isAppend
	}
	if immutable {
		guards |= isImmutable
	}
	return guards
}

// unguarded is EPERM where one of the given flags holds for n: isImmutable,
// isAppend.
func (fs *FS) unguarded(n *Node, flags uint32) error {
	if n == nil {
		return nil
	}
	got, err := fs.guarded(n)
	if err == nil && got&flags != 0 {
		err = syscall.EPERM
	}
	return err
}

// mayOpen is what the VFS asks of an inode with these flags when it is opened.
func (fs *FS) mayOpen(n *Node, flags uint32) error {
	trunc := flags&syscall.O_TRUNC != 0
	if !trunc && flags&syscall.O_ACCMODE == syscall.O_RDONLY {
		return nil
	}
	refused := isImmutable
	if trunc || flags&syscall.O_APPEND == 0 {
		refused |= isAppend
	}
	return fs.unguarded(n, refused)
}

// maySetattr is what the VFS asks of such an inode when its attributes are
// changed. One that was open before it became immutable is still truncated.
func (fs *FS) maySetattr(n *Node, f *File, s *SetAttr) error {
	var refused uint32
	if s.Valid&SetSize != 0 {
		refused |= isAppend
	}
	if f == nil && s.Valid != 0 {
		refused |= isImmutable
		if s.Valid&(SetMode|SetUID|SetGID) != 0 || s.setsTimes() {
			refused |= isAppend
		}
	}
	if refused == 0 {
		return nil
	}
	return fs.unguarded(n, refused)
}

// setsTimes tells whether a time is set to something else than the present.
func (s *SetAttr) setsTimes() bool {
	return s.Valid&SetAtime != 0 && s.Atime != sys.TimeNow || s.Valid&SetMtime != 0 && s.Mtime != sys.TimeNow
}

// setGuards keeps inode flags in xattr protattr; n is in the upper and
// n.change held.
func (fs *FS) setGuards(n *Node, appendOnly, immutable bool) error {
	if err := fs.readGuards(n); err != nil {
		return err
	}
	var guards uint32
	var prot []byte
	if appendOnly {
		guards |= isAppend
		prot = append(prot, 'a')
	}
	if immutable {
		guards |= isImmutable
		prot = append(prot, 'i')
	}
	if n.guards() == guards && n.has(guardsKnown) {
		return nil
	}
	var p place
	if err := fs.locate(n, &p); err != nil {
		return err
	}
	defer fs.leave(&p)
	if len(prot) == 0 {
		err := sys.RemovexattrBare(p.fd, p.name, fs.names.protattr)
		if err != nil && err != syscall.ENODATA {
			return err
		}
	} else if err := sys.SetxattrBare(p.fd, p.name, fs.names.protattr, prot, 0); err != nil {
		return err
	}
	n.clear((isAppend | isImmutable) &^ guards)
	n.set(guards | guardsKnown)
	return nil
}
