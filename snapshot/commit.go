package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
)

// CommitOptions say how a snapshot is committed. The zero value commits it
// durably, under the parent that it has.
type CommitOptions struct {
	// Labels are those of the committed snapshot; the active one's are not
	// inherited.
	Labels map[string]string
	// Parent is put below a snapshot that was prepared without one
	// (drivers.Capabilities.Rebase).
	Parent string
	// Volatile skips flushing the layer: a power cut may lose its content. Record
	// says so ever after.
	Volatile bool
}

// Commit implements snapshots.Snapshotter. When it returns nil, the snapshot
// survives a power cut. After an error the key is still active: it can be
// committed again.
func (v *View) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return v.fail("commit", key, err)
		}
	}
	return v.CommitWith(ctx, name, key, CommitOptions{Labels: base.Labels, Parent: base.Parent})
}

// CommitWith is Commit with options.
func (v *View) CommitWith(ctx context.Context, name, key string, o CommitOptions) error {
	o.Volatile = o.Volatile || v.s.o.Volatile
	c := &commitment{s: v.s, intent: intent{
		View: v.name, Key: key, Name: name, Parent: o.Parent, Labels: keptLabels(o.Labels), Volatile: o.Volatile,
	}}
	return v.fail("commit", key, c.run(ctx, v))
}

// commitment is a Commit in progress.
type commitment struct {
	s      *Store
	intent intent
	id     drivers.ID
	n      *node
	base   *node // the parent to be put below; nil if there is none
	usage  drivers.Usage
}

