package server

import (
	"sync"
	"sync/atomic"
)

// Passthrough says which files the kernel reads and writes in the file below,
// without us. It needs Linux 6.9 and CAP_SYS_ADMIN in the first user namespace.
type Passthrough int

// The policies. Uppers is the one to have: lowers are read through the page
// cache, where they stay over a copy-up, so that a descriptor opened before it
// reads what is written after it, as with the kernel's overlayfs.
const (
	PassthroughOff Passthrough = iota
	// PassthroughUppers: files that are in the upper.
	PassthroughUppers
	// PassthroughAll: lower files too. A copy-up then makes the file a new inode
	// for the kernel (with the same number); who had it open before goes on
	// reading the old data.
	PassthroughAll
	// PassthroughReadOnly: as All on a mount that nobody can write, where nothing
	// is ever copied up, and as Uppers on others.
	PassthroughReadOnly
)

// A nodeid of the wire is a node's ID, and above nodeShift how often the node
// has become a new inode for the kernel (PassthroughAll).
const (
	nodeShift = 48
	nodeMask  = 1<<nodeShift - 1
)

// nodeOpens is what the kernel has open of one nodeid.
type nodeOpens struct {
	mu      sync.Mutex // held while the files below are registered
	users   int        // of this struct; under openTable.mu
	cached  int        // opens that use the page cache
	through int        // opens in passthrough
	mapped  int        // of those, the ones that can be mapped for writing
	backing int32      // what they all go to, while through > 0
	upper   bool       // whether that is the upper's file
}

// openTable holds the nodeids that are open.
type openTable struct {
	mu     sync.Mutex
	nodes  map[uint64]*nodeOpens // by nodeid
	epochs map[uint64]uint64     // nodes that became new inodes: how often

	mapped   atomic.Int64 // opens that can be mapped for writing, of all nodes
	through  atomic.Int64 // nodes in passthrough
	switched atomic.Bool  // epochs is not empty
	refused  atomic.Bool  // the kernel takes no file below

	cachedOpens, throughOpens atomic.Uint64 // since the start
}

func (t *openTable) init() {
	t.nodes, t.epochs = map[uint64]*nodeOpens{}, map[uint64]uint64{}
}

// get returns a nodeid's state, locked; put gives it back.
func (t *openTable) get(nodeid uint64) *nodeOpens {
	t.mu.Lock()
	o := t.nodes[nodeid]
	if o == nil {
		o = &nodeOpens{}
		t.nodes[nodeid] = o
	}
	o.users++
	t.mu.Unlock()
	o.mu.Lock()
	return o
}

func (t *openTable) put(nodeid uint64, o *nodeOpens) {
	o.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.users--; o.users == 0 && o.cached == 0 && o.through == 0 {
		delete(t.nodes, nodeid)
	}
}

// mayBeMapped reports whether somebody can write the file behind our back.
func (t *openTable) mayBeMapped(nodeid uint64) bool {
	t.mu.Lock()
	o := t.nodes[nodeid]
	t.mu.Unlock()
	if o == nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mapped > 0
}

// nodeid is what the kernel calls a node that it asks for now.
func (t *openTable) nodeid(node uint64) uint64 {
	if !t.switched.Load() {
		return node
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return node | t.epochs[node]<<nodeShift
}

// nodeids is all that the kernel may call a node.
func (t *openTable) nodeids(node uint64) []uint64 {
	last := t.nodeid(node)
	var all []uint64
	for id := node; id <= last; id += 1 << nodeShift {
		all = append(all, id)
	}
	return all
}

// renew makes the node a new inode for the kernel from its next lookup on.
func (t *openTable) renew(nodeid uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if node := nodeid & nodeMask; t.epochs[node] == nodeid>>nodeShift { // else somebody has done it
		t.epochs[node]++
		t.switched.Store(true)
	}
}

// forget drops what is known of a node that is gone.
func (t *openTable) forget(node uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.epochs, node)
}
