package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/layer"
)

// Problem is a kind of finding.
type Problem string

// What Check and recovery find.
const (
	DatabaseDamaged   Problem = "database-damaged"   // db.bolt contradicts itself
	RecordDamaged     Problem = "record-damaged"     // a record names what is not there
	IndexDamaged      Problem = "index-damaged"      // an index differs from the records; can be made anew
	DriverBroken      Problem = "driver-broken"      // a driver with layers here does not open
	DriverUnknown     Problem = "driver-unknown"     // a driver's directory that this program has no driver for
	LayerMissing      Problem = "layer-missing"      // a record whose bytes are gone
	OrphanLayer       Problem = "orphan-layer"       // bytes that no record names
	LayerForeign      Problem = "layer-foreign"      // a layer into which somebody put what its driver refuses
	ListingMissing    Problem = "listing-missing"    // not computed yet, or gone
	ListingDamaged    Problem = "listing-damaged"    // listings/ID is not what its digest says
	ListingStray      Problem = "listing-stray"      // a listing of no layer
	ContentDamaged    Problem = "content-damaged"    // a layer's bytes are not what its listing says
	InterruptedCommit Problem = "interrupted-commit" // a process died in Commit
	// What drivers find in what they keep layers in.
	StorageState   = Problem(drivers.StorageState)
	StorageDamaged = Problem(drivers.StorageDamaged)
	StorageLeaked  = Problem(drivers.StorageLeaked)
	StrayStorage   = Problem(drivers.StrayStorage)
	OrphanDevice   = Problem(drivers.OrphanDevice)
)

// Finding is one thing that is not as it should be.
type Finding struct {
	Problem    Problem `json:"problem"`
	Object     string  `json:"object"` // VIEW/KEY, DRIVER/ID, or a path in the store
	Detail     string  `json:"detail"`
	Repaired   bool    `json:"repaired"`
	Done       string  `json:"done,omitempty"`       // how it was repaired
	Suggestion string  `json:"suggestion,omitempty"` // what a person can do where it was not
}

func (f Finding) String() string {
	s := fmt.Sprintf("%s: %s: %s", f.Object, f.Problem, f.Detail)
	switch {
	case f.Repaired:
		return s + " (" + f.Done + ")"
	case f.Suggestion != "":
		return s + "; " + f.Suggestion
	}
	return s
}

func (f Finding) done(how string) Finding {
	f.Repaired, f.Done, f.Suggestion = true, how, ""
	return f
}

func (f Finding) cannot(why error, suggestion string) Finding {
	if why != nil {
		f.Detail += ": " + why.Error()
	}
	f.Suggestion = suggestion
	return f
}

// CheckOptions say how thorough a check is. The zero value reads every byte and
// changes none.
type CheckOptions struct {
	// Quick leaves out the bytes of layers: records, structure and listings only.
	Quick bool
	// Repair puts right what can be put right without losing anything: it
	// removes layers that no record names, makes indexes anew and computes missing
	// listings.
	Repair bool
	// Progress, if not nil, is told what is being checked.
	Progress func(CheckProgress)
	// Note, if not nil, is told what was not checked, and why.
	Note func(text string)
}

// CheckProgress is how far a check is.
type CheckProgress struct {
	Object string // the snapshot, driver or file being looked at
	Done   int    // objects looked at
	Total  int    // objects in all
}

// Check compares the records, the drivers' layers, the listings and the bytes
// of every committed layer, and returns what does not agree. It may run while
// others work; what they are changing is left out. The error is that of the check
// itself.
func (s *Store) Check(ctx context.Context, o CheckOptions) ([]Finding, error) {
	if o.Repair && s.o.ReadOnly {
		return nil, fmt.Errorf("snapshot: check: %w", errReadOnly)
	}
	c := &checker{s: s, o: o}
	for _, step := range []func(context.Context) error{
		c.database, c.records, c.drivers, c.strayListings, c.layers,
	} {
		if err := step(ctx); err != nil {
			return c.found, fmt.Errorf("snapshot: check: %w", err)
		}
	}
	return c.found, nil
}

