package devmapper

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
)

// examination is an Examine at work.
type examination struct {
	o     drivers.ExamineOptions
	found []drivers.Finding
}

func (e *examination) add(f drivers.Finding) { e.found = append(e.found, f) }

func (e *examination) note(format string, args ...any) {
	if e.o.Note != nil {
		e.o.Note(fmt.Sprintf(format, args...))
	}
}

// Examine looks at the pool's state, at its metadata (by itself, and with thin_check where
// that is installed), at what the records and the pool say of each other, and at devices in
// the kernel that are nobody's, which Repair removes.
func (d *driver) Examine(ctx context.Context, o drivers.ExamineOptions) ([]drivers.Finding, error) {
	e := &examination{o: o}
	if err := d.examine(ctx, e); err != nil {
		return e.found, fmt.Errorf("devmapper: examine: %w", err)
	}
	return e.found, nil
}

func (d *driver) examine(ctx context.Context, e *examination) error {
	if err := d.pool.Explain(); err != nil {
		e.add(drivers.Finding{Fault: drivers.StorageState, Object: "pool", Detail: err.Error()})
	}
	whole, err := d.examineMetadata(ctx, e)
	if err != nil {
		return err
	}
	if err := d.thinCheck(ctx, e); err != nil {
		return err
	}
	if err := d.pool.Exclusive(ctx, func(*thin.Change) error { return d.compareRecords(e, whole) }); err != nil {
		return err
	}
	return d.examineDevices(ctx, e)
}

// examineMetadata reads the metadata as the last commit left it; while the pool is too
// busy for that, the trees under a metadata snapshot.
func (d *driver) examineMetadata(ctx context.Context, e *examination) (metadata.Report, error) {
	if err := d.pool.Flush(); err != nil {
		e.note("the pool does not write its metadata (%v): what is checked is what it wrote last", err)
	}
	report, steady, err := checkSteady(ctx, d.pool.MetadataPath())
	if err != nil {
		return report, err
	}
	if !steady {
		err := d.withMetadata(ctx, func(m *metadata.Pool) (err error) {
			report, err = m.Check(ctx)
			return err
		})
		if errdefs.IsUnavailable(err) {
			e.note("the pool's metadata was not checked: it changes all the time, and its metadata snapshot is another program's")
			return metadata.Report{}, nil
		}
		if err != nil {
			return report, err
		}
		e.note("the pool is too busy for its space maps to be checked: only its trees were")
	}
	e.report(report, d.pool.RepairWords(), d.pool.RebuildWords())
	return report, nil
}

// damaged adds what is wrong with the pool's metadata, if that is anything, with the
// commands that repair it.
func (e *examination) damaged(what, repair string) {
	if what != "" {
		e.add(drivers.Finding{Fault: drivers.StorageDamaged, Object: "pool metadata", Detail: what, Suggestion: repair})
	}
}

// report adds what Check of the metadata found; a leak is space that rebuilding alone gives back.
func (e *examination) report(r metadata.Report, repair, rebuild string) {
	for _, p := range r.Problems {
		e.damaged(p.Error(), repair)
	}
	for _, l := range r.Leaks {
		e.add(drivers.Finding{Fault: drivers.StorageLeaked, Object: "pool metadata",
			Detail:     l.Error() + " (a power cut while the kernel handed a discard on does that; nothing else is wrong with them)",
			Suggestion: "to have them back unmount the pool's layers, close every store on it, and " + rebuild})
	}
}

// checkSteady checks metadata that may be in use. What a superblock leads to stays until there
// is another one, so a check holds during which the superblock stayed; what it found
// must be found twice.
func checkSteady(ctx context.Context, path string) (r metadata.Report, steady bool, err error) {
	file, err := metadata.OpenFile(path)
	if err != nil {
		return r, false, err
	}
	defer file.Close()
	const tries = 6
	seen := false
	for range tries {
		m, openErr := metadata.Open(file)
		if openErr != nil { // damaged, or the kernel is writing it
			r = metadata.Report{Problems: []error{openErr}}
		} else if r, err = m.Check(ctx); err != nil {
			return r, false, err
		} else if now, err := metadata.Open(file); err != nil || now.Superblock() != m.Superblock() {
			continue
		}
		if len(r.Problems)+len(r.Leaks) == 0 || seen {
			return r, true, nil
		}
		seen = true
	}
	return r, false, nil
}

