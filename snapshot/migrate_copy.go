package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// duplicate is a copy being made by the new driver.
type duplicate struct {
	n       *member
	ref     drivers.Ref // of the copy
	parent  *node       // the original's parent; nil if it has none
	move    *move
	layer   *layerRecord // of the copy
	sockets []string
}

// copyOne makes the copy of a member and records it. Its layer is locked.
func (m *migration) copyOne(ctx context.Context, n *member) error {
	if n.layer.Committed && n.layer.Digest == "" { // so that the listing is of the original
		if err := m.s.list(ctx, n.ref.ID, m.s.locks.exclusive); err != nil {
			return err
		}
		if err := m.again(ctx, n); err != nil {
			return err
		}
	}
	return m.s.underNewID(ctx, m.o.To, func(id drivers.ID, block *block) error { return m.tryCopy(ctx, n, id, block) })
}

// again reads a member, which is locked; errChanged if the key has another layer
// now, or none.
func (m *migration) again(ctx context.Context, n *member) error {
	return m.s.db.view(ctx, func(t *txn) error {
		now, err := t.node(m.v.name, n.key)
		if errdefs.IsNotFound(err) || err == nil && now.ref.ID != n.ref.ID {
			return errChanged
		}
		if err == nil {
			n.node = now
		}
		return err
	})
}

// tryCopy makes the copy under the ID. What is not recorded is removed again.
func (m *migration) tryCopy(ctx context.Context, n *member, id drivers.ID, block *block) error {
	c := &duplicate{n: n, ref: drivers.Ref{ID: id}, move: &move{ID: id, Driver: m.o.To, Since: time.Now().UnixNano()}}
	release, err := m.onCopies(ctx, c)
	if err == nil {
		defer release()
		err = m.createCopy(ctx, c)
	}
	if errdefs.IsAlreadyExists(err) {
		m.s.ids.settled(block, nil)
		return fmt.Errorf("%w: %w", errStray, err)
	}
	if err == nil {
		err = m.fill(ctx, c)
	}
	if err == nil {
		err = m.recordCopy(ctx, c, block)
	}
	switch {
	case errors.Is(err, errUnsure):
		return err // the lease stays: recovery finds out whether there is a record
	case err != nil:
		undo := &creation{v: m.v, driver: m.o.To, d: m.d, id: id, ref: c.ref}
		return errors.Join(err, m.s.removeListing(id), undo.discard(ctx, block))
	}
	n.copy = c.move
	m.note(n, MigrateMoved)
	r := m.seen[n.ref.ID]
	r.State, r.Bytes, r.Sockets = MigrateMoved, max(c.layer.Bytes, 0), c.sockets
	m.seen[n.ref.ID] = r
	return faults.Point(ctx, "store: migrate: recorded")
}

// onCopies puts a copy onto its parent's copy, which stays until release.
func (m *migration) onCopies(ctx context.Context, c *duplicate) (release func(), err error) {
	if len(c.n.ref.Parents) == 0 {
		return func() {}, nil
	}
	if c.parent, err = m.s.parentNode(ctx, c.n.node); err != nil {
		return nil, err
	}
	at := slices.IndexFunc(m.members, func(p *member) bool { return p.ref.ID == c.n.ref.Parents[0] })
	if at < 0 || m.members[at].copy == nil || c.parent == nil {
		return nil, errChanged
	}
	below := m.members[at].copy.ID
	if release, err = m.s.locks.shared(ctx, layerPlace(below), "a copied layer"); err != nil {
		return nil, err
	}
	err = m.s.db.view(ctx, func(t *txn) error {
		l, err := t.layer(below)
		if err == nil && (l == nil || t.isDebt(below)) { // its original was removed
			err = errChanged
		}
		if err != nil {
			return err
		}
		ref, err := t.ref(below)
		c.ref.Parents = append([]drivers.ID{below}, ref.Parents...)
		return err
	})
	if err != nil {
		release()
	}
	return release, err
}

