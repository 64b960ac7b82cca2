package snapshot

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/drivers"
)

// maxKey bounds the bytes of a key: bbolt's bound of 32 KiB less what the
// indexes put before it, rounded down to what anybody could mean.
const maxKey = 16 << 10

// View is a handle of one key space of a store and a containerd
// snapshots.Snapshotter. It is safe for concurrent use, cheap, and needs no
// closing.
type View struct {
	s      *Store
	name   string
	driver string // "" is the store's default one
	mounts drivers.MountOptions
}

var (
	_ snapshots.Snapshotter = (*View)(nil)
	_ snapshots.Cleaner     = (*View)(nil)
)

// View returns the view called name, which exists as soon as it holds a record.
// driver makes its layers; a layer with a parent must be that driver's. With
// driver "" a layer is its parent's driver's, and the store's default one's if it
// has no parent. ErrInvalidArgument for a bad name, ErrNotFound for an unknown
// driver.
func (s *Store) View(name, driver string) (*View, error) {
	if name == "" || len(name) > 255 || strings.ContainsAny(name, "\x00/\n") {
		return nil, fmt.Errorf("snapshot: view %q: a name has 1 to 255 bytes and no slash: %w", name, errdefs.ErrInvalidArgument)
	}
	if driver != "" {
		if _, err := s.o.Registry.Lookup(driver); err != nil {
			return nil, fmt.Errorf("snapshot: view %s: %w", name, err)
		}
	}
	return &View{s: s, name: name, driver: driver, mounts: drivers.MountOptions{External: true}}, nil
}

// Views returns the names of the views that hold records, sorted.
func (s *Store) Views(ctx context.Context) (names []string, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		names = t.viewNames()
		return nil
	})
	return names, err
}

// Counts returns how many snapshots each view holds, of those that hold any.
func (s *Store) Counts(ctx context.Context) (counts map[string]int, err error) {
	err = s.db.view(ctx, func(t *txn) error {
		counts = map[string]int{}
		for _, name := range t.viewNames() {
			counts[name] = t.view(name).Stats().KeyN
		}
		return nil
	})
	return counts, err
}

func (t *txn) viewNames() (names []string) {
	_ = t.each(bucketViews, func(k, v []byte) error {
		if b := t.view(string(k)); v == nil && b != nil {
			if k0, _ := b.Cursor().First(); k0 != nil {
				names = append(names, string(k))
			}
		}
		return nil
	})
	return names
}

// With returns a handle of the same view whose Prepare, View and Mounts return
// mounts made with o. View returns handles with External set.
func (v *View) With(o drivers.MountOptions) *View {
	w := *v
	w.mounts = o
	return &w
}

// Name returns the view's name.
func (v *View) Name() string { return v.name }

// Store returns the store that the view is in.
func (v *View) Store() *Store { return v.s }

// Close does nothing: the Store is what is closed.
func (v *View) Close() error { return nil }

// fail gives an error of this package its one form.
func (v *View) fail(op, key string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("snapshot: %s %q: %w", op, key, err)
}

func checkKey(key string) error {
	if key == "" || len(key) > maxKey {
		return fmt.Errorf("a key has 1 to %d bytes: %w", maxKey, errdefs.ErrInvalidArgument)
	}
	return nil
}

func notFound(what, key string) error {
	return fmt.Errorf("%s %q does not exist: %w", what, key, errdefs.ErrNotFound)
}

// node is a key with its layer.
type node struct {
	key   string
	name  *name
	layer *layerRecord
	ref   drivers.Ref
}

// node resolves a key; ErrNotFound.
func (t *txn) node(view, key string) (*node, error) {
	n, err := t.name(view, key)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, notFound("snapshot", key)
	}
	l, err := t.layer(n.ID)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, fmt.Errorf("snapshot %q: layer %s has no record: %w", key, n.ID, errdefs.ErrDataLoss)
	}
	ref, err := t.ref(n.ID)
	return &node{key, n, l, ref}, err
}

func (v *View) resolve(ctx context.Context, key string) (n *node, err error) {
	err = v.s.db.view(ctx, func(t *txn) error {
		n, err = t.node(v.name, key)
		return err
	})
	return n, err
}

// pin resolves a key and locks its layer, shared: until release it is neither
// committed nor removed, and its parents stay.
func (v *View) pin(ctx context.Context, key string) (*node, func(), error) {
	return v.lockLayer(ctx, key, v.s.locks.shared)
}

type lockFunc func(ctx context.Context, p place, what string) (release func(), err error)

