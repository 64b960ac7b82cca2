package union

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// handleTable gives objects of the union numbers that last (Config.NFSExport): a
// file handle of a FUSE mount is a nodeid and a generation, and the kernel asks for
// the object by the nodeid alone when it has forgotten it. A number is the place of
// a record in workdir/handles, which has the object's own file handle below.
//
// A number and a generation together are never given to two objects: a record's
// generation is the table's incarnation when it was written, and a place that has
// become free is used again in a later incarnation only, which is on disk before
// (begin). What a power cut loses or brings back of single records therefore makes
// handles stale, never wrong. A table that is made anew begins with a random one.
type handleTable struct {
	mu          sync.Mutex // held over reads and writes of file, which the kernel caches
	file        *sys.Fd
	volatile    bool
	incarnation uint32
	checked     uint32            // records that there were when all were last looked after
	layers      [16]byte          // digest of the layers that the records are about
	next        uint32            // the place behind the last one
	places      map[uint64]uint32 // hash of a record's key to its place
	free        []uint32          // places that may be used
	freed       []uint32          // places that may be in the next incarnation
	seed        maphash.Seed
	dirty       atomic.Bool
}

// handlesName is the table's, below workdir.
const handlesName = "handles"

// The table is an array of recordSize bytes each: the header, one that is not used
// (there is no node 0 to number, and node 1 is the root), and the records.
const (
	recordSize  = 64
	firstPlace  = 2
	recordKey   = 8 // where the part begins that names the object
	recordSpace = recordSize - recordKey - 19
	headerMagic = "LFHNDL01"

	// firstUnlasting is the first ID of nodes that have no record.
	firstUnlasting = 1 << 46
	// fewHandles: of fewer records none is looked after.
	fewHandles = 1 << 14
	// fewFreed: for no more free places a new incarnation is begun.
	fewFreed = 1 << 10
)

// record is one: checksum of the rest 4, generation 4, UUID of the file system 16,
// flags 1, and the handle below: type 1, length 1, data. All 0: free.
type record [recordSize]byte

var crcTable = crc32.MakeTable(crc32.Castagnoli)

func newRecord(id *fileID) (r record, ok bool) {
	if id.handle.Len == 0 || id.handle.Len > recordSpace {
		return r, false
	}
	copy(r[8:], id.uuid[:])
	if id.inUpper {
		r[24] = fbUpper
	}
	r[25], r[26] = byte(id.handle.Type), byte(id.handle.Len)
	copy(r[27:], id.handle.Data[:id.handle.Len])
	return r, true
}

func (r *record) seal(generation uint32) {
	binary.LittleEndian.PutUint32(r[4:], generation)
	binary.LittleEndian.PutUint32(r[:], crc32.Checksum(r[4:], crcTable))
}

func (r *record) generation() uint32 { return binary.LittleEndian.Uint32(r[4:]) }

// parse returns what the record is of; false for a free one, or a damaged one.
func (r *record) parse(id *fileID) bool {
	n := int(r[26])
	if n == 0 || n > recordSpace || binary.LittleEndian.Uint32(r[:]) != crc32.Checksum(r[4:], crcTable) {
		return false
	}
	*id = fileID{inUpper: r[24]&fbUpper != 0}
	copy(id.uuid[:], r[8:])
	id.handle.Type, id.handle.Len = int32(r[25]), n
	copy(id.handle.Data[:], r[27:27+n])
	return true
}

// openHandles opens the table of workdir, or makes it; nil: one in memory. One that is
// of other layers is begun anew. alive tells whether an object is still there.
func openHandles(workdir *sys.Fd, layers [16]byte, volatile bool, alive func(*fileID) bool) (*handleTable, error) {
	var fd *sys.Fd
	var err error
	if workdir != nil {
		fd, err = workdir.Openat(handlesName, sys.O_RDWR|sys.O_CREAT|sys.O_NOFOLLOW, 0o600)
	} else {
		fd, err = sys.MemFile(handlesName)
		volatile = true
	}
	if err != nil {
		return nil, err
	}
	t := &handleTable{file: fd, volatile: volatile, layers: layers, seed: maphash.MakeSeed()}
	err = t.load()
	if err == nil && len(t.places) >= max(fewHandles, 2*int(t.checked)) {
		err = t.lookAfter(alive)
	}
	if err == nil {
		err = t.begin()
	}
	if err == nil && !volatile {
		err = workdir.Sync()
	}
	if err != nil {
		fd.Close()
		return nil, fmt.Errorf("%s: %w", fd.Name(), err)
	}
	return t, nil
}

// load reads the header and all records.
func (t *handleTable) load() error {
	t.next, t.places = firstPlace, map[uint64]uint32{}
	var head record
	n, err := t.file.ReadAt(head[:], 0)
	if err != nil && err != io.EOF {
		return err
	}
	if n < recordSize || string(head[8:16]) != headerMagic || binary.LittleEndian.Uint32(head[:]) != crc32.Checksum(head[4:], crcTable) {
		t.incarnation = rand.Uint32()
		return t.file.Truncate(0)
	}
	t.incarnation = head.generation()
	t.checked = binary.LittleEndian.Uint32(head[16:])
	if !bytes.Equal(head[32:48], t.layers[:]) {
		t.checked = 0
		return t.file.Truncate(recordSize)
	}
	return t.loadRecords()
}