func (m *migration) createCopy(ctx context.Context, c *duplicate) error {
	o := m.createOptions(c.n)
	if o.Quota > 0 && c.n.name.Labels[snapshots.LabelSnapshotMaxSize] != "" {
		_, err := m.s.createHinted(ctx, m.d, c.ref, o)
		return err
	}
	return m.d.Create(ctx, c.ref, o)
}

func (m *migration) createOptions(n *member) drivers.CreateOptions {
	o := drivers.CreateOptions{ReadOnly: n.isView(), Volatile: m.s.o.Volatile}
	if m.d.Capabilities().Quota { // else refuse has had its say
		o.Quota = n.layer.Quota
	}
	return o
}

// fill brings the changes over, freezes them if the original is committed, and
// sees that the copy has the changes that the original has.
func (m *migration) fill(ctx context.Context, c *duplicate) error {
	was := c.n.layer
	c.layer = &layerRecord{
		Driver: m.o.To, Committed: was.Committed, ReadOnly: was.ReadOnly, Volatile: was.Volatile, Exposed: was.Exposed,
		Created: was.Created, Digest: was.Digest, Applied: was.Applied, Quota: was.Quota,
	}
	if err := faults.Point(ctx, "store: migrate: made"); err != nil {
		return err
	}
	if c.n.isView() {
		return m.settle()
	}
	sum, err := m.transfer(ctx, c)
	if err != nil {
		return err
	}
	if err := faults.Point(ctx, "store: migrate: transferred"); err != nil {
		return err
	}
	if was.Committed {
		u, err := m.d.Commit(ctx, c.ref, drivers.CommitOptions{Volatile: m.s.o.Volatile})
		if err != nil {
			return err
		}
		c.layer.Bytes, c.layer.Inodes = u.Bytes, u.Inodes
	} else if u, err := m.d.Usage(ctx, c.ref); err == nil {
		c.layer.Bytes = u.Bytes // for the report; it counts when it is committed
	}
	if err := faults.Point(ctx, "store: migrate: frozen"); err != nil {
		return err
	}
	c.move.Digest = sum.String()
	if err := m.compare(ctx, c, sum); err != nil {
		return err
	}
	if !was.Committed {
		if err := m.settle(); err != nil {
			return err
		}
	}
	if err := m.keepListing(c); err != nil {
		return err
	}
	return faults.Point(ctx, "store: migrate: listed")
}

// settle flushes what Create of a layer that is not committed need not have
// flushed: the old bytes, which a cut cannot take any more, go after this.
func (m *migration) settle() error {
	if m.s.o.Volatile {
		return nil
	}
	dir, err := sys.OpenDir(m.s.driverRoot(m.o.To))
	if err != nil {
		return rootError(err)
	}
	defer dir.Close()
	return rootError(dir.SyncFS())
}

// transfer writes the original's changes as an archive and has the copy unpack
// it, and returns the digest of their listing.
func (m *migration) transfer(ctx context.Context, c *duplicate) (sum digest.Digest, err error) {
	changes, done, err := m.s.changes(ctx, c.parent, c.n.node)
	if err != nil {
		return "", err
	}
	defer done()
	t, err := m.s.tree(ctx, c.n.node)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	root, err := os.OpenRoot(t.path)
	if err != nil {
		return "", rootError(err)
	}
	defer root.Close()
	r, w := io.Pipe()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		sum, err = fillListing(io.Discard, func(l *layer.ListingWriter) error {
			o := layer.TarOptions{Listing: l, Progress: m.counter(c.n.key)}
			_, err := layer.WriteTar(gctx, w, c.socketsOf(root, changes), o)
			return err
		})
		w.CloseWithError(err)
		return err
	})
	g.Go(func() error {
		err := m.unpack(gctx, c, r)
		r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
		return err
	})
	err = g.Wait() // apart: sum is read after it
	return sum, err
}