// compareRecords holds the records against the pool's devices. It is called with the pool's
// lock, so that no id changes hands.
func (d *driver) compareRecords(e *examination, whole metadata.Report) error {
	devices, ok, err := d.devicesNow()
	if err != nil {
		return err
	}
	if !ok {
		e.note("the pool's devices and the records were not compared: its metadata cannot be read, or changes all the time")
		return nil
	}
	owners, unreadable, err := d.owners(e, devices, whole)
	if err != nil {
		return err
	}
	for _, dev := range devices {
		id := uint32(dev.ID)
		if len(owners[id]) > 1 {
			slices.Sort(owners[id])
			e.add(drivers.Finding{Fault: drivers.StorageDamaged, Object: fmt.Sprintf("thin device %d", id), Detail: fmt.Sprintf("is that of %s", strings.Join(owners[id], " and of ")),
				Suggestion: "put back the metadata and the records of one time: to remove one of these snapshots deletes what all of them have"})
		}
		if len(owners[id]) > 0 {
			continue
		}
		f := drivers.Finding{Fault: drivers.StrayStorage, Object: fmt.Sprintf("thin device %d", id), Detail: fmt.Sprintf("no record names it; it has %d blocks of %d bytes, some maybe with others", dev.Mapped, d.pool.BlockBytes()),
			Suggestion: fmt.Sprintf("if nobody needs what is on it `dmsetup message %s 0 'delete %d'`", d.pool.Name(), id)}
		if len(unreadable) > 0 {
			f.Suggestion = fmt.Sprintf("it may be that of %s, whose record cannot be read", strings.Join(unreadable, ", "))
		}
		e.add(f)
	}
	return nil
}

// devicesNow lists the pool's devices; false if that cannot be read.
func (d *driver) devicesNow() (all []metadata.Device, ok bool, err error) {
	const tries = 10
	ok, err = d.readSteady(tries, func(m *metadata.Pool) error {
		all = nil
		for dev, err := range m.Devices() {
			if err != nil {
				return err
			}
			all = append(all, dev)
		}
		return nil
	})
	if !ok {
		return nil, false, err
	}
	return all, true, nil
}

// owners says whose each thin device is, and which records cannot be read; what a record
// says of its device is compared on the way.
func (d *driver) owners(e *examination, devices []metadata.Device, whole metadata.Report) (owners map[uint32][]string, unreadable []string, err error) {
	in := map[uint32]metadata.Device{}
	for _, dev := range devices {
		in[uint32(dev.ID)] = dev
	}
	ends := map[metadata.Device]uint64{}
	for _, c := range whole.Devices {
		ends[c.Device] = c.End
	}
	ts, err := d.templates()
	if err != nil {
		return nil, nil, err
	}
	owners = map[uint32][]string{}
	for _, t := range ts {
		owners[t.Thin] = append(owners[t.Thin], "the template of "+t.FS)
	}
	err = d.records(func(id drivers.ID, r *record, err error) error {
		if errdefs.IsDataLoss(err) {
			unreadable = append(unreadable, "layer "+id.String())
			return nil
		}
		if err != nil || r.Shared {
			return err
		}
		owners[r.Thin] = append(owners[r.Thin], "layer "+id.String())
		if dev, ok := in[r.Thin]; ok {
			d.compareRecord(e, id, r, dev, ends[dev])
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	temps, err := d.tempIDs() // of a commit at work: then a layer may have it, too
	for _, id := range temps {
		if len(owners[id]) == 0 {
			owners[id] = []string{"a commit or diff at work"}
		}
	}
	slices.Sort(unreadable)
	return owners, unreadable, err
}

// compareRecord compares one layer with its device, of which end is the block after the last
// that is mapped.
func (d *driver) compareRecord(e *examination, id drivers.ID, r *record, dev metadata.Device, end uint64) {
	f := drivers.Finding{Fault: drivers.StorageDamaged, Object: "layer " + id.String(), Suggestion: "remove the snapshot and what is above it, or put back the metadata and the records of one time"}
	if dev.Transaction+1 < r.Tx {
		f.Detail = fmt.Sprintf("its record is of transaction %d of the pool, thin device %d of %d: it is another's", r.Tx, r.Thin, dev.Transaction+1)
		e.add(f)
	}
	blocks := (r.Sectors*512 + uint64(d.pool.BlockBytes()) - 1) / uint64(d.pool.BlockBytes())
	if end > blocks {
		f.Detail = fmt.Sprintf("thin device %d has block %d mapped, its record says that it has %d", r.Thin, end-1, blocks)
		e.add(f)
	}
}

// examineClosed checks the metadata of a pool that cannot be opened.
func examineClosed(ctx context.Context, c drivers.Config, o drivers.ExamineOptions) ([]drivers.Finding, error) {
	e := &examination{o: o}
	err := thin.AtRest(c.Root, func(r thin.Rest) error {
		repair := thin.RepairWords(r.Name, r.Metadata, r.Bytes)
		report, _, err := checkSteady(ctx, r.Metadata)
		if err != nil {
			return err
		}
		e.report(report, repair, thin.RebuildWords(r.Metadata, r.Bytes))
		found, err := thin.Check(ctx, r.Metadata, false)
		if errdefs.IsUnavailable(err) {
			e.note("%v: the pool's metadata was checked by layerctl alone", err)
			return nil
		}
		e.damaged(found, repair)
		if err == nil && found == "" && len(e.found) == 0 {
			e.note("the pool's metadata is sound, by layerctl and by thin_check")
		}
		return err
	})
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) || errdefs.IsFailedPrecondition(err) {
		e.note("the pool's metadata was not checked: %v", err)
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("devmapper: examine %s: %w", c.Root+"/"+roots.Layers, err)
	}
	return e.found, err
}
