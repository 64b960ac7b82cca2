package devmapper

import (
	"context"
	"errors"
	"io"
	"iter"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/ext4"
	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

// errStop ends a walk that nobody asks on.
var errStop = errors.New("stopped")

// Diff compares the names that the changed blocks of the two devices lead to; where that
// cannot be told (xfs, always) it walks both trees. Each is in a mount of its own, which nobody else
// sees.
func (d *driver) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	return func(yield func(layer.Change, error) bool) {
		err := d.diff(ctx, from, to, yield)
		if err != nil && !errors.Is(err, errStop) {
			yield(layer.Change{}, d.wrap("diff to", to.ID, err))
		}
	}
}

func (d *driver) diff(ctx context.Context, from, to drivers.Ref, yield func(layer.Change, error) bool) error {
	return d.lookAt(ctx, from, func(below seen) error {
		return d.lookAt(ctx, to, func(tree seen) error {
			var o layer.DiffOptions
			if from.ID != 0 && below.fs.byBlocks && tree.fs.byBlocks {
				c, err := d.candidates(ctx, below.volume, tree.volume)
				if err != nil && !errors.Is(err, ext4.ErrCannotTell) && !errdefs.IsUnavailable(err) {
					return err
				}
				if err == nil {
					o.Candidates = c.Names
				}
			}
			for c, err := range layer.DiffTrees(ctx, below.path, tree.path, o) {
				if err != nil {
					return err
				}
				if !yield(c, nil) {
					return errStop
				}
			}
			return nil
		})
	})
}

// candidates are the paths that the blocks lead to in which two private devices
// differ, which are mounted: no journal is left to be replayed.
func (d *driver) candidates(ctx context.Context, from, to thin.Volume) (*layer.Candidates, error) {
	ranges, err := d.delta(ctx, from.ID, to.ID)
	if err != nil {
		return nil, err
	}
	var open [2]io.ReaderAt
	for i, v := range []thin.Volume{from, to} {
		f, err := sys.Open(thin.Node(v.Name), sys.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		open[i] = f
	}
	return ext4.Changed(ctx, open[0], open[1], ranges)
}

// delta lists where the mappings of two thin devices differ.
func (d *driver) delta(ctx context.Context, from, to uint32) (ranges []ext4.Range, err error) {
	block := d.pool.BlockBytes()
	err = d.withMetadata(ctx, func(m *metadata.Pool) error {
		for r, err := range m.Delta(metadata.ID(from), metadata.ID(to)) {
			if err != nil {
				return err
			}
			ranges = append(ranges, ext4.Range{Offset: int64(r.Begin) * block, Length: int64(r.Length) * block})
		}
		return nil
	})
	return ranges, err
}

// seen is what a layer shows now.
type seen struct {
	path   string // "" is nothing
	volume thin.Volume
	fs     *fileSystem
}

// lookAt calls f with a path to what a layer shows now.
func (d *driver) lookAt(ctx context.Context, r drivers.Ref, f func(s seen) error) error {
	if r.ID == 0 {
		return f(seen{})
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	l, err := d.layer(r.ID)
	if err != nil {
		return err
	}
	if l.Kind != writable {
		return d.mounted(ctx, l.fs, d.private(l.Thin, l.Sectors, true), f)
	}
	// A file system that is mounted for writing cannot be mounted read-only beside it.
	t, err := d.snapshotOf(ctx, r.ID, l)
	if err != nil {
		return err
	}
	err = d.mounted(ctx, l.fs, d.private(t.id, l.Sectors, false), f)
	dropErr := d.pool.Exclusive(context.WithoutCancel(ctx), func(c *thin.Change) error { return d.drop(c, t) })
	if err == nil {
		err = dropErr
	}
	return err
}

// mounted calls f with a read-only mount of a private device. One that may be written
// to has its journal replayed.
func (d *driver) mounted(ctx context.Context, fs *fileSystem, v thin.Volume, f func(s seen) error) error {
	return d.shown(ctx, v, func() error {
		t, err := mount.Detached(ctx, []mount.Mount{fs.mount(v, drivers.MountOptions{ReadOnly: true})})
		if err != nil {
			return err
		}
		err = f(seen{t.Path(), v, fs})
		return errors.Join(err, t.Close())
	})
}
