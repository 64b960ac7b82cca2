package snapshot

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// Adopt gives the committed snapshot key of the view from, of the same store, the
// name name in v as well, with these labels: two records, one layer. Its bytes go
// when the last of its names does. What it lies on must have a name in v already,
// which is the parent then; so a chain is adopted from its base up.
//
// ErrNotFound for the key, or where the parent has no name in v; ErrAlreadyExists
// for the name, or where v names the layer already; ErrInvalidArgument if v is bound to another driver, or from to
// another store.
func (v *View) Adopt(ctx context.Context, name string, from *View, key string, labels map[string]string) error {
	return v.fail("adopt", name, v.adopt(ctx, name, from, key, keptLabels(labels)))
}

func (v *View) adopt(ctx context.Context, as string, from *View, key string, labels map[string]string) error {
	if err := v.s.checkChange(as); err != nil {
		return err
	}
	if from.s != v.s {
		return fmt.Errorf("view %s is another store's: %w", from.name, errdefs.ErrInvalidArgument)
	}
	release, err := v.s.locks.exclusive(ctx, keyPlace(v.name, as), fmt.Sprintf("key %q", as))
	if err != nil {
		return err
	}
	defer release()
	return v.s.db.update(ctx, func(t *txn) error {
		if err := t.mustBeFree(v.name, as); err != nil {
			return err
		}
		n, err := t.node(from.name, key)
		if err != nil {
			return fmt.Errorf("view %s: %w", from.name, err)
		}
		switch {
		case n.name.Kind != snapshots.KindCommitted:
			return fmt.Errorf("snapshot %q of view %s is %s, not committed: %w", key, from.name, n.name.Kind, errdefs.ErrInvalidArgument)
		case v.driver != "" && v.driver != n.layer.Driver:
			return fmt.Errorf("snapshot %q of view %s is kept by driver %s, not %s: %w", key, from.name, n.layer.Driver, v.driver, errdefs.ErrInvalidArgument)
		}
		if k, ok := t.nameIn(v.name, n.ref.ID); ok {
			return fmt.Errorf("view %s names the layer already, %q: %w", v.name, k, errdefs.ErrAlreadyExists)
		}
		parent, err := t.adoptedParent(v.name, n)
		if err != nil {
			return err
		}
		now := time.Now().UnixNano()
		return t.putName(v.name, as, &name{
			ID: n.ref.ID, Kind: snapshots.KindCommitted, Parent: parent, Labels: labels, Created: now, Updated: now,
		})
	})
}

// adoptedParent is the name that the parent of n has in a view; "" if n has no
// parent.
func (t *txn) adoptedParent(view string, n *node) (string, error) {
	if len(n.ref.Parents) == 0 {
		return "", nil
	}
	if k, ok := t.nameIn(view, n.ref.Parents[0]); ok {
		return k, nil
	}
	return "", fmt.Errorf("parent: %w", notFound("snapshot", n.name.Parent))
}

// nameIn is the name that a layer has in a view, if any.
func (t *txn) nameIn(view string, id drivers.ID) (string, bool) {
	for _, n := range t.namesOf(id) {
		if n.View == view {
			return n.Key, true
		}
	}
	return "", false
}