// checker is a check in progress.
type checker struct {
	s     *Store
	o     CheckOptions
	found []Finding
}

func (c *checker) add(f Finding) { c.found = append(c.found, f) }

func (c *checker) progress(object string, done, total int) {
	if c.o.Progress != nil {
		c.o.Progress(CheckProgress{object, done, total})
	}
}

// database checks the file's own structure.
func (c *checker) database(ctx context.Context) error {
	return c.s.db.view(ctx, func(t *txn) error {
		for err := range t.tx.Check() {
			c.add(Finding{Problem: DatabaseDamaged, Object: "db.bolt", Detail: err.Error(), Suggestion: "restore db.bolt from a copy"})
		}
		return nil
	})
}

// records checks that every record names what is there, and the indexes.
func (c *checker) records(ctx context.Context) error {
	var wrong []fix
	err := c.s.db.view(ctx, func(t *txn) (err error) {
		c.found = slices.DeleteFunc(c.found, func(f Finding) bool { return f.Problem == RecordDamaged })
		wrong, err = c.compare(t)
		return err
	})
	if err != nil || len(wrong) == 0 {
		return err
	}
	// What a damaged record says is only in the indexes: they stay as they are.
	damaged := slices.ContainsFunc(c.found, func(f Finding) bool { return f.Problem == RecordDamaged })
	repair := c.o.Repair && !damaged
	if repair {
		err = c.s.db.update(ctx, func(t *txn) error {
			if wrong, err = c.compare(t); err != nil {
				return err
			}
			for _, f := range wrong {
				if err := f.apply(t); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, f := range wrong {
		f.finding.Suggestion = "check with repair makes it anew"
		if damaged {
			f.finding.Suggestion = "see the damaged records first"
		}
		if repair {
			f.finding = f.finding.done("made anew")
		}
		c.add(f.finding)
	}
	return nil
}

// fix is an index entry to be written or deleted.
type fix struct {
	finding     Finding
	bucket, key []byte
	value       []byte // nil: delete
}

func (f fix) apply(t *txn) error {
	if f.value == nil {
		return t.delete(f.bucket, f.key)
	}
	return t.put(f.bucket, f.key, f.value)
}

// compare reports damaged records and returns what is wrong with the indexes.
func (c *checker) compare(t *txn) ([]fix, error) {
	want := map[string]map[string][]byte{string(bucketNames): {}, string(bucketChildren): {}, string(bucketParents): {}}
	for _, view := range t.viewNames() {
		if err := c.compareView(t, view, want); err != nil {
			return nil, err
		}
	}
	_ = t.each(bucketParents, func(k, v []byte) error { // of removed layers, which have no name
		id, parent := keyID(k), keyID(v)
		if len(t.namesOf(id)) == 0 && t.get(bucketLayers, k) != nil {
			want[string(bucketParents)][string(k)] = v
			want[string(bucketChildren)][string(idKey(parent, id))] = []byte{}
		}
		return nil
	})
	if err := c.compareLayers(t); err != nil {
		return nil, err
	}
	var wrong []fix
	for bucket, entries := range want {
		wrong = append(wrong, differences(t, []byte(bucket), entries)...)
	}
	return wrong, nil
}

// compareLayers finds layer records that cannot be read.
func (c *checker) compareLayers(t *txn) error {
	return t.each(bucketLayers, func(k, v []byte) error {
		if _, err := decodeID(v, bucketLayers, k, &layerRecord{}); err != nil {
			c.add(Finding{Problem: RecordDamaged, Object: "layer " + keyID(k).String(), Detail: err.Error(), Suggestion: "restore db.bolt from a copy"})
		}
		return nil
	})
}

func (c *checker) compareView(t *txn, view string, want map[string]map[string][]byte) error {
	return t.view(view).ForEach(func(k, v []byte) error {
		key := string(k)
		object := view + "/" + key
		n, err := decodeName(view, key, v)
		if err != nil {
			c.add(Finding{Problem: RecordDamaged, Object: object, Detail: err.Error(), Suggestion: "restore db.bolt from a copy"})
		}
		if n == nil {
			return nil
		}
		l, err := t.layer(n.ID)
		switch {
		case err != nil: // found by compareLayers
		case l == nil:
			c.add(Finding{Problem: RecordDamaged, Object: object, Detail: fmt.Sprintf("layer %s has no record", n.ID), Suggestion: "restore db.bolt from a copy"})
			return nil
		case t.get(bucketDebts, idKey(n.ID)) != nil:
			c.add(Finding{Problem: RecordDamaged, Object: object, Detail: fmt.Sprintf("layer %s is to be removed", n.ID), Suggestion: "restore db.bolt from a copy before the next gc"})
		}
		want[string(bucketNames)][string(namesKey(n.ID, view, key))] = []byte{}
		if n.Parent == "" {
			return nil
		}
		p, err := t.name(view, n.Parent)
		if err != nil {
			return nil // found when its turn comes
		}
		if p == nil {
			c.add(Finding{Problem: RecordDamaged, Object: object, Detail: fmt.Sprintf("parent %q does not exist", n.Parent), Suggestion: "restore db.bolt from a copy, or remove the snapshot"})
			return nil
		}
		want[string(bucketParents)][string(idKey(n.ID))] = idKey(p.ID)
		want[string(bucketChildren)][string(idKey(p.ID, n.ID))] = []byte{}
		return nil
	})
}

// differences compares a bucket with what it should hold.
func differences(t *txn, bucket []byte, want map[string][]byte) (wrong []fix) {
	finding := func(detail string) Finding {
		return Finding{Problem: IndexDamaged, Object: "db.bolt", Detail: fmt.Sprintf("index %s: %s", bucket, detail)}
	}
	_ = t.each(bucket, func(k, v []byte) error {
		if w, ok := want[string(k)]; !ok {
			wrong = append(wrong, fix{finding(fmt.Sprintf("entry %x of nothing", k)), bucket, slices.Clone(k), nil})
		} else if string(w) != string(v) {
			wrong = append(wrong, fix{finding(fmt.Sprintf("entry %x is wrong", k)), bucket, slices.Clone(k), slices.Clone(w)})
		}
		return nil
	})
	for k, w := range want {
		if t.get(bucket, []byte(k)) == nil {
			wrong = append(wrong, fix{finding(fmt.Sprintf("entry %x is missing", k)), bucket, []byte(k), append([]byte{}, w...)})
		}
	}
	return wrong
}

// drivers compares each driver's layers with the records.
func (c *checker) drivers(ctx context.Context) error {
	known, unknown, err := c.s.driversOnDisk()
	if err != nil {
		return err
	}
	for _, name := range unknown {
		c.add(Finding{Problem: DriverUnknown, Object: "drivers/" + name, Detail: "this program has no such driver", Suggestion: "use a layerctl that has it, or remove the directory if it holds nothing of worth"})
	}
	counts, err := c.s.layerCounts(ctx)
	if err != nil {
		return err
	}
	for name := range counts { // a directory that is gone altogether
		if !slices.Contains(known, name) && !slices.Contains(unknown, name) {
			known = append(known, name)
		}
	}
	slices.Sort(known)
	for i, name := range known {
		c.progress("drivers/"+name, i, len(known))
		if err := c.driver(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) driver(ctx context.Context, name string) error {
	d, err := c.s.driver(ctx, name)
	if err != nil {
		c.add(Finding{Problem: DriverBroken, Object: name, Detail: err.Error(), Suggestion: "make the driver work; its snapshots cannot be used until then"})
		c.examineClosed(ctx, name)
		return ctx.Err()
	}
	if x, ok := d.(drivers.Examiner); ok {
		found, err := x.Examine(ctx, c.examineOptions(name))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.examined(name, found, err)
	}
	// Layers first, records second: a layer made in between has its record then,
	// or a lease that is held.
	orphans, err := c.s.orphans(ctx, d, func(drivers.ID) bool { return true })
	if err != nil {
		c.add(Finding{Problem: DriverBroken, Object: name, Detail: err.Error(), Suggestion: "see the error; its layers were not checked"})
		return ctx.Err()
	}
	for _, id := range orphans {
		if err := c.orphan(ctx, name, d, id); err != nil {
			return err
		}
	}
	if err := c.foreign(ctx, name, d); err != nil {
		return err
	}
	return c.missing(ctx, name, d)
}

// foreign finds layers, removed ones too, into which somebody put what their driver
// refuses.
func (c *checker) foreign(ctx context.Context, driver string, d drivers.Driver) error {
	in, ok := d.(drivers.Inspector)
	if !ok {
		return nil
	}
	for id, err := range d.IDs(ctx) {
		if err != nil {
			return err
		}
		refused := in.Inspect(ctx, id)
		if refused == nil {
			continue
		}
		if !errdefs.IsFailedPrecondition(refused) {
			return refused
		}
		object, err := c.s.objectOf(ctx, driver, id)
		if err != nil {
			return err
		}
		c.add(Finding{Problem: LayerForeign, Object: object, Detail: refused.Error()}) // which says what to do
	}
	return nil
}

// examineClosed has a driver that does not open say more of its storage.
func (c *checker) examineClosed(ctx context.Context, name string) {
	f, err := c.s.o.Registry.Lookup(name)
	if err != nil || f.Examine == nil || ctx.Err() != nil {
		return
	}
	found, err := f.Examine(ctx, drivers.Config{Root: c.s.driverRoot(name), Options: c.s.o.DriverOptions[name]}, c.examineOptions(name))
	c.examined(name, found, err)
}

func (c *checker) examineOptions(driver string) drivers.ExamineOptions {
	o := drivers.ExamineOptions{Repair: c.o.Repair}
	if c.o.Note != nil {
		o.Note = func(text string) { c.o.Note(driver + ": " + text) }
	}
	return o
}

// examined takes over what a driver found.
func (c *checker) examined(driver string, found []drivers.Finding, err error) {
	for _, f := range found {
		c.add(Finding{Problem: Problem(f.Fault), Object: driver + ": " + f.Object, Detail: f.Detail, Repaired: f.Done != "", Done: f.Done, Suggestion: f.Suggestion})
	}
	if err != nil {
		c.add(Finding{Problem: DriverBroken, Object: driver, Detail: err.Error(), Suggestion: "see the error; what the driver keeps its layers in was not checked to the end"})
	}
}

func (c *checker) orphan(ctx context.Context, name string, d drivers.Driver, id drivers.ID) error {
	if alive, err := c.s.inLease(ctx, id); err != nil || alive {
		return err
	}
	if gone, err := c.s.orphans(ctx, d, func(i drivers.ID) bool { return i == id }); err != nil || len(gone) == 0 {
		return err // recorded or removed meanwhile
	}
	f := Finding{Problem: OrphanLayer, Object: name + "/" + id.String(), Detail: "no record names this layer", Suggestion: "check with repair removes it"}
	if !c.o.Repair {
		c.add(f)
		return nil
	}
	if ok, err := c.s.removeOrphan(ctx, name, d, id); err != nil || !ok {
		return err
	}
	c.add(f.done("removed"))
	return nil
}

// inLease reports whether a living process may be making the layer.
func (s *Store) inLease(ctx context.Context, id drivers.ID) (alive bool, err error) {
	var first drivers.ID
	err = s.db.view(ctx, func(t *txn) error {
		first = 0
		return t.each(bucketLeases, func(k, v []byte) error {
			var l lease
			_, err := decodeID(v, bucketLeases, k, &l)
			if lo := keyID(k); lo <= id && id < l.End {
				first = lo
			}
			return err
		})
	})
	return err == nil && first != 0 && !s.isFree(leasePlace(first)), err
}

// missing finds records whose bytes are gone.
func (c *checker) missing(ctx context.Context, driver string, d drivers.Driver) error {
	recorded, err := c.s.recorded(ctx, driver)
	if err != nil || len(recorded) == 0 {
		return err
	}
	for id, err := range d.IDs(ctx) {
		if err != nil {
			return err
		}
		if object, ok := recorded[id]; ok {
			if err := c.lost(ctx, d, id, object); err != nil {
				return err
			}
		}
		delete(recorded, id)
	}
	if len(recorded) == 0 {
		return nil
	}
	still, err := c.s.recorded(ctx, driver) // less those removed meanwhile
	if err != nil {
		return err
	}
	for id := range recorded {
		if object, ok := still[id]; ok {
			c.add(Finding{Problem: LayerMissing, Object: object, Detail: fmt.Sprintf("driver %s has no layer %s", driver, id), Suggestion: "remove the snapshot and what is above it, or restore the driver's directory"})
		}
	}
	return nil
}

// lost finds a layer of which the driver has something, but not what is to be
// mounted.
func (c *checker) lost(ctx context.Context, d drivers.Driver, id drivers.ID, object string) error {
	n, _, err := c.s.committedNode(ctx, id)
	if err != nil || n == nil {
		return err // removed meanwhile
	}
	if _, err := d.Mounts(ctx, n.ref, drivers.MountOptions{ReadOnly: true}); errdefs.IsDataLoss(err) {
		c.add(Finding{Problem: LayerMissing, Object: object, Detail: err.Error(), Suggestion: "remove the snapshot and what is above it, or restore the driver's directory"})
	}
	return nil
}

// recorded returns the layers of a driver that are not to be removed, each with
// what to call it.
func (s *Store) recorded(ctx context.Context, driver string) (map[drivers.ID]string, error) {
	all := map[drivers.ID]string{}
	err := s.db.view(ctx, func(t *txn) error {
		clear(all)
		return t.eachLayer(func(id drivers.ID, l *layerRecord) error {
			if l.Driver == driver && !t.isDebt(id) {
				all[id] = t.objectOf(id, l)
			}
			return nil
		})
	})
	return all, err
}

// objectOf is what findings call a layer of a driver, recorded or not.
func (s *Store) objectOf(ctx context.Context, driver string, id drivers.ID) (object string, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		object = t.objectOf(id, &layerRecord{Driver: driver})
		return nil
	})
	return object, err
}

// objectOf is what findings call a layer: its first name, else driver and ID.
func (t *txn) objectOf(id drivers.ID, l *layerRecord) string {
	if names := t.namesOf(id); len(names) > 0 {
		return names[0].View + "/" + names[0].Key
	}
	return l.Driver + "/" + id.String()
}

// strayListings finds files in listings/ that belong to no layer.
func (c *checker) strayListings(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(c.s.root, "listings"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return rootError(err)
	}
	for _, e := range entries {
		if err := c.strayListing(ctx, e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) strayListing(ctx context.Context, file string) error {
	base, part := strings.CutSuffix(file, ".part")
	id, ok := drivers.ParseID(base)
	if ok {
		has, err := c.s.hasLayer(ctx, id)
		if err != nil || has {
			return err
		}
		if part && !c.s.isFree(listingPlace(id)) {
			return nil
		}
	}
	if _, err := os.Lstat(filepath.Join(c.s.root, "listings", file)); errors.Is(err, os.ErrNotExist) {
		return nil // it went with its layer meanwhile
	}
	f := Finding{Problem: ListingStray, Object: "listings/" + file, Detail: "there is no such layer", Suggestion: "check with repair removes it"}
	if ok && c.o.Repair {
		if err := os.Remove(filepath.Join(c.s.root, "listings", file)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return rootError(err)
		}
		f = f.done("removed")
	}
	c.add(f)
	return nil
}

func (s *Store) hasLayer(ctx context.Context, id drivers.ID) (ok bool, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		ok = t.get(bucketLayers, idKey(id)) != nil
		return nil
	})
	return ok, err
}

// layers checks the listing, and unless Quick the bytes, of every committed
// layer.
func (c *checker) layers(ctx context.Context) error {
	ids, err := c.s.committed(ctx)
	if err != nil {
		return err
	}
	for i, id := range ids {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := c.layer(ctx, id, i, len(ids))
		if errdefs.IsDataLoss(err) && ctx.Err() == nil {
			c.add(Finding{Problem: RecordDamaged, Object: "layer " + id.String(), Detail: err.Error(), Suggestion: "see the other damaged records"})
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) committed(ctx context.Context) (ids []drivers.ID, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		ids = nil
		return t.eachLayer(func(id drivers.ID, l *layerRecord) error {
			if l.Committed && !t.isDebt(id) {
				ids = append(ids, id)
			}
			return nil
		})
	})
	return ids, err
}

// layer checks one committed layer, which a shared lock keeps from going away.
func (c *checker) layer(ctx context.Context, id drivers.ID, done, total int) error {
	release, err := c.s.locks.shared(ctx, layerPlace(id), "a layer to be checked")
	if err != nil {
		return err
	}
	defer release()
	n, object, err := c.s.committedNode(ctx, id)
	if err != nil || n == nil {
		return err // removed meanwhile
	}
	c.progress(object, done, total)
	if !c.s.driverHas(ctx, n) {
		return nil // found by drivers, if it is a finding
	}
	if n.layer.Digest == "" {
		return c.unlisted(ctx, n, object)
	}
	ok, err := c.listing(ctx, n, object)
	if err != nil || !ok || c.o.Quick {
		return err
	}
	return c.bytes(ctx, n, object)
}

func (s *Store) committedNode(ctx context.Context, id drivers.ID) (n *node, object string, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		if n, err = t.layerNode(id); err != nil || n == nil {
			return err
		}
		object = t.objectOf(id, n.layer)
		if t.get(bucketDebts, idKey(id)) != nil {
			n = nil
		}
		return nil
	})
	return n, object, err
}

// driverHas reports whether the driver opens and has the layer.
func (s *Store) driverHas(ctx context.Context, n *node) bool {
	d, err := s.driverOf(ctx, n)
	if err != nil {
		return false
	}
	_, err = d.Mounts(ctx, n.ref, drivers.MountOptions{})
	return !errdefs.IsNotFound(err)
}

// unlisted computes a listing that is pending, with Repair; without, a pending
// listing is only a finding if nobody is at it.
func (c *checker) unlisted(ctx context.Context, n *node, object string) error {
	f := Finding{Problem: ListingMissing, Object: object, Detail: "the listing was not computed yet", Suggestion: "check with repair computes it"}
	if !c.o.Repair {
		if !c.s.isFree(listingPlace(n.ref.ID)) {
			return nil
		}
		n, _, err := c.s.committedNode(ctx, n.ref.ID) // who was at it may just have finished
		if err == nil && n != nil && n.layer.Digest == "" {
			c.add(f)
		}
		return err
	}
	if err := c.s.list(ctx, n.ref.ID, c.s.locks.exclusive); err != nil {
		c.add(f.cannot(err, f.Suggestion))
		return ctx.Err()
	}
	c.add(f.done("computed"))
	return nil
}

var errOtherDigest = errors.New("another digest")

// rewriteListing writes a layer's listing anew, unless it comes out with another
// digest than the recorded one.
func (s *Store) rewriteListing(ctx context.Context, from, to *node) (d digest.Digest, err error) {
	release, err := s.locks.exclusive(ctx, listingPlace(to.ref.ID), "the listing of layer "+to.ref.ID.String())
	if err != nil {
		return "", err
	}
	defer release()
	return s.writeListing(to.ref.ID, false, func(w *layer.ListingWriter) error { return s.listChanges(ctx, w, from, to) }, func(got digest.Digest) error {
		if got != to.layer.Digest {
			return errOtherDigest
		}
		return nil
	})
}
