package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

// MigrateOptions say what Migrate does. To is required.
type MigrateOptions struct {
	// To is the driver that is to keep the snapshots.
	To string
	// Related takes along what else lies on the snapshots' parents. Without it
	// such a snapshot is named and nothing is done: it would have to change its
	// driver, too.
	Related bool
	// DryRun finds out only.
	DryRun bool
	// Progress, if not nil, is told what is being copied. It may be called by
	// several goroutines, one at a time.
	Progress func(MigrateProgress)
}

// MigrateProgress is how far a migration is.
type MigrateProgress struct {
	Key   string // the snapshot being copied, "" while the records are switched
	Done  int    // snapshots copied, by an earlier call that ended early, too
	Total int    // snapshots to be copied
	Bytes int64  // of archives written so far
}

// What Migrate did with a snapshot.
const (
	MigrateThere  = "there"         // its driver was the wanted one already
	MigrateCopied = "copied before" // an interrupted migration had copied it; with DryRun: has copied it
	MigrateMoved  = "moved"         // copied and switched over; with DryRun: would be
)

// Migrated is what Migrate did with one snapshot.
type Migrated struct {
	Key   string         `json:"key"`
	Kind  snapshots.Kind `json:"kind"`
	From  string         `json:"from"`  // driver
	State string         `json:"state"` // one of the constants
	// Bytes is what the snapshot holds by its new driver; with DryRun by its old
	// one. 0 where the driver cannot know.
	Bytes int64 `json:"bytes"`
	// Sockets are paths of sockets, which no layer carries: the copy lacks them.
	Sockets []string `json:"sockets,omitempty"`
}

// MigrateReport is what Migrate did.
type MigrateReport struct {
	Snapshots []Migrated // parents first
	// Needed estimates what the copies that are still to be made take, by what the
	// layers hold now; Free is what the file system of the new driver has.
	Needed, Free int64
}

// Migrate moves snapshots from their drivers to another, all of the view if none
// is named: with them goes what they lie on. Keys, kinds, parents, labels, times,
// listings and tree digests stay; a layer that another view names, too, stays
// there for that one. Each copy's changes are compared with the original's, by the
// digest of their listing, before any name changes, and all names of the call change in one
// transaction; what the old driver kept is a debt then (GC).
//
// A migration that ends early has changed no name. What it had copied is kept, and
// found by the next one to the same driver; CallOffMigration gives it up.
//
// ErrFailedPrecondition, naming it, for an active snapshot that is mounted
// anywhere, that shows other owners than it stores, or that was unpacked without a
// parent and may still get one; and for snapshots that would have to go along.
// Views and committed snapshots may be mounted: those mounts go on showing the old
// bytes, which are the same, and stay until they are unmounted. Mounts of an active snapshot that
// were handed out and are performed only after this are of the old bytes, too:
// ask again.
func (v *View) Migrate(ctx context.Context, keys []string, o MigrateOptions) (MigrateReport, error) {
	m := &migration{v: v, s: v.s, o: o, keys: keys}
	err := m.run(ctx)
	if err != nil {
		err = fmt.Errorf("snapshot: migrate to %s: %w", o.To, err)
	}
	return m.report, err
}

// move says that a layer has a copy by another driver, which no key names yet.
type move struct {
	ID     drivers.ID `json:"id"` // of the copy
	Driver string     `json:"driver"`
	Since  int64      `json:"since"`
	// Digest is that of the listing of the changes, as original and copy had them.
	Digest string `json:"digest,omitempty"`
}

// CallOffMigration gives up what interrupted migrations have copied, of every
// view, and returns how many layers that is. Their bytes go with GC.
func (s *Store) CallOffMigration(ctx context.Context) (int, error) {
	n, err := s.callOffMigration(ctx)
	if err != nil {
		err = fmt.Errorf("snapshot: call off migration: %w", err)
	}
	return n, err
}

func (s *Store) callOffMigration(ctx context.Context) (n int, err error) {
	if s.o.ReadOnly {
		return 0, errReadOnly
	}
	release, err := s.locks.exclusive(ctx, migrationPlace, "another migration")
	if err != nil {
		return 0, err
	}
	defer release()
	err = s.db.update(ctx, func(t *txn) error {
		moves := map[drivers.ID]move{}
		if err := each(t, bucketMoves, moves); err != nil {
			return err
		}
		n = len(moves)
		for id := range moves {
			if err := t.dropMove(id); err != nil {
				return err
			}
		}
		return nil
	})
	return n, err
}

