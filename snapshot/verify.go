package snapshot

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/layerctl/layerctl/layer"
)

// maxProblems bounds the findings of one layer; the rest is counted.
const maxProblems = 20

// bytes compares a layer with its listing, file by file.
func (c *checker) bytes(ctx context.Context, n *node, object string) error {
	from, err := c.s.parentNode(ctx, n)
	if err != nil {
		return err
	}
	t, err := c.s.tree(ctx, n)
	if err != nil {
		c.add(Finding{Problem: ContentDamaged, Object: object, Detail: "cannot be mounted: " + err.Error(), Suggestion: "see the error"})
		return ctx.Err()
	}
	problems, err := c.verify(ctx, from, n, t.path)
	if cerr := t.close(); cerr != nil {
		return cerr
	}
	if err != nil && ctx.Err() == nil {
		problems = append(problems, layer.Problem{Path: ".", What: layer.ProblemUnread, Got: err.Error()})
	}
	for i, p := range problems {
		f := Finding{Problem: ContentDamaged, Object: object, Detail: p.String(), Suggestion: "restore the layer: load or apply it again under another name"}
		if i == maxProblems {
			f.Detail = fmt.Sprintf("%d more", len(problems)-i)
		}
		c.add(f)
		if i == maxProblems {
			break
		}
	}
	return ctx.Err()
}

func (c *checker) verify(ctx context.Context, from, n *node, dir string) (problems []layer.Problem, err error) {
	f, err := os.Open(c.s.listingPath(n.ref.ID))
	if err != nil {
		return nil, rootError(err)
	}
	defer f.Close()
	changes, done, err := c.s.changes(ctx, from, n)
	if err != nil {
		return nil, err
	}
	defer done()
	if from == nil {
		changes = withoutRoot(changes)
	}
	o := layer.VerifyOptions{OverrideStat: c.s.overrides(ctx, n)}
	for p, err := range layer.VerifyListing(ctx, dir, layer.ReadListing(f), changes, o) {
		if err != nil {
			return problems, err
		}
		problems = append(problems, p)
	}
	return problems, nil
}

// withoutRoot leaves out the root directory of a layer without a parent: it is
// Create's, and an archive need not mention it. If the listing has it, it is
// compared all the same.
func withoutRoot(changes iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		for c, err := range changes {
			if (err != nil || c.Entry.Path != ".") && !yield(c, err) {
				return
			}
		}
	}
}

// overrides reports whether the layer's driver keeps owners and modes that this
// process may not set in xattrs.
func (s *Store) overrides(ctx context.Context, n *node) bool {
	d, err := s.driverOf(ctx, n)
	return err == nil && len(d.Capabilities().Lost) > 0
}

// parentNode returns the layer below n, nil if there is none.
func (s *Store) parentNode(ctx context.Context, n *node) (p *node, err error) {
	if len(n.ref.Parents) == 0 {
		return nil, nil
	}
	err = s.db.view(ctx, func(t *txn) error {
		p, err = t.layerNode(n.ref.Parents[0])
		return err
	})
	return p, err
}

// listing compares the file listings/ID with its digest, and reports whether it
// is right.
func (c *checker) listing(ctx context.Context, n *node, object string) (bool, error) {
	err := c.readListing(ctx, n)
	if err == nil {
		return true, nil
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	f := Finding{Problem: ListingDamaged, Object: object, Detail: fmt.Sprintf("listings/%s: %v", n.ref.ID, err), Suggestion: "check with repair computes it anew from the layer"}
	if errors.Is(err, os.ErrNotExist) {
		f.Problem = ListingMissing
	}
	if !c.o.Repair {
		c.add(f)
		return false, nil
	}
	return c.relist(ctx, n, f)
}

func (c *checker) readListing(ctx context.Context, n *node) error {
	f, err := os.Open(c.s.listingPath(n.ref.ID))
	if err != nil {
		return err
	}
	defer f.Close()
	return drain(ctx, layer.ReadListingDigest(f, n.layer.Digest))
}

func drain(ctx context.Context, records iter.Seq2[layer.ListingRecord, error]) error {
	for _, err := range records {
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
	return nil
}

// relist computes a lost listing anew. If its digest is the recorded one, the
// bytes are proven, too; if not, the recorded digest stays: it is all that is
// known of what the layer was.
func (c *checker) relist(ctx context.Context, n *node, f Finding) (bool, error) {
	from, err := c.s.parentNode(ctx, n)
	if err != nil {
		return false, err
	}
	d, err := c.s.rewriteListing(ctx, from, n)
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case errors.Is(err, errOtherDigest):
		c.add(f.cannot(nil, fmt.Sprintf("a listing made anew has digest %s: the layer changed since, or was unpacked from an archive that listed more; its bytes cannot be verified", d)))
	case err != nil:
		c.add(f.cannot(err, "the layer cannot be read"))
	default:
		c.add(f.done("computed anew, with the same digest"))
		return true, nil
	}
	return false, nil
}