// unpack has the copy unpack an archive. An active one without a parent gets it by
// a mount, as what it holds came there: what its driver unpacks without a parent
// waits for one (drivers.Capabilities.Rebase).
func (m *migration) unpack(ctx context.Context, c *duplicate, r io.Reader) error {
	o := layer.ApplyOptions{Limits: noLimits, Volatile: m.s.o.Volatile}
	if !c.n.active() || len(c.ref.Parents) > 0 || !m.d.Capabilities().Rebase {
		return (&application{s: m.s, n: c.node()}).unpack(ctx, r, o)
	}
	t, err := m.s.detached(ctx, c.node(), drivers.MountOptions{})
	if err != nil {
		return err
	}
	o.OverrideStat = m.s.overrides(ctx, c.node())
	return errors.Join(layer.Apply(ctx, t.path, r, o), t.close())
}

// noLimits: what is there was let in.
var noLimits = layer.Limits{Entries: -1, Depth: -1, PathBytes: -1, FileSize: -1, Size: -1, XattrSize: -1, Xattrs: -1, PAXBytes: -1, Sparse: -1}

// counter returns what is told the bytes of an archive.
func (m *migration) counter(key string) func(int64) {
	before := m.bytes
	return func(n int64) {
		m.bytes = before + n
		m.progress(key)
	}
}

// node is the copy as a node of the store, before it has a record.
func (c *duplicate) node() *node {
	return &node{key: c.n.key, name: &name{ID: c.ref.ID, Kind: c.n.name.Kind}, layer: c.layer, ref: c.ref}
}

// socketsOf passes changes on and notes the sockets in the directories among
// them: a directory in which a socket was made has changed.
func (c *duplicate) socketsOf(root *os.Root, changes iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		for ch, err := range changes {
			if err == nil && ch.Kind != layer.Deleted && ch.Entry.Type == layer.TypeDir {
				err = c.socketsIn(root, ch.Entry.Path)
			}
			if !yield(ch, err) {
				return
			}
		}
	}
}

func (c *duplicate) socketsIn(root *os.Root, dir string) error {
	f, err := root.Open(dir)
	if err != nil {
		return rootError(err)
	}
	defer f.Close()
	for {
		entries, err := f.ReadDir(1024)
		for _, e := range entries {
			if e.Type() == fs.ModeSocket {
				c.sockets = append(c.sockets, path.Join(dir, e.Name()))
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return rootError(err)
		}
	}
}

// compare sees that the copy's changes have the digest of the original's.
func (m *migration) compare(ctx context.Context, c *duplicate, want digest.Digest) error {
	got, err := m.s.digestOf(ctx, c.node())
	if err != nil || got == want {
		return err
	}
	err = fmt.Errorf("the copy's changes have digest %s, the original's %s: %s: %w", got, want, m.different(ctx, c), errdefs.ErrDataLoss)
	if lost := m.d.Capabilities().Lost; len(lost) > 0 {
		err = fmt.Errorf("%w (driver %s cannot keep here: %s)", err, m.o.To, strings.Join(lost, ", "))
	}
	return err
}

// digestOf is the digest of the listing of what a layer changes in the one below it.
func (s *Store) digestOf(ctx context.Context, n *node) (digest.Digest, error) {
	below, err := s.parentNode(ctx, n)
	if err != nil {
		return "", err
	}
	return fillListing(io.Discard, func(l *layer.ListingWriter) error { return s.listChanges(ctx, l, below, n) })
}

// different says for an error which paths of original and copy differ.
func (m *migration) different(ctx context.Context, c *duplicate) string {
	const few = 5
	var paths []string
	err := m.s.diff(ctx, c.n.node, c.node(), func(ch layer.Change, err error) bool {
		paths = append(paths, ch.Entry.Path)
		return len(paths) < few
	})
	if err != nil && !errors.Is(err, errStop) {
		return err.Error()
	}
	if len(paths) == 0 {
		return "the trees are equal, their changes are not"
	}
	return "they differ in " + list(paths)
}

// keepListing gives the copy the original's listing. It never changes in its
// place, so one file serves both; what is not there, or cannot be linked, Check
// finds as before, or makes anew.
func (m *migration) keepListing(c *duplicate) error {
	if c.layer.Digest == "" {
		return nil
	}
	err := os.Link(m.s.listingPath(c.n.ref.ID), m.s.listingPath(c.ref.ID))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return rootError(err)
	case m.s.o.Volatile:
		return nil
	}
	return rootError(syncDir(path.Join(m.s.root, "listings")))
}

