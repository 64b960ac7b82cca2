package union

import (
	"context"
	"fmt"
	"hash/maphash"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// FS is an open union. Its methods may be called by many goroutines at once.
// Errors wrap the syscall.Errno that the caller of the system call gets.
type FS struct {
	config  Config
	owners  owners
	layers  []*layer
	data    []*layer // of layers: those that have data alone
	upper   *upper   // nil: read-only
	names   *xattrNames
	root    *Node
	manyFS  bool // layers are on several file systems
	handles bool // files can be named by handles: origins are written, and looked up

	dataDirs  sync.Map // dataKey to *realDir
	roots     []originRoot
	ambiguous bool          // lowers on several file systems cannot be told apart by their UUIDs
	indexUps  atomic.Uint32 // counts copy-ups into index

	// How this process makes files.
	uid, gid uint32
	canSetID bool   // may make them as others
	readsAll bool   // no file of a layer refuses to be opened
	umask    uint32 // the process's
	hidesNew bool   // new directories in merged ones are made opaque

	// With NFSExport; see handles.go and recall.go.
	handleTable *handleTable
	recalls     sync.RWMutex
	generation  uint32 // of nodes whose IDs are this FS's alone

	renames sync.Mutex   // renames between directories, one at a time
	tree    sync.RWMutex // where directories are
	dirs    dirCache
	indexes indexes
	table   *table
	copies  map[nameKey]*Node       // being copied up; under table.mu
	builds  map[*Node]chan struct{} // whose data are being copied; under table.mu
	large   int64                   // from what size on files are built so: largeFile
	spares  atomic.Int32            // nodes with isSpare
	copyUps atomic.Uint64           // since Open
	seed    maphash.Seed            // of the cookies of directories

	odd struct {
		sync.Mutex
		number map[realKey]uint64
	}
	said sayer
}

// Open opens a union. ctx bounds the wait for an upper that is just being
// unmounted by another server (5 s at most).
func Open(ctx context.Context, c Config) (_ *FS, err error) {
	if len(c.Lowers) == 0 && c.Upper == "" {
		return nil, fmt.Errorf("union without layers: %w", syscall.EINVAL)
	}
	if c.Upper != "" && c.Work == "" {
		return nil, fmt.Errorf("union: upper %s without work: %w", c.Upper, syscall.EINVAL)
	}
	if c.NFSExport && c.Metacopy {
		return nil, fmt.Errorf("union: nfs_export=on with metacopy=on: %w", syscall.EINVAL) // as the kernel
	}
	if err := refuseStored(&c); err != nil {
		return nil, fmt.Errorf("union: %w", err)
	}
	c.NoACL = c.NoACL || c.Permissions != PermissionsInode // one is about the owner of the file itself
	asked := c.NFSExport
	fs := &FS{config: c, owners: newOwners(&c), table: newTable(), copies: map[nameKey]*Node{}, builds: map[*Node]chan struct{}{}, large: largeFile, seed: maphash.MakeSeed()}
	defer func() {
		if err != nil {
			fs.Close()
		}
	}()
	if err := fs.openLayers(ctx); err != nil {
		return nil, fmt.Errorf("union: %w", err)
	}
	fs.lookAtProcess()
	fs.dirs.max = c.MaxDirs
	if fs.dirs.max == 0 {
		fs.dirs.max = defaultDirs()
	}
	fs.hidesNew = c.Index || c.Metacopy || c.Xino || c.Redirect == RedirectOn
	if err := fs.openRoot(); err != nil {
		return nil, fmt.Errorf("union: %w", err)
	}
	if err := fs.openTable(asked); err != nil {
		return nil, fmt.Errorf("union: %w", err)
	}
	return fs, nil
}

func (fs *FS) openLayers(ctx context.Context) (err error) {
	c := &fs.config
	if err := refuseOverlap(c); err != nil {
		return err
	}
	if c.Upper != "" {
		if fs.upper, err = openUpper(ctx, c); err != nil {
			return err
		}
		fs.names = fs.upper.xattrs
		if fs.upper.can.whiteouts == whiteoutFile { // what is written is read
			c.AUFSWhiteouts = true
		}
		if err := fs.addLayer(c.Upper, true, false); err != nil {
			return err
		}
	} else {
		fs.names = c.Xattrs.forReading()
	}
	for _, p := range c.Lowers {
		if err := fs.addLayer(p, false, false); err != nil {
			return err
		}
	}
	for _, p := range c.DataLowers {
		if err := fs.addLayer(p, false, true); err != nil {
			return err
		}
	}
	if err := fs.setFsids(); err != nil {
		return err
	}
	if err := fs.findStored(); err != nil {
		return err
	}
	return fs.openIndex()
}

func (fs *FS) addLayer(path string, upper, data bool) error {
	fd, err := fs.openLayer(path, upper)
	if err != nil {
		return err
	}
	l := &layer{path: path, fd: fd, index: len(fs.layers), upper: upper, data: data}
	l.root = &realDir{layer: l}
	fs.layers = append(fs.layers, l)
	if data {
		fs.data = append(fs.data, l)
	}
	if l.uuid, err = fd.FSUUID(); err != nil {
		l.uuid = [16]byte{}
	}
	return nil
}

func (fs *FS) openLayer(path string, upper bool) (*sys.Fd, error) {
	if upper {
		return fs.upper.root.Dup()
	}
	return openLower(path)
}

// lookAtProcess finds out how files can be made.
func (fs *FS) lookAtProcess() {
	fs.uid, fs.gid = uint32(os.Geteuid()), uint32(os.Getegid())
	fs.canSetID = fs.uid == 0
	fs.readsAll = fs.canSetID && sys.InFirstUserNS()
	fs.umask = processUmask()
}

// processUmask reads the umask; changing it to see it would touch what others
// just make. 0777 where /proc does not say: then every mode is set afterwards.
func processUmask() uint32 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32); err == nil {
				return uint32(n)
			}
		}
	}
	return 0o777
}

