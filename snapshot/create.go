package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
)

// CreateOptions say how Create makes a snapshot. The zero value is an active
// one with the driver's defaults.
type CreateOptions struct {
	ReadOnly  bool // a view
	Labels    map[string]string
	Quota     int64          // bytes; 0 means what the label containerd.io/snapshot/max-size says, as far as the driver can, or no limit
	RootOwner *drivers.Owner // of a parentless snapshot's root; nil means 0:0
	IDMap     drivers.IDMap  // empty means what the labels .../uidmapping and .../gidmapping say
}

// Prepare implements snapshots.Snapshotter.
func (v *View) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	ms, err := v.prepare(ctx, CreateOptions{}, key, parent, opts)
	return ms, v.fail("prepare", key, err)
}

// View implements snapshots.Snapshotter.
func (v *View) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	ms, err := v.prepare(ctx, CreateOptions{ReadOnly: true}, key, parent, opts)
	return ms, v.fail("view", key, err)
}

// Create is Prepare or View without handing out mounts: for who will Apply onto
// the snapshot, or asks for mounts later.
func (v *View) Create(ctx context.Context, key, parent string, o CreateOptions) error {
	_, err := v.create(ctx, key, parent, o, nil)
	return v.fail("create", key, err)
}

func (v *View) prepare(ctx context.Context, o CreateOptions, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, err
		}
	}
	o.Labels = base.Labels
	return v.create(ctx, key, parent, o, &v.mounts)
}

// creation is a snapshot being made.
type creation struct {
	v      *View
	key    string
	parent string
	o      CreateOptions
	driver string
	d      drivers.Driver
	base   *node // the parent, locked; nil if there is none
	id     drivers.ID
	ref    drivers.Ref
	quota  int64 // that the layer was made with
	hint   bool  // the quota is a wish: the label's
	mounts []mount.Mount
}

// create makes the bytes under a fresh ID and then the record. A crash between
// leaves an ID of a dead lease without a record, which recovery removes.
func (v *View) create(ctx context.Context, key, parent string, o CreateOptions, mo *drivers.MountOptions) ([]mount.Mount, error) {
	if err := v.s.checkChange(key); err != nil {
		return nil, err
	}
	release, err := v.s.locks.exclusive(ctx, keyPlace(v.name, key), fmt.Sprintf("key %q", key))
	if err != nil {
		return nil, err
	}
	defer release()
	for {
		c := &creation{v: v, key: key, parent: parent, o: o}
		unpin, err := c.plan(ctx)
		if err != nil {
			return nil, err
		}
		err = c.make(ctx, mo)
		unpin()
		if !errors.Is(err, errMoved) {
			return c.mounts, err
		}
	}
}

// errMoved says that the parent has another layer now, by another driver.
var errMoved = errors.New("parent was migrated meanwhile")

// checkChange refuses what cannot be done to key before anything is locked.
func (s *Store) checkChange(key string) error {
	if s.o.ReadOnly {
		return errReadOnly
	}
	return checkKey(key)
}

