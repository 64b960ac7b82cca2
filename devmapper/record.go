package devmapper

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
)

// tempDir is a name of a root, see the package doc.
const tempDir = "tmp"

// kind is what a layer is.
type kind string

const (
	writable  kind = "writable"
	view      kind = "view"
	committed kind = "committed"
)

// record is a layer's, in l/ID. One that cannot be read is ErrDataLoss to all but
// IDs and Remove.
type record struct {
	Kind    kind   `json:"kind"`
	Thin    uint32 `json:"thin"`             // device id in the pool
	Shared  bool   `json:"shared,omitempty"` // a view: the device is its parent's, or the template's
	Sectors uint64 `json:"sectors"`
	FS      string `json:"fs"`
	UUID    string `json:"uuid"`
	// Tx is the pool's transaction that the device was made in: a pool that has not
	// come so far is not the one that this record is about.
	Tx      uint64         `json:"tx,omitempty"`
	Parents []string       `json:"parents,omitempty"` // as Create was told, nearest first
	IDMap   *drivers.IDMap `json:"idmap,omitempty"`
	Usage   *drivers.Usage `json:"usage,omitempty"` // of a committed layer

	fs    *fileSystem // of that name, once known
	grown bool        // of a layer being made: its device is larger than its parent's
}

// known finds what is particular to the layer's file system.
func (r *record) known() (err error) {
	r.fs, err = knownFS(r.FS)
	return err
}

