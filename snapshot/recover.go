package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
)

// Recovered returns what Open found of dead processes' work, and what it did
// about it.
func (s *Store) Recovered() []Finding { return append([]Finding(nil), s.recovered...) }

// remains is what processes left in the database that may be dead.
type remains struct {
	leases  map[drivers.ID]lease
	intents map[drivers.ID]intent
	pending []drivers.ID
}

func (r *remains) none() bool { return len(r.leases) == 0 && len(r.intents) == 0 }

// recover looks for what dead processes left. Where nobody died that is one
// read transaction. One process recovers at a time. What cannot be recovered now
// is a finding and no error: the store must open for who would make room on a
// full disk, or check what is damaged.
func (s *Store) recover(ctx context.Context) error {
	r, err := s.remains(ctx)
	if err != nil {
		return err
	}
	defer func() { s.listings.resume(r.pending) }()
	if s.o.ReadOnly || !s.anyDead(r) {
		return nil
	}
	release, err := s.locks.exclusive(ctx, recoveryPlace, "the recovery by another process")
	if err != nil {
		return err
	}
	defer release()
	if r, err = s.remains(ctx); err != nil { // another may have done it meanwhile
		return err
	}
	for id, i := range r.intents {
		if err := s.recoverCommit(ctx, id, i); err != nil {
			s.found(i.cutShort().cannot(err, "see the error, and open the store again"))
		}
	}
	for first, l := range r.leases {
		if err := s.recoverLease(ctx, first, l); err != nil {
			s.found(l.halfMade("lease "+first.String()).cannot(err, "see the error, and open the store again"))
		}
	}
	return ctx.Err()
}

func (i *intent) cutShort() Finding {
	return Finding{Problem: InterruptedCommit, Object: i.View + "/" + i.Key, Detail: fmt.Sprintf("commit as %q by %s was cut short", i.Name, i.Owner.died())}
}

func (l *lease) halfMade(object string) Finding {
	return Finding{Problem: OrphanLayer, Object: object, Detail: "half made by " + l.Owner.died()}
}

func (s *Store) remains(ctx context.Context) (*remains, error) {
	r := &remains{leases: map[drivers.ID]lease{}, intents: map[drivers.ID]intent{}}
	err := s.db.view(ctx, func(t *txn) error {
		*r = remains{leases: map[drivers.ID]lease{}, intents: map[drivers.ID]intent{}}
		if err := each(t, bucketLeases, r.leases); err != nil {
			return err
		}
		if err := each(t, bucketIntents, r.intents); err != nil {
			return err
		}
		return t.each(bucketPending, func(k, _ []byte) error {
			r.pending = append(r.pending, keyID(k))
			return nil
		})
	})
	return r, err
}

// each collects the records of a bucket.
func each[T any](t *txn, bucket []byte, into map[drivers.ID]T) error {
	return t.each(bucket, func(k, v []byte) error {
		var r T
		_, err := decodeID(v, bucket, k, &r)
		into[keyID(k)] = r
		return err
	})
}

// anyDead reports whether a lease or intent is not held by its owner.
func (s *Store) anyDead(r *remains) bool {
	if r.none() {
		return false
	}
	for id := range r.intents {
		if s.isFree(layerPlace(id)) {
			return true
		}
	}
	for first := range r.leases {
		if s.isFree(leasePlace(first)) {
			return true
		}
	}
	return false
}

func (s *Store) isFree(p place) bool {
	free, err := s.locks.free(p)
	return free && err == nil
}

// died says whose work it is, and whether he ended or the whole machine did.
func (o owner) died() string {
	if o.Boot != bootID() {
		return o.String() + ", before this boot"
	}
	return o.String() + ", which is gone"
}

// recoverCommit finishes a Commit that had frozen the layer, and calls off one
// that had not: then the key is active as before.
func (s *Store) recoverCommit(ctx context.Context, id drivers.ID, i intent) error {
	release, ok, err := s.locks.try(layerPlace(id))
	if err != nil || !ok {
		return err // its owner lives
	}
	defer release()
	c := &commitment{s: s, id: id, intent: i}
	f := i.cutShort()
	err = s.db.view(ctx, func(t *txn) error {
		if t.get(bucketIntents, idKey(id)) == nil {
			return errGone
		}
		return c.plan(t)
	})
	switch {
	case errors.Is(err, errGone):
		return nil
	case errdefs.IsDataLoss(err) || ctx.Err() != nil:
		return err
	}
	if err == nil && c.id == id {
		var frozen bool
		if frozen, err = c.frozen(ctx); err != nil {
			s.found(f.cannot(err, "make the driver work, or remove the snapshot"))
			return nil
		}
		if frozen {
			err = s.db.update(ctx, c.record)
		}
		if frozen && err == nil {
			s.listings.add(id)
			s.found(f.done("the layer had been frozen: finished"))
		}
		if frozen && !errdefs.IsAlreadyExists(err) { // else the name was taken meanwhile
			return err
		}
	}
	if derr := s.db.update(ctx, func(t *txn) error { return t.delete(bucketIntents, idKey(id)) }); derr != nil {
		return derr
	}
	how := "called off: the snapshot is active as before"
	if err != nil {
		how = fmt.Sprintf("called off, since %v: commit it again", err)
	}
	s.found(f.done(how))
	return nil
}