// copyUncommitted makes the copy of a view, or of an active snapshot unless there
// is one with the changes that it has now.
func (m *migration) copyUncommitted(ctx context.Context, n *member) error {
	if n.copy != nil && n.isView() {
		return nil
	}
	if n.copy != nil {
		now, err := m.s.digestOf(ctx, n.node)
		if err != nil || now.String() == n.copy.Digest {
			return err
		}
	}
	return m.copyOne(ctx, n)
}

// refuseEarly says what finish would refuse, before anything is copied.
func (m *migration) refuseEarly(ctx context.Context) error {
	for _, n := range m.members {
		if !n.active() {
			continue
		}
		release, err := m.s.locks.shared(ctx, layerPlace(n.ref.ID), fmt.Sprintf("snapshot %q", n.key))
		if err != nil {
			return err
		}
		err = m.again(ctx, n)
		if err == nil && n.active() {
			err = m.refuse(ctx, n)
		}
		release()
		if err != nil && !errors.Is(err, errChanged) {
			return fmt.Errorf("%q: %w", n.key, err)
		}
	}
	return nil
}

// refuseActive refuses active snapshots that cannot be copied exactly: somebody
// may be writing, or what is stored is not what is shown.
func (m *migration) refuseActive(ctx context.Context) error {
	for _, n := range m.members {
		if !n.active() {
			continue
		}
		if err := m.refuse(ctx, n); err != nil {
			return fmt.Errorf("%q: %w", n.key, err)
		}
	}
	return nil
}

func (m *migration) refuse(ctx context.Context, n *member) error {
	d, err := m.s.driverOf(ctx, n.node)
	if err != nil {
		return err
	}
	ms, err := d.Mounts(ctx, n.ref, drivers.MountOptions{})
	if err != nil {
		return err
	}
	switch {
	case readOnly(ms):
		return fmt.Errorf("a Commit of it got as far as freezing it; commit it again, or remove it: %w", errdefs.ErrFailedPrecondition)
	case mapped(ms):
		return fmt.Errorf("it shows other owners than it stores (an id map): commit it first: %w", errdefs.ErrFailedPrecondition)
	case n.layer.Quota > 0 && !m.d.Capabilities().Quota && n.name.Labels[snapshots.LabelSnapshotMaxSize] == "":
		return fmt.Errorf("it has a quota of %d bytes, and driver %s has none here: commit it first: %w", n.layer.Quota, m.o.To, errdefs.ErrFailedPrecondition)
	case len(n.ref.Parents) == 0 && d.Capabilities().Rebase && !n.layer.Committed && n.layer.wasWritten() && !plainBind(ms):
		return fmt.Errorf("it was unpacked without a parent and may still get one: commit it first: %w", errdefs.ErrFailedPrecondition)
	}
	if err := inUse(ctx, d, n.ref.ID); err != nil {
		return err
	}
	for _, shown := range ms {
		if shown.Type != "bind" {
			continue
		}
		if where, err := mount.Shown(shown.Source); err != nil || len(where) > 0 {
			return errors.Join(err, mountedElsewhere(where))
		}
	}
	return nil
}

// wasWritten reports whether the layer may hold anything: mounts were handed out,
// or an archive was unpacked.
func (l *layerRecord) wasWritten() bool { return l.Exposed || l.Applied }

func mountedElsewhere(where []mount.Holder) error {
	if len(where) == 0 {
		return nil
	}
	return fmt.Errorf("is mounted, %s: unmount it first: %w", where[0], errdefs.ErrFailedPrecondition)
}

// mapped reports whether mounts show other owners than what they mount.
func mapped(ms []mount.Mount) bool {
	return slices.ContainsFunc(ms, func(m mount.Mount) bool {
		return slices.ContainsFunc(m.Options, func(o string) bool {
			return strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=") || strings.HasPrefix(o, "uidmapping=") || strings.HasPrefix(o, "gidmapping=")
		})
	})
}
