package metadata

import (
	"fmt"
	"iter"

	"github.com/containerd/errdefs"
)

// ID is a thin device's number in its pool, of 24 bits.
type ID uint32

// MaxID is the highest number of a thin device.
const MaxID ID = 1<<24 - 1

// The sizes of values: struct disk_device_details, and two kinds of __le64.
const (
	detailsSize = 24
	rootSize    = 8
	mappingSize = 8
)

// Device is what a pool records of a thin device, beside its mappings. Its size is
// in its table alone.
type Device struct {
	ID          ID
	Mapped      uint64 // data blocks, shared ones too
	Transaction uint64 // of the pool when it was made
	Created     uint32 // the pool's Time then
	Snapshotted uint32 // the pool's Time when it was last the origin of a snapshot, or made as one
}

// Run is a run of virtual blocks that are mapped to as many data blocks, one after
// the other, and were so at the same time.
type Run struct {
	Virtual uint64 // the first
	Data    uint64 // the first
	Length  uint64
	Time    uint32
}

func (p *Pool) tree(root uint64, valueSize int) *tree {
	return &tree{store: &p.blocks, root: root, valueSize: valueSize}
}

// Devices lists the thin devices in the order of their IDs. An error ends the
// sequence.
func (p *Pool) Devices() iter.Seq2[Device, error] {
	return func(yield func(Device, error) bool) {
		err := p.tree(p.sb.DetailsRoot, detailsSize).each(func(key uint64, value []byte) (bool, error) {
			if key > uint64(MaxID) {
				return false, corrupt(p.sb.DetailsRoot, "is the root of details of a device %d", key)
			}
			return yield(device(ID(key), value), nil), nil
		})
		if err != nil {
			yield(Device{}, err)
		}
	}
}

// Device returns one device's record.
func (p *Pool) Device(id ID) (Device, error) {
	v, err := p.tree(p.sb.DetailsRoot, detailsSize).lookup(uint64(id))
	if err == nil && v == nil {
		err = noDevice(id)
	}
	if err != nil {
		return Device{}, err
	}
	return device(id, v), nil
}

func device(id ID, v []byte) Device {
	return Device{ID: id, Mapped: le.Uint64(v), Transaction: le.Uint64(v[8:]), Created: le.Uint32(v[16:]), Snapshotted: le.Uint32(v[20:])}
}

func noDevice(id ID) error {
	return fmt.Errorf("thin metadata: no thin device %d: %w", id, errdefs.ErrNotFound)
}

// mappings is the tree of one device.
func (p *Pool) mappings(id ID) (*tree, error) {
	v, err := p.tree(p.sb.MappingRoot, rootSize).lookup(uint64(id))
	if err == nil && v == nil {
		err = noDevice(id)
	}
	if err != nil {
		return nil, err
	}
	return p.tree(le.Uint64(v), mappingSize), nil
}

// mapping takes the value of a mapping apart.
func (p *Pool) mapping(value []byte) (data uint64, time uint32, err error) {
	v := le.Uint64(value)
	data, time = v>>24, uint32(v&(1<<24-1))
	if data >= p.dataBlocks {
		return 0, 0, fmt.Errorf("thin metadata: a mapping to data block %d of %d: %w", data, p.dataBlocks, errdefs.ErrDataLoss)
	}
	return data, time, nil
}

// Mappings lists what a device has mapped, in the order of virtual blocks. An error
// ends the sequence.
func (p *Pool) Mappings(id ID) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		if err := p.eachRun(id, func(r Run) bool { return yield(r, nil) }); err != nil {
			yield(Run{}, fmt.Errorf("device %d: %w", id, err))
		}
	}
}

func (p *Pool) eachRun(id ID, yield func(Run) bool) error {
	t, err := p.mappings(id)
	if err != nil {
		return err
	}
	var run Run
	more := true
	err = t.each(func(key uint64, value []byte) (bool, error) {
		data, time, err := p.mapping(value)
		if err != nil {
			return false, err
		}
		if run.Length > 0 && key == run.Virtual+run.Length && data == run.Data+run.Length && time == run.Time {
			run.Length++
			return true, nil
		}
		more = run.Length == 0 || yield(run)
		run = Run{Virtual: key, Data: data, Length: 1, Time: time}
		return more, nil
	})
	if err == nil && more && run.Length > 0 {
		yield(run)
	}
	return err
}