// plan finds out that the snapshot can be made, and locks its parent.
func (c *creation) plan(ctx context.Context) (release func(), err error) {
	release = func() {}
	if c.parent != "" {
		if c.base, release, err = c.v.pin(ctx, c.parent); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	if err = c.check(ctx); err == nil {
		err = c.chooseDriver(ctx)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

func (c *creation) check(ctx context.Context) error {
	if c.base != nil && c.base.name.Kind != snapshots.KindCommitted {
		return fmt.Errorf("parent %q is not committed: %w", c.parent, errdefs.ErrInvalidArgument)
	}
	return c.v.s.db.view(ctx, func(t *txn) error { return t.mustBeFree(c.v.name, c.key) })
}

// mustBeFree wraps ErrAlreadyExists if the view has the key.
func (t *txn) mustBeFree(view, key string) error {
	n, err := t.name(view, key)
	if err == nil && n != nil {
		err = fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
	}
	return err
}

func (c *creation) chooseDriver(ctx context.Context) (err error) {
	c.driver = c.v.driver
	if c.base != nil {
		c.driver = c.base.layer.Driver
		if c.v.driver != "" && c.v.driver != c.driver {
			return fmt.Errorf("parent %q is kept by driver %s, so its child cannot be made by %s: %w", c.parent, c.driver, c.v.driver, errdefs.ErrInvalidArgument)
		}
	}
	if c.driver == "" {
		if c.driver, err = c.v.s.DefaultDriver(ctx); err != nil {
			return err
		}
		if c.d, err = c.v.s.driver(ctx, c.driver); err != nil {
			return fmt.Errorf("the store's default driver does not open; name another: %w", err)
		}
		return nil
	}
	c.d, err = c.v.s.driver(ctx, c.driver)
	return err
}

// make makes the layer and its record.
func (c *creation) make(ctx context.Context, mo *drivers.MountOptions) error {
	co, err := c.driverOptions()
	if err != nil {
		return err
	}
	c.quota = co.Quota
	return c.v.s.underNewID(ctx, c.driver, func(id drivers.ID, block *block) error {
		c.id = id
		return c.try(ctx, block, co, mo)
	})
}

// errStray says that the driver has an ID that the store never gave out.
var errStray = errors.New("stray layer")

// underNewID has try make a layer of the driver under an ID that was never used, whose
// layer it keeps locked meanwhile: after errStray, under the next.
func (s *Store) underNewID(ctx context.Context, driver string, try func(id drivers.ID, block *block) error) error {
	for {
		id, block, err := s.ids.take(ctx)
		if err != nil {
			return err
		}
		release, err := s.locks.exclusive(ctx, layerPlace(id), "a new layer")
		if err != nil {
			s.ids.settled(block, nil)
			return err
		}
		err = try(id, block)
		release()
		if !errors.Is(err, errStray) {
			return err
		}
		s.o.Log(fmt.Sprintf("driver %s holds a layer %s that no record ever named (was db.bolt restored from a copy?); it stays, and the ID is passed over", driver, id))
	}
}

func (c *creation) try(ctx context.Context, block *block, co drivers.CreateOptions, mo *drivers.MountOptions) error {
	s := c.v.s
	c.ref = drivers.Ref{ID: c.id}
	if c.base != nil {
		c.ref.Parents = append([]drivers.ID{c.base.ref.ID}, c.base.ref.Parents...)
	}
	err := c.makeLayer(ctx, co)
	if errdefs.IsAlreadyExists(err) {
		s.ids.settled(block, nil)
		return fmt.Errorf("%w: %w", errStray, err)
	}
	if err == nil {
		err = faults.Point(ctx, "store: create: made")
	}
	if err == nil && mo != nil {
		c.mounts, err = c.d.Mounts(ctx, c.ref, *mo)
	}
	if err == nil {
		err = c.record(ctx, block, mo != nil)
	}
	switch {
	case errors.Is(err, errUnsure):
		return err // the lease stays: recovery finds out whether there is a record
	case err != nil:
		return errors.Join(err, c.discard(ctx, block))
	}
	_ = faults.Point(ctx, "store: create: recorded") // done is done
	return nil
}

func (c *creation) makeLayer(ctx context.Context, co drivers.CreateOptions) (err error) {
	if c.hint {
		c.quota, err = c.v.s.createHinted(ctx, c.d, c.ref, co)
		return err
	}
	return c.d.Create(ctx, c.ref, co)
}

// createHinted has a driver make a layer with a quota that is a wish. What the driver cannot
// make, smaller than the parent for one, is made without; quota is what it has.
func (s *Store) createHinted(ctx context.Context, d drivers.Driver, r drivers.Ref, co drivers.CreateOptions) (quota int64, err error) {
	err = d.Create(ctx, r, co)
	if !errdefs.IsInvalidArgument(err) && !errdefs.IsPermissionDenied(err) {
		return co.Quota, err
	}
	if removeErr := d.Remove(ctx, r.ID); removeErr != nil {
		return 0, errors.Join(err, removeErr)
	}
	co.Quota = 0
	refused := err
	if err = d.Create(ctx, r, co); err == nil {
		s.o.Log(fmt.Sprintf("layer %s has no quota of its own, the label %s is a hint: %v", r.ID, snapshots.LabelSnapshotMaxSize, refused))
	}
	return 0, err
}

// record writes the new snapshot's records, unless the key was taken or the
// parent removed meanwhile.
func (c *creation) record(ctx context.Context, block *block, exposed bool) error {
	ids := c.v.s.ids
	ahead := ids.ahead()
	err := ids.record(ctx, block, func(t *txn) error {
		if err := t.mustBeFree(c.v.name, c.key); err != nil {
			return err
		}
		if c.base != nil {
			p, err := t.name(c.v.name, c.parent)
			if err != nil {
				return err
			}
			if p == nil {
				return fmt.Errorf("parent was removed meanwhile: %w", notFound("snapshot", c.parent))
			}
			if p.ID != c.base.name.ID {
				return errMoved
			}
			if err := t.setParent(c.id, p.ID); err != nil {
				return err
			}
		}
		now := time.Now().UnixNano()
		l := &layerRecord{Driver: c.driver, ReadOnly: c.o.ReadOnly, Exposed: exposed, Quota: c.quota, Created: now}
		if err := t.putLayer(c.id, l); err != nil {
			return err
		}
		n := &name{ID: c.id, Kind: snapshots.KindActive, Parent: c.parent, Labels: keptLabels(c.o.Labels), Created: now, Updated: now}
		if c.o.ReadOnly {
			n.Kind = snapshots.KindView
		}
		if err := t.putName(c.v.name, c.key, n); err != nil {
			return err
		}
		if ahead != nil {
			return ahead.in(t)
		}
		return nil
	})
	if ahead != nil {
		_ = ahead.end(err) // err itself is returned
	}
	return err
}

// discard removes what was made of a snapshot that has no record. What cannot
// be removed now becomes a debt; if not even that can be written, the lease
// stays, and the next recovery finds it.
func (c *creation) discard(ctx context.Context, block *block) error {
	s := c.v.s
	ctx = context.WithoutCancel(ctx)
	err := c.d.Remove(ctx, c.id)
	if err == nil {
		err = s.flushRemovals(c.driver) // or a power cut brings it back when its lease has ended
	}
	if err == nil {
		s.ids.settled(block, nil)
		return nil
	}
	s.o.Log(fmt.Sprintf("layer %s of a failed prepare could not be removed yet: %v", c.id, err))
	return s.ids.record(ctx, block, func(t *txn) error {
		return t.addDebt(c.id, &layerRecord{Driver: c.driver, Created: time.Now().UnixNano()}, c.ref, "discarded")
	})
}

// driverOptions are those of CreateOptions and of the labels that containerd
// has for them.
func (c *creation) driverOptions() (drivers.CreateOptions, error) {
	co := drivers.CreateOptions{
		ReadOnly: c.o.ReadOnly, Quota: c.o.Quota, RootOwner: c.o.RootOwner, IDMap: c.o.IDMap, Volatile: c.v.s.o.Volatile,
	}
	caps := c.d.Capabilities()
	// The label is a hint: a driver without quotas leaves it alone, and makeLayer one that
	// the driver refuses.
	if size := c.o.Labels[snapshots.LabelSnapshotMaxSize]; size != "" && co.Quota == 0 && caps.Quota && !co.ReadOnly {
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil || n < 0 {
			return co, fmt.Errorf("label %s: %q is not a number of bytes: %w", snapshots.LabelSnapshotMaxSize, size, errdefs.ErrInvalidArgument)
		}
		co.Quota, c.hint = n, n > 0
	}
	if co.IDMap.IsZero() {
		var err error
		if co.IDMap.UIDs, err = idRanges(c.o.Labels, snapshots.LabelSnapshotUIDMapping); err != nil {
			return co, err
		}
		if co.IDMap.GIDs, err = idRanges(c.o.Labels, snapshots.LabelSnapshotGIDMapping); err != nil {
			return co, err
		}
	}
	return co, nil
}

// idRanges reads a label of the form CONTAINER:HOST:SIZE[,...].
func idRanges(labels map[string]string, label string) (rs []drivers.IDRange, err error) {
	text := labels[label]
	if text == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(text, ",") {
		var n [3]uint64
		f := strings.Split(part, ":")
		if len(f) != 3 {
			return nil, badRange(label, part)
		}
		for i := range n {
			if n[i], err = strconv.ParseUint(f[i], 10, 32); err != nil {
				return nil, badRange(label, part)
			}
		}
		rs = append(rs, drivers.IDRange{ContainerID: uint32(n[0]), HostID: uint32(n[1]), Size: uint32(n[2])})
	}
	return rs, nil
}

func badRange(label, part string) error {
	return fmt.Errorf("label %s: %q is not CONTAINER:HOST:SIZE: %w", label, part, errdefs.ErrInvalidArgument)
}
