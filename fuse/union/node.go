package union

import (
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Node is an inode: a file or directory of the union, whatever layer it is in.
//
// There is one for each real inode: that of the upper, where there is one, else
// that of the lower. Names of a lower inode with several links have a node each
// while a copy-up would part them (without Config.Index, and with an upper), as
// the kernel has it.
type Node struct {
	id     uint64
	ino    atomic.Uint64 // as shown
	change sync.Mutex
	mu     sync.Mutex
	flags  atomic.Uint32
	opens  atomic.Int32 // open Files
	typ    uint32       // S_IFMT

	generation uint32 // see Generation; does not change

	// Under FS.table.
	refs  uint64 // what Forget gives back
	holds int32  // children in memory, open files, calls under way
	key   uint8  // which map the node is in

	// Under mu.
	parent *Node  // a directory's; of another node that of one of its names
	name   string // in parent
	upIno  uint64 // real inode in the upper; 0: none
	low    realPos
	lowIno uint64
	lowFS  uint32

	dir  *dirState  // directories
	more *fileState // what few other nodes have
}

// Bits of Node.flags.
const (
	inUpper     uint32 = 1 << iota // has a part in the upper, and so for ever
	isMetacopy                     // the upper has no data: they are in a lower
	isDead                         // the last name is gone
	isImpure                       // upper directory with copied-up objects in it
	noName                         // in the upper, and no name of it is known, only a descriptor
	lowLinked                      // the lower file has several links
	isOpaque                       // upper directory that hides what is below
	isSpare                        // lost its known name while nobody had it open, and is counted in FS.spares
	isIndexed                      // in the upper, and reached by its entry in index
	guardsKnown                    // the two that follow are
	isImmutable
	isAppend
	xWhiteouts // upper directory in which files with xattr whiteout are whiteouts
	byHandle   // came back by its number, and is found by that alone: no parent, no name
)

// Values of Node.key.
const (
	keyNone uint8 = iota
	keyReal
	keyName
)

// dirState is what directories have more.
type dirState struct {
	up      dirHandle
	lowers  []*realDir    // merged, nearest first; does not change
	copied  atomic.Uint32 // counts copy-ups of what is in it
	changed atomic.Uint32 // counts changes of its names in the upper
	looks   atomic.Uint32 // counts looks into the lowers
	index   atomic.Pointer[lowerIndex]
	busy    bool                                // names are being taken away; under FS.table
	acl     atomic.Uint32                       // a default ACL in the upper: one of the acl constants
	beside  atomic.Pointer[map[string]struct{}] // what files .wh.NAME in the upper hide; nil: not looked

	mu       sync.Mutex
	redirect string // in the upper, as on disk
	miss     string // the last name that no lower was found to have; they never will
}

const (
	aclUnknown uint32 = iota
	aclNone
	aclDefault
)

// fileState is what few files have.
type fileState struct {
	fd       int     // O_PATH of a file in the upper without a known name; -1
	redirect string  // in the upper, as on disk
	data     realPos // where a metacopy file's data are
	dataSt   dataInfo
	last     Attr      // of a file whose last name is gone, and that nobody had open
	alts     []altName // further names in the upper
	index    indexed
}

// altName is another name of a file with several links in the upper.
type altName struct {
	parent *Node // held
	name   string
}

type dataInfo struct {
	blocks int64
	lazy   string // the redirect into the data-only layers, not looked up yet
}

// ID names the node: the root is 1. It is not used again while the FS is open.
func (n *Node) ID() uint64 { return n.id }

func (n *Node) has(flag uint32) bool { return n.flags.Load()&flag != 0 }
func (n *Node) set(flag uint32)      { n.flags.Or(flag) }
func (n *Node) clear(flag uint32)    { n.flags.And(^flag) }
func (n *Node) isDir() bool          { return n.typ == sys.S_IFDIR }

// merged tells whether more than one real directory is behind a directory.
func (n *Node) merged() bool {
	real := len(n.dir.lowers)
	if n.has(inUpper) {
		real++
	}
	return real > 1
}

// extra returns n.more; n.mu is held.
func (n *Node) extra() *fileState {
	if n.more == nil {
		n.more = &fileState{fd: -1}
	}
	return n.more
}

// place is where the real object behind a node can be had: name below fd, or fd
// itself. It must be given back.
type place struct {
	fd    int
	name  string
	dir   *dirFd
	upper bool
	ino   uint64 // what must be there
}

func (fs *FS) leave(p *place) { fs.dirs.done(p.dir); p.dir = nil }

// locate finds the object that shows a node's attributes. That a name is still
// the node's is certain only under Node.change, or when p.ino was compared.
func (fs *FS) locate(n *Node, p *place) (err error) {
	n.mu.Lock()
	parent, name, low, more := n.parent, n.name, n.low, n.more
	p.ino = n.upIno
	n.mu.Unlock()
	p.upper = n.has(inUpper)
	switch {
	case n.isDir() && p.upper:
		p.dir, err = fs.upperDir(n)
		p.name = "."
	case n.isDir():
		p.dir, err = fs.real(n.dir.lowers[0])
		p.name = "."
		p.ino = n.dir.lowers[0].ino
	case !p.upper && n.has(byHandle):
		p.ino = n.lowIno
		return fs.openByHandle(n, p)
	case !p.upper:
		p.dir, err = fs.real(low.dir)
		p.name = low.name
		p.ino = n.lowIno
	case n.has(noName | isDead):
		if more == nil || more.fd < 0 {
			return syscall.ESTALE
		}
		p.fd, p.name = more.fd, ""
		return nil
	case n.has(isIndexed):
		p.fd, p.name = fs.upper.index.Int(), more.index.name
		return nil
	case n.has(byHandle):
		return fs.openByHandle(n, p)
	default:
		p.dir, err = fs.upperDir(parent)
		p.name = name
	}
	if err != nil {
		return err
	}
	p.fd = p.dir.fd
	return nil
}

// shownBy is the layer that p is in.
func (fs *FS) shownBy(n *Node, p *place) *layer {
	if p.upper {
		return fs.layers[0]
	}
	return fs.layerOf(n)
}

// stat describes the real object behind a node. A rename at the same time may
// take the name away, so it is tried again.
func (fs *FS) stat(n *Node, st *sys.Stat) error {
	for try := 0; ; try++ {
		var p place
		err := fs.locate(n, &p)
		if err == nil {
			if n.isDir() {
				p.name = "" // asks for no search permission
			}
			err = fs.shownBy(n, &p).stat(p.fd, p.name, st)
			fs.leave(&p)
			if err == nil && st.Ino == p.ino {
				return nil
			}
		}
		if try == 2 {
			n.change.Lock()
			defer n.change.Unlock()
		}
		if try > 2 {
			if err == nil || err == syscall.ENOENT {
				err = syscall.ESTALE
			}
			return err
		}
	}
}
