package upper

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// Commit freezes the layer. Its steps, each repeatable after a crash: fit the
// layer to parents that it was not made on, store container ids again where it
// has an id map, flush, measure, write committed.json (the commit point), drop
// what only an upper needs.
func (l *Layers) Commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	u, err := l.commit(ctx, r, o)
	return u, l.wrap("commit", r.ID, err)
}

func (l *Layers) commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	var none drivers.Usage
	dir, err := l.openLayer(r.ID)
	if err != nil {
		return none, err
	}
	defer dir.Close()
	s, err := l.load(r.ID)
	if err != nil {
		return none, err
	}
	if err := l.checkCommit(ctx, s, r); err != nil {
		return none, err
	}
	if err := l.step(ctx, "commit: checked"); err != nil {
		return none, err
	}
	c, err := l.prepareCommit(ctx, s, r, o)
	if err != nil {
		return none, err
	}
	if !o.Volatile {
		if err := dir.SyncFS(); err != nil {
			return none, err
		}
	}
	if err := l.step(ctx, "commit: flushed"); err != nil {
		return none, err
	}
	if err := l.measure(ctx, r, &c); err != nil {
		return none, err
	}
	if err := l.step(ctx, "commit: measured"); err != nil {
		return none, err
	}
	if err := WriteJSON(dir, committedFile, c, !o.Volatile); err != nil {
		return none, err
	}
	l.strip(ctx, dir, s)
	return drivers.Usage{Bytes: c.Bytes, Inodes: c.Inodes}, nil
}

// checkCommit refuses what cannot be frozen.
func (l *Layers) checkCommit(ctx context.Context, s *state, r drivers.Ref) error {
	switch {
	case s.committed != nil:
		return fmt.Errorf("is committed already: %w", errdefs.ErrFailedPrecondition)
	case s.about.View:
		return fmt.Errorf("is a view: %w", errdefs.ErrFailedPrecondition)
	case len(r.Parents) >= MaxLowers:
		return fmt.Errorf("with %d parents it could not be mounted, %d lowers are the most: squash some: %w",
			len(r.Parents), MaxLowers, errdefs.ErrFailedPrecondition)
	}
	var parent drivers.ID
	if len(r.Parents) > 0 {
		parent = r.Parents[0]
	}
	if s.about.Parent != 0 && s.about.Parent != parent {
		return fmt.Errorf("was made on %s, not on %s: %w", s.about.Parent, name(parent), errdefs.ErrInvalidArgument)
	}
	if s.rebase != nil && s.rebase.Parent != parent {
		return refuseRebasing(s)
	}
	if err := l.refuseLostVolatile(s); err != nil {
		return err
	}
	return l.refuseWriters(ctx, s.id)
}

// prepareCommit makes the layer's directory right for its final parents.
func (l *Layers) prepareCommit(ctx context.Context, s *state, r drivers.Ref, o drivers.CommitOptions) (committed, error) {
	c := committed{Metacopy: s.about.Metacopy}
	if len(r.Parents) > 0 {
		p, err := l.parentState(r)
		if err != nil {
			return c, err
		}
		c.Parent, c.Metacopy = p.id, c.Metacopy || p.metacopy()
	}
	if s.applied {
		if err := l.rebase(ctx, s, r, o.Volatile); err != nil {
			return c, err
		}
	}
	if err := l.step(ctx, "commit: rebased"); err != nil {
		return c, err
	}
	return c, l.unshift(ctx, s)
}

// measure walks the layer for its usage and for files without data. A layer on
// nothing is written to through a bind, so overlayfs has not refused a 0/0 device
// there: it would be a file of this layer, and gone from every layer above.
func (l *Layers) measure(ctx context.Context, r drivers.Ref, c *committed) error {
	found, err := l.survey(ctx, r.ID, surveyOptions{metacopy: !l.userxattr(), whiteouts: len(r.Parents) == 0})
	if err != nil {
		return err
	}
	if found.nested != "" {
		return nestedError(found.nested)
	}
	if len(found.whiteouts) > 0 {
		return fmt.Errorf("%q is what overlayfs deletes with, layers above would not have it: remove it: %w",
			found.whiteouts[0], errdefs.ErrFailedPrecondition)
	}
	c.Bytes, c.Inodes = found.usage.Bytes, found.usage.Inodes
	c.Metacopy = c.Metacopy || found.metacopy
	return nil
}

// strip drops what only a writable layer needs. The layer is committed: what
// cannot be dropped now goes with Remove.
func (l *Layers) strip(ctx context.Context, dir *sys.Fd, s *state) {
	ctx = context.WithoutCancel(ctx)
	_ = l.unlimit(s.about.Project)
	if s.hostIDs() {
		if fs, err := dir.Openat(fsDir, sys.O_RDONLY|sys.O_DIRECTORY, 0); err == nil {
			forgetTargets(fs, "")
			fs.Close()
		}
	}
	for _, n := range []string{workDir, appliedFile, rebaseFile, rebaseDir, volatileFile} {
		_ = removeTree(ctx, dir, n)
	}
}