func defaultDirs() int {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return 256
	}
	return int(max(16, min(r.Cur/4, 4096)))
}

// openRoot makes the root's node.
func (fs *FS) openRoot() error {
	n := &Node{typ: sys.S_IFDIR, dir: &dirState{}, refs: 1}
	opaque := false
	for _, l := range fs.layers {
		if l.data {
			continue
		}
		st, err := l.fd.Stat("")
		if err != nil {
			return err
		}
		var facts facts
		if err := fs.readFacts(l.fd.Int(), "", &facts); err != nil {
			return err
		}
		if l.upper {
			n.upIno = st.Ino
			n.set(inUpper | ownGuards(&st))
			if facts.impure {
				n.set(isImpure)
			}
			if facts.xwhiteouts {
				n.set(xWhiteouts)
			}
			continue
		}
		if opaque {
			continue
		}
		l.root.xwhiteouts = facts.xwhiteouts
		if len(n.dir.lowers) == 0 {
			n.lowIno, n.lowFS = st.Ino, l.fsid
		}
		n.dir.lowers = append(n.dir.lowers, l.root)
	}
	f := found{st: sys.Stat{Mode: sys.S_IFDIR, Ino: n.upIno}, lowers: n.dir.lowers, lowerIno: n.lowIno, lowFS: n.lowFS}
	n.ino.Store(fs.inoOf(&f))
	fs.root = n
	fs.table.add(n, false)
	return nil
}

// Close ends the FS. Open files and nodes are not usable afterwards.
func (fs *FS) Close() error {
	fs.dirs.close()
	var all []*Node
	fs.table.mu.Lock()
	for _, n := range fs.table.byID {
		all = append(all, n)
	}
	fs.table.byID = map[uint64]*Node{}
	fs.table.mu.Unlock()
	for _, n := range all {
		if n.more != nil && n.more.fd >= 0 {
			sys.CloseBare(n.more.fd)
			n.more.fd = -1
		}
	}
	for _, l := range fs.layers {
		l.fd.Close()
	}
	for _, r := range fs.roots {
		r.own.Close()
	}
	fs.roots = nil
	fs.layers = nil
	if fs.handleTable != nil {
		fs.handleTable.close()
		fs.handleTable = nil
	}
	if fs.upper != nil {
		u := fs.upper
		fs.upper = nil
		return u.close()
	}
	return nil
}

// Root returns the root directory, which needs no Forget.
func (fs *FS) Root() *Node { return fs.root }

// Syncfs flushes the upper's file system.
func (fs *FS) Syncfs() error {
	if fs.upper == nil || fs.config.Volatile {
		return nil
	}
	return fs.upper.work.SyncFS()
}

// step tells a test where a change stands.
func (fs *FS) step(name string) error {
	if fs.config.Step == nil {
		return nil
	}
	return fs.config.Step(name)
}

// sayer says each thing once.
type sayer struct {
	sync.Mutex
	done map[string]bool
}

// saidMax bounds what is remembered of what was said.
const saidMax = 1000

func (fs *FS) say(format string, args ...any) {
	if fs.config.Log == nil {
		return
	}
	line := fmt.Sprintf(format, args...)
	fs.said.Lock()
	again := fs.said.done[line]
	if !again {
		if fs.said.done == nil || len(fs.said.done) >= saidMax {
			fs.said.done = map[string]bool{}
		}
		fs.said.done[line] = true
	}
	fs.said.Unlock()
	if !again {
		fs.config.Log("%s", line)
	}
}
