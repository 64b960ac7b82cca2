package upper

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// A layer that was applied without parents may get them at Commit (several
// layers of an image are unpacked at once). What Apply could not know is put
// right then:
//
//   - A directory that the archive only passes through was made up. It takes the
//     metadata of the parents' directory, as it would have with parents.
//   - The archive passes through a name that the parents have as a symlink to a
//     directory: what was put below the made-up directory moves to where the link
//     leads.
//   - Whiteouts and opaque markers are right as they are; with no parents at all
//     the whiteouts are deleted, because such a layer is mounted as it stands.
//
// Everything is decided before anything changes (rebaser): the plan has every
// path, every mtime and all metadata that the layer will have in the end, and is
// written down (rebase.json, flushed) before its first step (rebasePlan.do). So
// an attempt that was killed anywhere, whatever times it left behind, is followed
// by one that does the same plan, and every step of a plan can be done again.

// rebase fits the layer to the parents of r.
func (l *Layers) rebase(ctx context.Context, s *state, r drivers.Ref, volatile bool) error {
	dir, err := l.openLayer(s.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	upper, err := dir.Openat(fsDir, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer upper.Close()
	p := s.rebase
	if p == nil {
		if p, err = l.planRebase(ctx, s, r, dir, upper); err != nil || p.empty() {
			return err
		}
		if err := l.step(ctx, "commit: rebase planned"); err != nil {
			return err
		}
		if err := WriteJSON(dir, rebaseFile, p, !volatile); err != nil {
			return err
		}
		if err := l.step(ctx, "commit: rebase noted"); err != nil {
			return err
		}
	}
	return p.do(dir, upper, l.xattr("opaque"), func() error { return l.step(ctx, "commit: a part rebased") })
}

// planRebase decides what a rebase changes. It changes nothing itself.
func (l *Layers) planRebase(ctx context.Context, s *state, r drivers.Ref, dir, upper *sys.Fd) (*rebasePlan, error) {
	var a applied
	if err := ReadJSON(dir, appliedFile, &a); err != nil {
		return nil, err
	}
	b, err := newRebaser(l.whiteouts(), l.xattr("opaque"), upper, a)
	if err != nil {
		return nil, err
	}
	if len(r.Parents) == 0 {
		found, err := l.survey(ctx, s.id, surveyOptions{whiteouts: true})
		if err != nil {
			return nil, err
		}
		return b.onNothing(ctx, found.whiteouts)
	}
	if len(a.Implied) == 0 {
		return &rebasePlan{}, nil
	}
	tree, err := l.chainTree(ctx, r.Parents)
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	if b.lower, err = sys.OpenDir(tree.Path()); err != nil {
		return nil, err
	}
	defer b.lower.Close()
	return b.onParents(ctx, r.Parents[0])
}

// loadRebase reads the plan of a rebase that was begun; nil if none was.
func loadRebase(dir *sys.Fd) (*rebasePlan, error) {
	p := &rebasePlan{}
	err := ReadJSON(dir, rebaseFile, p)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return p, err
}

// refuseRebasing refuses to change a layer that a Commit has begun to fit to its
// parents: its plan would no longer be that of its files.
func refuseRebasing(s *state) error {
	if s.rebase == nil {
		return nil
	}
	return fmt.Errorf("a Commit on %s was stopped while it fitted the layer to that: Commit it so again, or remove it: %w",
		name(s.rebase.Parent), errdefs.ErrFailedPrecondition)
}
