package uniontest

import (
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/treegen"
)

// Verbs of the differential test beside treegen's. Those on open files name them
// by Op.Slot; a slot that is not open answers EBADF.
const (
	opUnion   treegen.Verb = "union" // attr: mount options; first in every list
	opLayer   treegen.Verb = "layer" // what was done so far is a lower; work goes on above
	opRemount treegen.Verb = "remount"
	opDrop    treegen.Verb = "dropcaches"

	opOpen     treegen.Verb = "open"      // path, mode: flags of open(2); a new file has 0640
	opClose    treegen.Verb = "close"     // slot
	opPread    treegen.Verb = "pread"     // slot, off, size
	opPwrite   treegen.Verb = "pwrite"    // slot, off, size, seed
	opFtrunc   treegen.Verb = "ftrunc"    // slot, size
	opFstat    treegen.Verb = "fstat"     // slot
	opFchmod   treegen.Verb = "fchmod"    // slot, mode
	opFsync    treegen.Verb = "fsync"     // slot
	opMmap     treegen.Verb = "mmap"      // slot, off, size, seed: written through a shared mapping
	opFalloc   treegen.Verb = "falloc"    // slot, mode: flags of fallocate(2), off, size
	opCopy     treegen.Verb = "copy"      // slot to slot major, off to off, size
	opTmpfile  treegen.Verb = "tmpfile"   // slot; path: its directory
	opLinkfd   treegen.Verb = "linkfd"    // slot gets the name path
	opReaddir  treegen.Verb = "readdir"   // path
	opRead     treegen.Verb = "read"      // path
	opXattrs   treegen.Verb = "xattrs"    // path
	opReadlink treegen.Verb = "readlink"  // path
	opNoRepl   treegen.Verb = "noreplace" // rename with RENAME_NOREPLACE
)

// unionVerbs are how often each is drawn, of a hundred.
var unionVerbs = []struct {
	verb   treegen.Verb
	weight int
}{
	{opOpen, 10}, {opClose, 4}, {opPread, 6}, {opPwrite, 9}, {opFtrunc, 3}, {opFstat, 4}, {opFchmod, 2}, {opFsync, 1},
	{opMmap, 4}, {opFalloc, 3}, {opCopy, 3}, {opTmpfile, 2}, {opLinkfd, 2},
	{opReaddir, 6}, {opRead, 6}, {opXattrs, 3}, {opReadlink, 1}, {opNoRepl, 3}, {opRemount, 2}, {opDrop, 1},
}

// unionOptions are the mount options that lists are drawn for.
var unionOptions = []string{
	"", "redirect_dir=on", "metacopy=on,redirect_dir=on", "index=on", "index=on,metacopy=on,redirect_dir=on", "xino=on",
}

const (
	slots     = 6
	layerOps  = 60  // operations of the lowest layer; those above have half
	unionOps  = 150 // operations in the mount
	mostLower = 3
)

var openFlags = []int{
	unix.O_RDONLY, unix.O_RDONLY, unix.O_RDWR, unix.O_RDWR, unix.O_WRONLY, unix.O_RDWR | unix.O_APPEND,
	unix.O_RDWR | unix.O_TRUNC, unix.O_RDWR | unix.O_CREAT, unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL,
}

// drawer draws lists.
type drawer struct {
	rand *rand.Rand
	gen  *treegen.Gen
}

// draw draws a whole list from a seed.
func draw(seed uint64, root bool) []treegen.Op {
	r := rand.New(rand.NewPCG(seed, 1))
	d := &drawer{rand: r, gen: treegen.New(r, treegen.Config{
		Root: root, Sockets: true, Depth: 3,
		Without: []treegen.Verb{treegen.Rewrite, treegen.Retouch},
	})}
	ops := []treegen.Op{{Verb: opUnion, Attr: unionOptions[seed%uint64(len(unionOptions))]}}
	for i := range 1 + r.IntN(mostLower) {
		ops = append(ops, d.gen.Ops(layerOps/(1+min(i, 1)))...)
		ops = append(ops, treegen.Op{Verb: opLayer})
	}
	for range unionOps {
		ops = append(ops, d.next())
	}
	return ops
}

// next draws one operation: half are treegen's.
func (d *drawer) next() treegen.Op {
	if d.rand.IntN(2) == 0 {
		return d.gen.Next()
	}
	at := d.rand.IntN(100)
	for _, v := range unionVerbs {
		if at -= v.weight; at < 0 {
			return d.fill(treegen.Op{Verb: v.verb})
		}
	}
	return d.gen.Next()
}

func (d *drawer) slot() uint32 { return uint32(d.rand.IntN(slots)) }

func (d *drawer) size() int64 {
	return []int64{0, 1, 100, 4096, 5000, 20_000}[d.rand.IntN(6)]
}

func (d *drawer) fill(o treegen.Op) treegen.Op {
	switch o.Verb {
	case opOpen:
		o.Slot, o.Path, o.Mode = d.slot(), d.gen.Path(true), uint32(openFlags[d.rand.IntN(len(openFlags))])
		if o.Mode&unix.O_CREAT != 0 {
			o.Path = d.gen.Fresh()
			d.gen.Note(treegen.Op{Verb: treegen.Create, Path: o.Path})
		}
	case opTmpfile:
		o.Slot, o.Path, o.Mode = d.slot(), d.gen.Dir(), 0o640
	case opLinkfd:
		o.Slot, o.Path = d.slot(), d.gen.Fresh()
		d.gen.Note(treegen.Op{Verb: treegen.Create, Path: o.Path})
	case opReaddir:
		o.Path = d.gen.Dir()
	case opRead, opXattrs, opReadlink:
		o.Path = d.gen.Path(false)
	case opNoRepl:
		o.Path, o.To = d.gen.Path(false), d.gen.Fresh()
		d.gen.Note(treegen.Op{Verb: treegen.Rename, Path: o.Path, To: o.To})
	case opRemount, opDrop:
	default:
		d.fillSlot(&o)
	}
	return o
}

// fillSlot fills the operations on an open file.
func (d *drawer) fillSlot(o *treegen.Op) {
	o.Slot = d.slot()
	switch o.Verb {
	case opPread, opPwrite, opMmap:
		o.Off, o.Size, o.Seed = int64(d.rand.IntN(12_000)), d.size(), uint64(d.rand.IntN(5))
	case opFtrunc:
		o.Size = int64(d.rand.IntN(12_000))
	case opFchmod:
		o.Mode = []uint32{0o600, 0o644, 0o755, 0o4755}[d.rand.IntN(4)]
	case opFalloc:
		o.Mode = []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE}[d.rand.IntN(4)]
		o.Off, o.Size = int64(d.rand.IntN(8000)), 1+d.size()
	case opCopy:
		o.Major, o.Off, o.Size = d.slot(), int64(d.rand.IntN(5000)), d.size()
	}
	if o.Verb == opPread {
		o.Seed = 0
	}
}