// layer reads a layer's record.
func (d *driver) layer(id drivers.ID) (*record, error) {
	r, err := d.read(roots.Layers, id)
	if err == nil {
		err = r.known()
	}
	if err != nil {
		return nil, err
	}
	if !r.Shared {
		if err := d.checkTransaction(r.Tx); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (d *driver) read(name string, id drivers.ID) (*record, error) {
	dir, err := d.open(name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var r record
	if err := thin.ReadJSON(dir, id.String(), &r); err != nil {
		return nil, err
	}
	return &r, nil
}

func (d *driver) write(name string, id drivers.ID, r *record) error {
	dir, err := d.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return thin.WriteJSON(dir, id.String(), r)
}

// checkTransaction refuses a record that the pool is older than.
func (d *driver) checkTransaction(tx uint64) error {
	if tx <= d.tx.Load() {
		return nil
	}
	s, err := d.pool.Status()
	if err != nil {
		return err
	}
	if tx > s.Transaction {
		return fmt.Errorf("was made in transaction %d of the pool, which is at %d: its metadata is older than the layer (restored, or repaired): %w",
			tx, s.Transaction, errdefs.ErrDataLoss)
	}
	d.reached(s.Transaction)
	return nil
}

// reached notes how far the pool is.
func (d *driver) reached(tx uint64) {
	for old := d.tx.Load(); old < tx && !d.tx.CompareAndSwap(old, tx); old = d.tx.Load() {
	}
}

func idStrings(ids []drivers.ID) []string {
	var ss []string
	for _, id := range ids {
		ss = append(ss, id.String())
	}
	return ss
}

// sameParents refuses a commit onto other parents than the device was made of.
func (r *record) sameParents(ids []drivers.ID) error {
	if got := idStrings(ids); !slices.Equal(got, r.Parents) {
		return fmt.Errorf("made on %v, committed on %v: a snapshot has its parents for good: %w", r.Parents, got, errdefs.ErrInvalidArgument)
	}
	return nil
}

// volume is the device that shows a layer.
func (d *driver) volume(id drivers.ID, r *record) thin.Volume {
	return thin.Volume{Name: d.deviceName(id, r.Thin), ID: r.Thin, Sectors: r.Sectors, ReadOnly: r.Kind != writable}
}

// deviceName is layerctl-MAJ.MIN-INO-ID.THIN.
func (d *driver) deviceName(id drivers.ID, thinID uint32) string {
	return fmt.Sprintf("%s%s.%d", d.pool.Prefix(), id, thinID)
}

// layerOf is the inverse of deviceName; false for private devices.
func (d *driver) layerOf(device string) (drivers.ID, bool) {
	rest, ok := strings.CutPrefix(device, d.pool.Prefix())
	if !ok {
		return 0, false
	}
	name, thinID, ok := strings.Cut(rest, ".")
	if !ok {
		return 0, false
	}
	if _, err := strconv.ParseUint(thinID, 10, 24); err != nil {
		return 0, false
	}
	return drivers.ParseID(name)
}

// freeID returns the lowest id of the pool that stands nowhere.
func (d *driver) freeID(c *thin.Change) (uint32, error) {
	alone, err := c.Claim()
	if err != nil {
		return 0, err
	}
	if !alone {
		d.used = nil
	}
	if d.used == nil {
		if d.used, err = d.usedIDs(); err != nil {
			return 0, err
		}
	}
	for id := uint32(0); id <= thin.MaxID; id++ {
		if !d.used[id] {
			return id, nil
		}
	}
	return 0, fmt.Errorf("the pool has %d thin devices: %w", thin.MaxID+1, errdefs.ErrResourceExhausted)
}

// takeID calls make with free ids until one is free in the pool, too.
func (d *driver) takeID(c *thin.Change, make func(id uint32) error) error {
	const tries = 1000 // of ids that a pool of ours has and no record
	for range tries {
		id, err := d.freeID(c)
		if err != nil {
			return err
		}
		err = make(id)
		if err == nil || errdefs.IsAlreadyExists(err) {
			d.used[id] = true
		}
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
	}
	return fmt.Errorf("the pool has thin devices that no record names: is it another store's? %w", errdefs.ErrFailedPrecondition)
}

// records calls do with every record there is, in whatever state its layer; with the
// error of one that cannot be read. One that goes meanwhile is passed over. An error of
// do ends it.
func (d *driver) records(do func(drivers.ID, *record, error) error) error {
	for _, name := range roots.All {
		ids, err := roots.In(context.Background(), d.root, name)
		if err != nil {
			return err
		}
		for _, id := range ids {
			r, err := d.read(name, id)
			if errors.Is(err, syscall.ENOENT) {
				continue
			}
			if err := do(id, r, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// usedIDs are the ids that a record names, and those that the pool has: what has lost its
// record, or has one that cannot be read, is nobody's to take. It is called with the pool's lock.
func (d *driver) usedIDs() (map[uint32]bool, error) {
	used, err := d.templateThins()
	if err != nil {
		return nil, err
	}
	unreadable := ""
	err = d.records(func(id drivers.ID, r *record, err error) error {
		if errdefs.IsDataLoss(err) {
			unreadable = id.String()
			return nil
		}
		if err == nil {
			used[r.Thin] = true
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	temps, err := d.tempIDs()
	if err != nil {
		return nil, err
	}
	for _, id := range temps {
		used[id] = true
	}
	devices, ok, err := d.devicesNow()
	if err != nil {
		return nil, err
	}
	if !ok && unreadable != "" {
		return nil, fmt.Errorf("the record of layer %s cannot be read, nor the pool's metadata that has its thin device (it changes all the time?): %w", unreadable, errdefs.ErrUnavailable)
	}
	for _, dev := range devices { // without them takeID finds out
		used[uint32(dev.ID)] = true
	}
	return used, nil
}

// move renames a record from one of the root's directories to another. A cut may undo it.
func (d *driver) move(id drivers.ID, from, to string) error {
	src, err := d.open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := d.open(to)
	if err != nil {
		return err
	}
	defer dst.Close()
	return src.Rename(id.String(), dst, id.String(), sys.RENAME_NOREPLACE)
}

// sync has what was done to names in a root's directory on the disk.
func (d *driver) sync(name string) error {
	dir, err := d.open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
