package union

import (
	"fmt"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// layer is one directory that the union is made of. FS.layers has the upper
// first, when there is one, then the lowers, nearest first, then those that
// hold data alone.
type layer struct {
	path  string
	root  *realDir
	fd    *sys.Fd // of the root, for reading
	fsid  uint32  // which file system: 0 is the first layer's
	index int     // in FS.layers
	upper bool
	data  bool // holds data alone
	// stored is the xattr that keeps what files show as owner and mode; "": the
	// files themselves do.
	stored string
	uuid   [16]byte
}

// realDir is a directory of a lower. Lowers do not move, so that a descriptor
// that was closed is opened again by the names from the root down.
type realDir struct {
	layer  *layer
	parent *realDir // nil: the root
	name   string
	ino    uint64
	fd     dirHandle

	xwhiteouts bool // opaque="x": zero-size files with xattr whiteout are whiteouts here
}

// realPos is where something that is not a directory is in a lower.
type realPos struct {
	dir  *realDir
	name string
}

// realKey is the identity of a real inode.
type realKey struct {
	ino  uint64
	fsid uint32
}

// xinoBits is how many bits of a number the file system's own numbers have where
// several file systems are shown as one.
const xinoBits = 56

// setFsids numbers the layers' file systems.
func (fs *FS) setFsids() error {
	seen := map[uint64]uint32{}
	for _, l := range fs.layers {
		st, err := l.fd.Stat("")
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return fmt.Errorf("layer %s: %w", l.path, syscall.ENOTDIR)
		}
		id, ok := seen[st.Dev]
		if !ok {
			id = uint32(len(seen))
			seen[st.Dev] = id
		}
		l.fsid, l.root.ino = id, st.Ino
	}
	fs.manyFS = len(seen) > 1
	return nil
}

// ino is the number that the inode ino of a layer's file system is shown by: its
// own, where all layers are on one file system; else with the file system's
// number in the bits above. A number that has those bits itself gets one that
// nobody has, and keeps it while the FS is open.
func (fs *FS) ino(fsid uint32, ino uint64) uint64 {
	if !fs.manyFS {
		return ino
	}
	if ino>>xinoBits == 0 && fsid < 0xff {
		return uint64(fsid)<<xinoBits | ino
	}
	k := realKey{ino, fsid}
	fs.odd.Lock()
	defer fs.odd.Unlock()
	n, ok := fs.odd.number[k]
	if !ok {
		if fs.odd.number == nil {
			fs.odd.number = map[realKey]uint64{}
		}
		n = 0xff<<xinoBits | uint64(len(fs.odd.number)+1)
		fs.odd.number[k] = n
	}
	return n
}