// moveOf reads the record of a layer's copy; nil if it has none.
func (t *txn) moveOf(id drivers.ID) (*move, error) {
	m := &move{}
	ok, err := decodeID(t.get(bucketMoves, idKey(id)), bucketMoves, idKey(id), m)
	if !ok {
		return nil, err
	}
	return m, nil
}

// dropMove makes a layer's copy a debt, if it has one that no key names.
func (t *txn) dropMove(id drivers.ID) error {
	m, err := t.moveOf(id)
	if err != nil || m == nil {
		return err
	}
	if err := t.delete(bucketMoves, idKey(id)); err != nil {
		return err
	}
	n, err := t.layerNode(m.ID)
	if err != nil || n == nil || t.isDebt(m.ID) {
		return err
	}
	return t.addDebt(m.ID, n.layer, n.ref, "copy given up")
}

// migration is a Migrate in progress.
type migration struct {
	v      *View
	s      *Store
	o      MigrateOptions
	keys   []string
	d      drivers.Driver // the new one
	report MigrateReport

	members []*member               // parents first
	seen    map[drivers.ID]Migrated // what is known for the report, by the old ID
	bytes   int64                   // of archives written
}

// member is a snapshot that is to be moved.
type member struct {
	*node
	copy *move // nil: none yet
}

func (m *member) active() bool { return m.name.Kind == snapshots.KindActive }
func (m *member) isView() bool { return m.name.Kind == snapshots.KindView }

// errChanged says that what is to be moved is not what it was: look again.
var errChanged = errors.New("changed meanwhile")

// rounds bounds how often a migration looks again: each time it has copied all
// that there was, so only a store that makes snapshots faster than they can be
// copied gets there.
const rounds = 100

func (m *migration) run(ctx context.Context) error {
	release, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer release()
	m.seen = map[drivers.ID]Migrated{}
	if err := m.plan(ctx); err != nil {
		return err
	}
	if err := m.estimate(ctx); err != nil || len(m.members) == 0 {
		return err
	}
	if err := m.refuseEarly(ctx); err != nil || m.o.DryRun {
		return err
	}
	for range rounds {
		if err := m.copyCommitted(ctx); err != nil {
			return err
		}
		err := m.finish(ctx)
		if first := (*commitsFirst)(nil); errors.As(err, &first) {
			if m.s.isFree(layerPlace(first.id)) {
				return fmt.Errorf("%w, and that was cut short: commit it again, or remove it: %w", err, errdefs.ErrFailedPrecondition)
			}
			if err := m.waitFor(ctx, first.id, fmt.Sprintf("snapshot %q", first.key)); err != nil {
				return err
			}
		} else if !errors.Is(err, errChanged) {
			return err
		}
		if err := m.plan(ctx); err != nil {
			return err
		}
	}
	return fmt.Errorf("snapshots are made faster than they can be copied: %w", errdefs.ErrUnavailable)
}

// begin sees that it can be done at all, and keeps other migrations away.
func (m *migration) begin(ctx context.Context) (release func(), err error) {
	switch {
	case m.s.o.ReadOnly:
		return nil, errReadOnly
	case m.o.To == "":
		return nil, fmt.Errorf("no driver is named: %w", errdefs.ErrInvalidArgument)
	case m.v.driver != "" && m.v.driver != m.o.To:
		return nil, fmt.Errorf("view %s is bound to driver %s: %w", m.v.name, m.v.driver, errdefs.ErrInvalidArgument)
	}
	if m.d, err = m.s.driver(ctx, m.o.To); err != nil {
		return nil, err
	}
	return m.s.locks.exclusive(ctx, migrationPlace, "another migration")
}

// plan finds out what is to be moved.
func (m *migration) plan(ctx context.Context) error {
	return m.s.db.view(ctx, func(t *txn) (err error) {
		m.members, err = m.family(t)
		return err
	})
}

// family is the snapshots named, what they lie on, and what of the view lies on
// that: one driver keeps all of a tree. It leaves out what is there already.
func (m *migration) family(t *txn) ([]*member, error) {
	named, err := m.named(t)
	if err != nil {
		return nil, err
	}
	all := map[drivers.ID]*member{}
	var others []string
	for _, id := range named {
		ref, err := t.ref(id)
		if err != nil {
			return nil, err
		}
		for _, below := range append(ref.Parents, id) {
			if _, err := m.take(t, all, below); err != nil {
				return nil, err
			}
		}
	}
	queue := slices.Collect(maps.Keys(all))
	for len(queue) > 0 {
		id := queue[0]
		queue = queue[1:]
		for _, above := range t.children(id) {
			n, err := m.take(t, all, above)
			if err != nil {
				return nil, err
			}
			if n != nil {
				others = append(others, n.key)
				queue = append(queue, above)
			}
		}
	}
	if len(others) > 0 && !m.o.Related {
		slices.Sort(others)
		return nil, fmt.Errorf("%s would have to go along, being built on what goes: %w", list(others), errdefs.ErrFailedPrecondition)
	}
	return m.order(t, all)
}