func (t *handleTable) loadRecords() error {
	b := make([]byte, 4096*recordSize)
	for off := int64(firstPlace * recordSize); ; {
		n, err := t.file.ReadAt(b, off)
		if err != nil && err != io.EOF {
			return err
		}
		for i := 0; i+recordSize <= n; i += recordSize {
			t.loadRecord((*record)(b[i:]))
		}
		if n < len(b) {
			return nil
		}
		off += int64(n)
	}
}

// loadRecord takes the next one into account. Of two of one object, which a crash
// may leave, the first counts.
func (t *handleTable) loadRecord(r *record) {
	place := t.next
	t.next++
	var id fileID
	h := t.hash(r)
	if _, twice := t.places[h]; twice || !r.parse(&id) {
		t.free = append(t.free, place)
		return
	}
	t.places[h] = place
}

// lookAfter frees the places of what is gone: removed behind this table's back, or
// just before a crash.
func (t *handleTable) lookAfter(alive func(*fileID) bool) error {
	for h, place := range t.places {
		var r record
		var id fileID
		if err := t.read(place, &r); err != nil {
			return err
		}
		if r.parse(&id) && alive(&id) {
			continue
		}
		if err := t.write(place, &record{}); err != nil {
			return err
		}
		delete(t.places, h)
		t.free = append(t.free, place)
	}
	t.checked = uint32(len(t.places))
	return nil
}

// begin begins the next incarnation, in which all that is free may be used.
func (t *handleTable) begin() error {
	var head record
	copy(head[8:], headerMagic)
	binary.LittleEndian.PutUint32(head[16:], t.checked)
	copy(head[32:48], t.layers[:])
	head.seal(t.incarnation + 1)
	if err := t.write(0, &head); err != nil {
		return err
	}
	if !t.volatile {
		if err := t.file.Sync(); err != nil {
			return err
		}
	}
	t.incarnation++
	t.free = append(t.free, t.freed...)
	t.freed = nil
	return nil
}

func (t *handleTable) hash(r *record) uint64 { return maphash.Bytes(t.seed, r[recordKey:]) }

func (t *handleTable) read(place uint32, r *record) error {
	n, err := sys.PreadBare(t.file.Int(), r[:], int64(place)*recordSize)
	if err == nil && n < recordSize {
		err = syscall.ESTALE
	}
	return err
}

func (t *handleTable) write(place uint32, r *record) error {
	n, err := sys.PwriteBare(t.file.Int(), r[:], int64(place)*recordSize)
	if err == nil && n < recordSize {
		err = syscall.ENOSPC
	}
	t.dirty.Store(true)
	return err
}

// number gives the number and the generation of an object; 0 where it gets none.
func (t *handleTable) number(id *fileID) (number uint64, generation uint32, err error) {
	r, ok := newRecord(id)
	if !ok {
		return 0, 0, syscall.EOVERFLOW
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.hash(&r)
	if place, ok := t.places[h]; ok {
		var have record
		if err := t.read(place, &have); err != nil {
			return 0, 0, err
		}
		if !bytes.Equal(have[recordKey:], r[recordKey:]) {
			return 0, 0, nil // two objects of one hash
		}
		return uint64(place), have.generation(), nil
	}
	place, err := t.take()
	if err != nil {
		return 0, 0, err
	}
	r.seal(t.incarnation)
	if err := t.write(place, &r); err != nil {
		t.freed = append(t.freed, place)
		return 0, 0, err
	}
	t.places[h] = place
	return uint64(place), t.incarnation, nil
}

// take returns a place to use. A new incarnation is begun, which costs a flush, when
// half of the places wait for it.
func (t *handleTable) take() (uint32, error) {
	if len(t.free) == 0 && len(t.freed) > max(fewFreed, len(t.places)) {
		if err := t.begin(); err != nil {
			return 0, err
		}
	}
	if n := len(t.free); n > 0 {
		place := t.free[n-1]
		t.free = t.free[:n-1]
		return place, nil
	}
	if t.next == ^uint32(0) {
		return 0, syscall.ENOSPC
	}
	t.next++
	return t.next - 1, nil
}

// object says what has a number, and its generation; ESTALE where nothing has.
func (t *handleTable) object(number uint64, id *fileID) (generation uint32, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if number < firstPlace || number >= uint64(t.next) {
		return 0, syscall.ESTALE
	}
	var r record
	if err := t.read(uint32(number), &r); err != nil {
		return 0, err
	}
	if !r.parse(id) {
		return 0, syscall.ESTALE
	}
	return r.generation(), nil
}

// drop forgets an object that is gone, and in memory no more.
func (t *handleTable) drop(number uint64) {
	if number < firstPlace || number >= firstUnlasting {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	place := uint32(number)
	var r record
	if t.read(place, &r) != nil {
		return
	}
	h := t.hash(&r)
	if at, ok := t.places[h]; !ok || at != place || t.write(place, &record{}) != nil {
		return
	}
	delete(t.places, h)
	t.freed = append(t.freed, place)
}

// sync makes handles that were given out as lasting as the files are that a caller
// flushes.
func (t *handleTable) sync() error {
	if t == nil || t.volatile || !t.dirty.Swap(false) {
		return nil
	}
	return sys.FsyncBare(t.file.Int(), true)
}

func (t *handleTable) close() error { return t.file.Close() }