func (v *View) lockLayer(ctx context.Context, key string, lock lockFunc) (*node, func(), error) {
	n, err := v.resolve(ctx, key)
	for err == nil {
		release, lerr := lock(ctx, layerPlace(n.name.ID), fmt.Sprintf("snapshot %q", key))
		if lerr != nil {
			return nil, nil, lerr
		}
		id := n.name.ID
		if n, err = v.resolve(ctx, key); err == nil && n.name.ID == id {
			return n, release, nil
		}
		release() // it changed before we had the lock
	}
	return nil, nil, err
}

// driverOf returns the driver of a layer.
func (s *Store) driverOf(ctx context.Context, n *node) (drivers.Driver, error) {
	return s.driver(ctx, n.layer.Driver)
}

// Stat implements snapshots.Snapshotter.
func (v *View) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = v.s.db.view(ctx, func(t *txn) error {
		n, err := t.name(v.name, key)
		if err != nil {
			return err
		}
		if n == nil {
			return notFound("snapshot", key)
		}
		info = n.info(key)
		return nil
	})
	return info, v.fail("stat", key, err)
}

// Update implements snapshots.Snapshotter: labels are what can be updated.
func (v *View) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = v.s.db.update(ctx, func(t *txn) error {
		n, err := t.name(v.name, info.Name)
		if err != nil {
			return err
		}
		if n == nil {
			return notFound("snapshot", info.Name)
		}
		if n.Labels, err = updateLabels(n.Labels, info.Labels, fieldpaths); err != nil {
			return err
		}
		n.Updated = time.Now().UnixNano()
		updated = n.info(info.Name)
		return t.putName(v.name, info.Name, n)
	})
	if err != nil {
		return snapshots.Info{}, v.fail("update", info.Name, err)
	}
	return updated, nil
}