// named returns the layers of the snapshots that were asked for.
func (m *migration) named(t *txn) (ids []drivers.ID, err error) {
	if len(m.keys) == 0 {
		err = t.eachName(m.v.name, func(_ string, n *name) error {
			ids = append(ids, n.ID)
			return nil
		})
		return ids, err
	}
	for _, key := range m.keys {
		n, err := t.node(m.v.name, key)
		if err != nil {
			return nil, err
		}
		ids = append(ids, n.ref.ID)
	}
	return ids, nil
}

// take adds a layer that the view names, and returns it if it was not there yet.
func (m *migration) take(t *txn, all map[drivers.ID]*member, id drivers.ID) (*member, error) {
	key, ok := t.nameIn(m.v.name, id)
	if !ok || all[id] != nil {
		return nil, nil
	}
	n, err := t.node(m.v.name, key)
	if err != nil {
		return nil, err
	}
	all[id] = &member{node: n}
	return all[id], nil
}

// order sorts the members, parents first, leaves out those that are there, and
// looks for the copies that there are. A copy that is not on its parent's copy, or
// not of what the snapshot is now, is none.
func (m *migration) order(t *txn, all map[drivers.ID]*member) (members []*member, err error) {
	for id, n := range all {
		if n.layer.Driver == m.o.To {
			m.note(n, MigrateThere)
			continue
		}
		if t.get(bucketIntents, idKey(id)) != nil && m.s.isFree(layerPlace(id)) { // else its Commit is at work, and finish waits for it
			return nil, fmt.Errorf("a commit of %q was cut short; commit it again, or remove it: %w", n.key, errdefs.ErrFailedPrecondition)
		}
		members = append(members, n)
	}
	slices.SortFunc(members, func(a, b *member) int {
		return cmp.Or(cmp.Compare(len(a.ref.Parents), len(b.ref.Parents)), cmp.Compare(a.ref.ID, b.ref.ID))
	})
	for _, n := range members {
		if n.copy, err = t.copyOf(n, below(all, n), m.o.To); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// below is the copy of a member's parent; 0 if it has no parent, or that no copy.
func below(all map[drivers.ID]*member, n *member) drivers.ID {
	if len(n.ref.Parents) == 0 {
		return 0
	}
	if p := all[n.ref.Parents[0]]; p != nil && p.copy != nil {
		return p.copy.ID
	}
	return 0
}

// copyOf returns the record of a copy, on the copy below, that can be used.
func (t *txn) copyOf(n *member, below drivers.ID, to string) (*move, error) {
	c, err := t.moveOf(n.ref.ID)
	if err != nil || c == nil || c.Driver != to {
		return nil, err
	}
	l, err := t.layer(c.ID)
	switch {
	case err != nil || l == nil || t.isDebt(c.ID):
		return nil, err
	case l.Committed != n.layer.Committed || l.ReadOnly != n.layer.ReadOnly || t.parent(c.ID) != below:
		return nil, nil
	}
	return c, nil
}

// note remembers what the report says of a snapshot, unless that is known.
func (m *migration) note(n *member, state string) {
	if _, ok := m.seen[n.ref.ID]; ok {
		return
	}
	m.seen[n.ref.ID] = Migrated{Key: n.key, Kind: n.name.Kind, From: n.layer.Driver, State: state, Bytes: max(n.layer.Bytes, 0)}
}

// estimate fills the report with what is planned.
func (m *migration) estimate(ctx context.Context) error {
	for _, n := range m.members {
		state := MigrateMoved
		if n.copy != nil {
			state = MigrateCopied
		}
		m.note(n, state)
		r := m.seen[n.ref.ID]
		if !n.layer.Committed && !n.isView() {
			d, err := m.s.driverOf(ctx, n.node)
			if err != nil {
				return err
			}
			if u, err := d.Usage(ctx, n.ref); err == nil {
				r.Bytes = max(u.Bytes, 0)
			}
		}
		m.seen[n.ref.ID] = r
		if n.copy == nil {
			m.report.Needed += r.Bytes
		}
	}
	if st, err := sys.StatfsPath(m.s.driverRoot(m.o.To)); err == nil {
		m.report.Free = int64(st.BlocksUser) * st.BlockSize
	}
	m.tell()
	return nil
}

// tell brings the report up to what is known.
func (m *migration) tell() {
	m.report.Snapshots = m.report.Snapshots[:0]
	for _, id := range slices.Sorted(maps.Keys(m.seen)) { // a parent is older than what lies on it
		m.report.Snapshots = append(m.report.Snapshots, m.seen[id])
	}
}

func (m *migration) progress(key string) {
	if m.o.Progress != nil {
		m.o.Progress(MigrateProgress{Key: key, Done: m.countCopies(), Total: len(m.members), Bytes: m.bytes})
	}
}

// copyCommitted copies what is committed and has no copy yet, under shared locks
// only: nobody who uses the store waits for it.
func (m *migration) copyCommitted(ctx context.Context) error {
	for _, n := range m.members {
		if !n.layer.Committed || n.copy != nil {
			continue
		}
		m.progress(n.key)
		release, err := m.s.locks.shared(ctx, layerPlace(n.ref.ID), fmt.Sprintf("snapshot %q", n.key))
		if err != nil {
			return err
		}
		if err = m.again(ctx, n); err == nil {
			err = m.copyOne(ctx, n)
		}
		release()
		if errors.Is(err, errChanged) {
			return nil // finish sees it, too, and we look again
		}
		if err != nil {
			return fmt.Errorf("%q: %w", n.key, err)
		}
	}
	return nil
}

func (m *migration) countCopies() (n int) {
	for _, c := range m.members {
		if c.copy != nil {
			n++
		}
	}
	return n
}

// finish copies what is not committed, with nobody at work on it, and then gives
// every name its new layer. errChanged if there is more to be copied first.
func (m *migration) finish(ctx context.Context) error {
	unlock, err := m.lockActive(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.still(ctx); err != nil {
		return err
	}
	release, err := m.lockUncommitted(ctx)
	if err != nil {
		return err
	}
	defer release()
	if err := m.still(ctx); err != nil {
		return err
	}
	if err := m.refuseActive(ctx); err != nil {
		return err
	}
	for _, n := range m.members {
		if n.layer.Committed {
			continue
		}
		m.progress(n.key)
		if err := m.copyUncommitted(ctx, n); err != nil {
			return fmt.Errorf("%q: %w", n.key, err)
		}
	}
	if err := m.refuseActive(ctx); err != nil { // mounted meanwhile, by who had asked for the mounts before
		return err
	}
	m.progress("")
	return m.change(ctx)
}

// lockActive locks the keys of the active snapshots, by number, so that none of
// them is committed or removed.
func (m *migration) lockActive(ctx context.Context) (release func(), err error) {
	places := map[place]string{}
	for _, n := range m.members {
		if n.active() {
			places[keyPlace(m.v.name, n.key)] = n.key
		}
	}
	var held releases
	for _, p := range slices.Sorted(maps.Keys(places)) {
		release, err := m.s.locks.exclusive(ctx, p, fmt.Sprintf("key %q", places[p]))
		if err != nil {
			held.all()
			return nil, err
		}
		held = append(held, release)
	}
	return held.all, nil
}

// releases are locks that are given back together.
type releases []func()

func (r releases) all() {
	for _, release := range slices.Backward(r) {
		release()
	}
}

// lockUncommitted locks the layers that are not committed. It never waits for one
// while it holds another: a call may hold that and wait for this.
func (m *migration) lockUncommitted(ctx context.Context) (release func(), err error) {
	for {
		held, busy, err := m.tryUncommitted()
		if err == nil && busy == nil {
			return held.all, nil
		}
		held.all()
		if err != nil {
			return nil, err
		}
		if err := m.waitFor(ctx, busy.ref.ID, fmt.Sprintf("snapshot %q", busy.key)); err != nil {
			return nil, err
		}
	}
}

// tryUncommitted returns the member that somebody is at work on, if any.
func (m *migration) tryUncommitted() (held releases, busy *member, err error) {
	for _, n := range m.members {
		if n.layer.Committed {
			continue
		}
		release, ok, err := m.s.locks.try(layerPlace(n.ref.ID))
		if err != nil || !ok {
			return held, n, err
		}
		held = append(held, release)
	}
	return held, nil, nil
}

// waitFor waits until nobody is at work on a layer.
func (m *migration) waitFor(ctx context.Context, id drivers.ID, what string) error {
	release, err := m.s.locks.exclusive(ctx, layerPlace(id), what)
	if err == nil {
		release()
	}
	return err
}

// still looks whether the members are what they were, and have copies if they
// are committed.
func (m *migration) still(ctx context.Context) error {
	return m.s.db.view(ctx, m.same)
}

func (m *migration) same(t *txn) error {
	now, err := m.family(t)
	if err != nil {
		return err
	}
	if len(now) != len(m.members) {
		return errChanged
	}
	for i, n := range now {
		was := m.members[i]
		if n.ref.ID != was.ref.ID || n.key != was.key || n.name.Kind != was.name.Kind || n.layer.Committed && n.copy == nil {
			return errChanged
		}
		was.node, was.copy = n.node, n.copy // labels, times and marks may be others
	}
	return nil
}

// change gives the names of the view their new layers, in one transaction.
func (m *migration) change(ctx context.Context) error {
	if err := faults.Point(ctx, "store: migrate: all copied"); err != nil {
		return err
	}
	var pending []drivers.ID
	err := m.s.db.update(context.WithoutCancel(ctx), func(t *txn) error {
		pending = nil
		if err := m.same(t); err != nil {
			return err
		}
		if err := m.commitsOnto(t); err != nil {
			return err
		}
		for _, n := range m.members {
			if n.copy == nil {
				return errChanged
			}
			if err := t.rename(m.v.name, n); err != nil {
				return err
			}
			if t.get(bucketPending, idKey(n.copy.ID)) != nil {
				pending = append(pending, n.copy.ID)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range pending {
		m.s.listings.add(id)
	}
	_ = faults.Point(ctx, "store: migrate: switched")
	m.tell()
	return nil
}

// commitsOnto is a *commitsFirst if a snapshot is being committed onto one of the
// members, as what was unpacked without a parent is: its record comes first.
func (m *migration) commitsOnto(t *txn) error {
	return t.each(bucketIntents, func(k, v []byte) error {
		var i intent
		if _, err := decodeID(v, bucketIntents, k, &i); err != nil || i.View != m.v.name {
			return err
		}
		for _, n := range m.members {
			if n.key == i.Parent {
				return &commitsFirst{keyID(k), i.Key, i.Parent}
			}
		}
		return nil
	})
}

type commitsFirst struct {
	id          drivers.ID
	key, parent string
}

func (e *commitsFirst) Error() string {
	return fmt.Sprintf("snapshot %q is being committed onto %q", e.key, e.parent)
}

// rename gives a name its copy, and makes the old layer a debt if nobody else
// names it. The marks of a layer that is not committed are those of now.
func (t *txn) rename(view string, n *member) error {
	l, err := t.layer(n.copy.ID)
	if err != nil {
		return err
	}
	if l == nil {
		return errChanged
	}
	if !l.Committed && l.Exposed != n.layer.Exposed {
		l.Exposed = n.layer.Exposed
		if err := t.putLayer(n.copy.ID, l); err != nil {
			return err
		}
	}
	old := n.ref.ID
	if err := t.delete(bucketMoves, idKey(old)); err != nil {
		return err
	}
	if err := t.deleteName(view, n.key, old); err != nil {
		return err
	}
	moved := *n.name
	moved.ID = n.copy.ID
	if err := t.putName(view, n.key, &moved); err != nil {
		return err
	}
	if len(t.namesOf(old)) > 0 {
		return nil // another view's
	}
	return t.addDebt(old, n.layer, n.ref, "migrated")
}

// recordCopy writes the record of a finished copy.
func (m *migration) recordCopy(ctx context.Context, c *duplicate, block *block) error {
	return m.s.ids.record(ctx, block, func(t *txn) error {
		now, err := t.node(m.v.name, c.n.key)
		if errdefs.IsNotFound(err) || err == nil && (now.ref.ID != c.n.ref.ID || now.layer.Committed != c.n.layer.Committed) {
			return errChanged
		}
		if err != nil {
			return err
		}
		if err := t.dropMove(c.n.ref.ID); err != nil { // one that was of no use
			return err
		}
		if err := t.putLayer(c.ref.ID, c.layer); err != nil {
			return err
		}
		if len(c.ref.Parents) > 0 {
			if t.isDebt(c.ref.Parents[0]) {
				return errChanged
			}
			if err := t.setParent(c.ref.ID, c.ref.Parents[0]); err != nil {
				return err
			}
		}
		if c.layer.Committed && c.layer.Digest == "" {
			if err := t.put(bucketPending, idKey(c.ref.ID), []byte{}); err != nil {
				return err
			}
		}
		return t.putJSON(bucketMoves, idKey(c.n.ref.ID), c.move)
	})
}