// run freezes the layer and then writes the record. The intent goes first, since
// a frozen layer without a record cannot be told from an active one by IDs; a
// crash after it is resolved by recovery.
func (c *commitment) run(ctx context.Context, v *View) error {
	if err := errors.Join(c.s.checkChange(c.intent.Key), checkKey(c.intent.Name)); err != nil {
		return err
	}
	unlock, err := v.lockKeys(ctx, c.intent.Key, c.intent.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.s.db.view(ctx, c.plan); err != nil { // says what is wrong before anything waits
		return err
	}
	release, err := c.s.locks.exclusive(ctx, layerPlace(c.n.ref.ID), fmt.Sprintf("snapshot %q", c.intent.Key))
	if err != nil {
		return err
	}
	defer release()
	if c.base != nil { // must stay until the record holds it
		freed, err := c.s.locks.shared(ctx, layerPlace(c.base.ref.ID), fmt.Sprintf("snapshot %q", c.intent.Parent))
		if err != nil {
			return err
		}
		defer freed()
	}
	d, err := c.s.driverOf(ctx, c.n)
	if err != nil {
		return err
	}
	if c.base != nil && !d.Capabilities().Rebase {
		return fmt.Errorf("driver %s cannot put a parent below an existing layer: %w", c.n.layer.Driver, errdefs.ErrFailedPrecondition)
	}
	return c.carryOut(ctx, d)
}

// lockKeys locks two keys, in the order of their places, so that no two calls
// wait for each other.
func (v *View) lockKeys(ctx context.Context, a, b string) (unlock func(), err error) {
	if keyPlace(v.name, a) > keyPlace(v.name, b) {
		a, b = b, a
	}
	first, err := v.s.locks.exclusive(ctx, keyPlace(v.name, a), fmt.Sprintf("key %q", a))
	if err != nil || keyPlace(v.name, a) == keyPlace(v.name, b) {
		return first, err
	}
	second, err := v.s.locks.exclusive(ctx, keyPlace(v.name, b), fmt.Sprintf("key %q", b))
	if err != nil {
		first()
		return nil, err
	}
	return func() { second(); first() }, nil
}

// plan reads what the commit is about and refuses what cannot be, in the order
// in which containerd does.
func (c *commitment) plan(t *txn) (err error) {
	i := &c.intent
	if err := t.mustBeFree(i.View, i.Name); err != nil {
		return err
	}
	if c.n, err = t.node(i.View, i.Key); err != nil {
		return err
	}
	c.id = c.n.ref.ID
	if c.n.name.Kind != snapshots.KindActive {
		return fmt.Errorf("is not active but %s: %w", c.n.name.Kind, errdefs.ErrFailedPrecondition)
	}
	return c.planParent(t)
}

func (c *commitment) planParent(t *txn) (err error) {
	i, had := &c.intent, c.n.name.Parent
	c.base = nil
	switch {
	case i.Parent == "" || i.Parent == had:
		i.Parent = had
		return nil
	case had != "":
		return fmt.Errorf("has parent %q, which a commit cannot change to %q: %w", had, i.Parent, errdefs.ErrInvalidArgument)
	}
	if c.base, err = t.node(i.View, i.Parent); err != nil {
		return fmt.Errorf("parent: %w", err)
	}
	switch {
	case c.base.name.Kind != snapshots.KindCommitted:
		return fmt.Errorf("parent %q is not committed: %w", i.Parent, errdefs.ErrFailedPrecondition)
	case c.base.layer.Driver != c.n.layer.Driver:
		return fmt.Errorf("parent %q is kept by driver %s, not %s: %w", i.Parent, c.base.layer.Driver, c.n.layer.Driver, errdefs.ErrInvalidArgument)
	}
	c.n.ref.Parents = append([]drivers.ID{c.base.ref.ID}, c.base.ref.Parents...)
	return nil
}

func (c *commitment) carryOut(ctx context.Context, d drivers.Driver) error {
	c.intent.Owner = c.s.owner()
	err := c.s.db.update(ctx, func(t *txn) error {
		if err := c.plan(t); err != nil {
			return err
		}
		return t.putJSON(bucketIntents, idKey(c.id), &c.intent)
	})
	if err != nil {
		return err
	}
	if err := faults.Point(ctx, "store: commit: intended"); err != nil {
		return c.callOff(ctx, err)
	}
	if err := c.freeze(ctx, d); err != nil {
		return c.callOff(ctx, err)
	}
	// Frozen: from here on only the record is missing, and a cancelled ctx is
	// no reason to leave it out.
	_ = faults.Point(ctx, "store: commit: frozen")
	if err := c.s.db.update(context.WithoutCancel(ctx), c.record); err != nil {
		return err // the intent stays, and with it the knowledge of what happened
	}
	_ = faults.Point(ctx, "store: commit: recorded")
	c.s.listings.add(c.id)
	return nil
}

// freeze has the driver commit the layer. One that a commit had frozen already,
// which never came to its record, is refused, and as good as frozen now.
func (c *commitment) freeze(ctx context.Context, d drivers.Driver) (err error) {
	c.usage, err = d.Commit(ctx, c.n.ref, drivers.CommitOptions{Volatile: c.intent.Volatile})
	if !errdefs.IsFailedPrecondition(err) {
		return err
	}
	if ms, merr := d.Mounts(ctx, c.n.ref, drivers.MountOptions{}); merr != nil || !readOnly(ms) {
		return err
	}
	c.usage, err = d.Usage(ctx, c.n.ref)
	return err
}

// callOff takes the intent back after err, unless the driver may have frozen
// the layer for all that.
func (c *commitment) callOff(ctx context.Context, err error) error {
	ctx = context.WithoutCancel(ctx)
	if d, derr := c.s.driverOf(ctx, c.n); derr == nil {
		if ms, merr := d.Mounts(ctx, c.n.ref, drivers.MountOptions{}); merr != nil || readOnly(ms) {
			return err
		}
	}
	return errors.Join(err, c.s.db.update(ctx, func(t *txn) error { return t.delete(bucketIntents, idKey(c.id)) }))
}

// record turns the active record into the committed one.
func (c *commitment) record(t *txn) error {
	i := &c.intent
	if err := c.plan(t); err != nil {
		return err
	}
	now := time.Now().UnixNano()
	if err := t.deleteName(i.View, i.Key, c.id); err != nil {
		return err
	}
	n := &name{ID: c.id, Kind: snapshots.KindCommitted, Parent: i.Parent, Labels: i.Labels, Created: now, Updated: now}
	if err := t.putName(i.View, i.Name, n); err != nil {
		return err
	}
	if c.base != nil {
		if err := t.setParent(c.id, c.base.ref.ID); err != nil {
			return err
		}
	}
	if err := c.recordLayer(t); err != nil {
		return err
	}
	return t.delete(bucketIntents, idKey(c.id))
}

func (c *commitment) recordLayer(t *txn) error {
	l := c.n.layer
	l.Committed, l.Volatile = true, c.intent.Volatile
	l.Bytes, l.Inodes = c.usage.Bytes, c.usage.Inodes
	if !l.Applied || l.Exposed { // the listing of Apply, if any, need not be true any more
		l.Digest = ""
		if err := t.put(bucketPending, idKey(c.id), []byte{}); err != nil {
			return err
		}
	}
	l.Applied, l.Quota = false, 0
	return t.putLayer(c.id, l)
}