// updateLabels returns the labels after an update of fieldpaths, all if none is
// named. A label whose new value is empty goes.
func updateLabels(old, from map[string]string, fieldpaths []string) (map[string]string, error) {
	if len(fieldpaths) == 0 {
		return keptLabels(from), nil
	}
	labels := keptLabels(old)
	for _, p := range fieldpaths {
		key, one := strings.CutPrefix(p, "labels.")
		switch {
		case one:
			if labels == nil {
				labels = map[string]string{}
			}
			labels[key] = from[key]
		case p == "labels":
			labels = keptLabels(from)
		default:
			return nil, fmt.Errorf("field %q cannot be updated: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	return keptLabels(labels), nil
}

// keptLabels copies labels without those of an empty value, as containerd keeps
// them; nil if none is left.
func keptLabels(labels map[string]string) map[string]string {
	var kept map[string]string
	for k, l := range labels {
		if l == "" {
			continue
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[k] = l
	}
	return kept
}

// Walk implements snapshots.Snapshotter, in order of the keys. fn is called
// after all was read, so it may call anything; what changes meanwhile is not
// seen.
func (v *View) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return fmt.Errorf("snapshot: walk: %w", err)
	}
	var found []snapshots.Info
	err = v.s.db.view(ctx, func(t *txn) error {
		return t.eachName(v.name, func(key string, n *name) error {
			if info := n.info(key); filter.Match(adapt(&info)) {
				found = append(found, info)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("snapshot: walk: %w", err)
	}
	for _, info := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// eachName calls fn for every record of a view, in order of the keys.
func (t *txn) eachName(view string, fn func(key string, n *name) error) error {
	b := t.view(view)
	if b == nil {
		return nil
	}
	return b.ForEach(func(k, v []byte) error {
		n, err := decodeName(view, string(k), v)
		if err != nil || n == nil {
			return err
		}
		return fn(string(k), n)
	})
}

// adapt gives filters the fields that containerd's have: name, parent, kind and
// labels.
func adapt(i *snapshots.Info) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "name":
			return i.Name, true
		case "parent":
			return i.Parent, true
		case "kind":
			return strings.ToLower(i.Kind.String()), i.Kind != snapshots.KindUnknown
		case "labels":
			l, ok := i.Labels[strings.Join(path[1:], ".")]
			return l, ok
		}
		return "", false
	})
}

// Usage implements snapshots.Snapshotter: a committed snapshot's as it was
// measured at Commit, others' by asking the driver. What a driver cannot know is 0.
func (v *View) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	u, err := v.UsageKnown(ctx, key)
	return snapshots.Usage{Size: max(u.Bytes, 0), Inodes: max(u.Inodes, 0)}, err
}

// UsageKnown is Usage, with -1 for what the driver cannot know.
func (v *View) UsageKnown(ctx context.Context, key string) (drivers.Usage, error) {
	u, err := v.usage(ctx, key)
	return u, v.fail("usage", key, err)
}

func (v *View) usage(ctx context.Context, key string) (drivers.Usage, error) {
	n, err := v.resolve(ctx, key)
	if err != nil {
		return drivers.Usage{}, err
	}
	if n.layer.Committed {
		return n.layer.usage(), nil
	}
	n, release, err := v.pin(ctx, key)
	if err != nil {
		return drivers.Usage{}, err
	}
	defer release()
	d, err := v.s.driverOf(ctx, n)
	if err != nil {
		return drivers.Usage{}, err
	}
	return d.Usage(ctx, n.ref)
}

func (l *layerRecord) usage() drivers.Usage { return drivers.Usage{Bytes: l.Bytes, Inodes: l.Inodes} }

// Mounts implements snapshots.Snapshotter: of active snapshots and views;
// ErrFailedPrecondition for a committed one (see MountsWith).
func (v *View) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	ms, err := v.mountsOf(ctx, key, v.mounts, false)
	return ms, v.fail("mounts", key, err)
}

// MountsWith returns the mounts of any snapshot, made with o. A committed one
// is read-only.
func (v *View) MountsWith(ctx context.Context, key string, o drivers.MountOptions) ([]mount.Mount, error) {
	ms, err := v.mountsOf(ctx, key, o, true)
	return ms, v.fail("mounts", key, err)
}

func (v *View) mountsOf(ctx context.Context, key string, o drivers.MountOptions, committed bool) ([]mount.Mount, error) {
	n, release, err := v.pin(ctx, key)
	if err != nil {
		return nil, err
	}
	defer release()
	if n.layer.Committed && !committed {
		return nil, fmt.Errorf("is committed, neither active nor a view: %w", errdefs.ErrFailedPrecondition)
	}
	d, err := v.s.driverOf(ctx, n)
	if err != nil {
		return nil, err
	}
	ms, err := d.Mounts(ctx, n.ref, o)
	if err != nil {
		return nil, err
	}
	if !readOnly(ms) {
		return ms, v.s.expose(ctx, n)
	}
	if n.name.Kind == snapshots.KindActive && !o.ReadOnly {
		return nil, fmt.Errorf("a Commit of it got as far as freezing it; commit it again, or remove it: %w", errdefs.ErrFailedPrecondition)
	}
	return ms, nil
}

// readOnly reports whether mounts show a layer that cannot be written.
func readOnly(ms []mount.Mount) bool {
	return len(ms) > 0 && ms[len(ms)-1].ReadOnly()
}

// expose records that mounts of a writable layer were handed out, so that what
// Apply says of it need not be true any more.
func (s *Store) expose(ctx context.Context, n *node) error {
	if n.layer.Exposed || s.o.ReadOnly {
		return nil
	}
	return s.db.update(ctx, func(t *txn) error {
		l, err := t.layer(n.name.ID)
		if err != nil || l == nil || l.Exposed {
			return err
		}
		l.Exposed = true
		return t.putLayer(n.name.ID, l)
	})
}

// Record is all that the store knows of a snapshot.
type Record struct {
	View     string            `json:"view"`
	Key      string            `json:"key"`
	Kind     snapshots.Kind    `json:"kind"`
	Parent   string            `json:"parent,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Created  time.Time         `json:"created"`
	Updated  time.Time         `json:"updated"`
	Driver   string            `json:"driver"`
	ID       drivers.ID        `json:"id"`
	Parents  []drivers.ID      `json:"parents,omitempty"` // nearest first
	Usage    drivers.Usage     `json:"usage"`             // zero unless committed
	Volatile bool              `json:"volatile,omitempty"`
	// TreeDigest is that of the listing (package layer); "" unless committed, and
	// for as long as the listing is being made.
	TreeDigest digest.Digest `json:"treeDigest,omitempty"`
}

// Record returns what the store knows of a snapshot; ErrNotFound.
func (v *View) Record(ctx context.Context, key string) (Record, error) {
	n, err := v.resolve(ctx, key)
	if err != nil {
		return Record{}, v.fail("record", key, err)
	}
	return v.record(n), nil
}

// Records returns what the store knows of every snapshot of the view, in order
// of the keys.
func (v *View) Records(ctx context.Context) (all []Record, err error) {
	err = v.s.db.view(ctx, func(t *txn) error {
		all = nil
		return t.eachName(v.name, func(key string, _ *name) error {
			n, err := t.node(v.name, key)
			if err == nil {
				all = append(all, v.record(n))
			}
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot: records of %s: %w", v.name, err)
	}
	return all, nil
}

func (v *View) record(n *node) Record {
	i := n.name.info(n.key)
	r := Record{
		View: v.name, Key: n.key, Kind: i.Kind, Parent: i.Parent, Labels: i.Labels, Created: i.Created, Updated: i.Updated,
		Driver: n.layer.Driver, ID: n.ref.ID, Parents: n.ref.Parents, Usage: n.layer.usage(), Volatile: n.layer.Volatile,
	}
	if n.layer.Committed {
		r.TreeDigest = n.layer.Digest
	}
	return r
}