var errGone = errors.New("gone meanwhile")

// frozen asks the driver whether it had committed the layer, and measures it.
func (c *commitment) frozen(ctx context.Context) (bool, error) {
	d, err := c.s.driverOf(ctx, c.n)
	if err != nil {
		return false, err
	}
	ms, err := d.Mounts(ctx, c.n.ref, drivers.MountOptions{})
	if errdefs.IsInvalidArgument(err) && c.base != nil {
		return false, nil // not yet on the parent that the commit was to give it
	}
	if err != nil || !readOnly(ms) {
		return false, err
	}
	c.usage, err = d.Usage(ctx, c.n.ref)
	return true, err
}

// recoverLease removes the layers that a dead process made and did not come to
// record, and ends its lease.
func (s *Store) recoverLease(ctx context.Context, first drivers.ID, l lease) error {
	release, ok, err := s.locks.try(leasePlace(first))
	if err != nil || !ok {
		return err // its owner lives
	}
	defer release()
	known, unknown, err := s.driversOnDisk()
	if err != nil {
		return err
	}
	complete := len(unknown) == 0 // else a program that has the driver looks
	for _, driver := range known {
		ok, err := s.removeOrphans(ctx, driver, first, l)
		if err != nil {
			return err
		}
		complete = complete && ok
	}
	if !complete {
		return nil
	}
	if err := faults.Point(ctx, "store: recover: orphans removed"); err != nil {
		return err
	}
	// For good: without the lease nothing explains what a power cut brings back, of
	// this recovery or of one that died here.
	if err := s.flushRemovals(known...); err != nil {
		return err
	}
	return s.db.update(ctx, func(t *txn) error { return t.delete(bucketLeases, idKey(first)) })
}

// removeOrphans removes a driver's layers of a lease that have no record. false
// says that it could not look at all of them.
func (s *Store) removeOrphans(ctx context.Context, driver string, first drivers.ID, l lease) (bool, error) {
	d, err := s.driver(ctx, driver)
	if err != nil {
		f := Finding{Problem: DriverBroken, Object: driver, Detail: err.Error()}
		s.found(f.cannot(nil, "make the driver work and open the store again"))
		return false, ctx.Err()
	}
	orphans, err := s.orphans(ctx, d, func(id drivers.ID) bool { return first <= id && id < l.End })
	if err != nil {
		return false, err
	}
	for _, id := range orphans {
		if ok, err := s.removeOrphan(ctx, driver, d, id); err != nil || !ok {
			return false, err
		}
		s.found(l.halfMade(driver + "/" + id.String()).done("removed"))
	}
	return true, nil
}

// removeOrphan removes a layer without a record, or makes it a debt. false says
// that somebody is at work on it.
func (s *Store) removeOrphan(ctx context.Context, driver string, d drivers.Driver, id drivers.ID) (bool, error) {
	release, ok, err := s.locks.try(layerPlace(id))
	if err != nil || !ok {
		return false, err
	}
	defer release()
	if err := s.removeListing(id); err != nil { // of a copy that a migration had not recorded
		return false, err
	}
	if err := d.Remove(ctx, id); err == nil || ctx.Err() != nil {
		return true, ctx.Err()
	}
	return true, s.db.update(ctx, func(t *txn) error {
		return t.addDebt(id, &layerRecord{Driver: driver, Created: time.Now().UnixNano()}, drivers.Ref{ID: id}, "discarded")
	})
}

// orphans returns the driver's layers among those of interest that no record
// names.
func (s *Store) orphans(ctx context.Context, d drivers.Driver, interest func(drivers.ID) bool) ([]drivers.ID, error) {
	var ids []drivers.ID
	for id, err := range d.IDs(ctx) {
		if err != nil {
			return nil, err
		}
		if interest(id) {
			ids = append(ids, id)
		}
	}
	var orphans []drivers.ID
	err := s.db.view(ctx, func(t *txn) error {
		orphans = nil
		for _, id := range ids {
			if t.get(bucketLayers, idKey(id)) == nil {
				orphans = append(orphans, id)
			}
		}
		return nil
	})
	return orphans, err
}

// found keeps a finding for Recovered; only Open calls it.
func (s *Store) found(f Finding) { s.recovered = append(s.recovered, f) }
