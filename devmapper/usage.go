package devmapper

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/metadata"
	"github.com/layerctl/layerctl/drivers"
)

// Usage is the blocks that the layer does not share with its parent, by a comparison
// of the two trees of the pool's metadata: what its file system has written, its journal
// and tables, too. Inodes are not known.
func (d *driver) Usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	u, err := d.usage(ctx, r)
	return u, d.wrap("usage", r.ID, err)
}

func (d *driver) usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	l, err := d.layer(r.ID)
	switch {
	case err != nil:
		return drivers.Usage{}, err
	case l.Usage != nil:
		return *l.Usage, nil
	case l.Shared:
		return drivers.Usage{Inodes: -1}, nil
	}
	return d.usageOfActive(r, l, func() (drivers.Usage, error) { return d.measure(ctx, r, l.fs, l.Thin) })
}

// measure counts the blocks of a thin device that its parent's has not.
func (d *driver) measure(ctx context.Context, r drivers.Ref, f *fileSystem, thinID uint32) (u drivers.Usage, err error) {
	var below uint32
	if len(r.Parents) > 0 {
		p, err := d.parent(r)
		if err != nil {
			return u, err
		}
		below = p.Thin
	} else {
		t, err := d.readTemplate(f)
		if err != nil {
			return u, err
		}
		below = t.Thin
	}
	if err := d.pool.Flush(); err != nil { // what the kernel has in memory counts, too
		return u, err
	}
	blocks, err := d.exclusive(ctx, metadata.ID(thinID), metadata.ID(below))
	err = lost(err)
	return drivers.Usage{Bytes: int64(blocks) * d.pool.BlockBytes(), Inodes: -1}, err
}

// lost has the error of a thin device that the pool has not, though a record names it, say that it
// is lost: it is not the layer that is not there.
func lost(err error) error {
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the pool lacks a thin device that a record names: %w: %w", errdefs.ErrDataLoss, words{err})
	}
	return err
}

// exclusive counts from the pool's metadata as it is on the disk; where that always
// changes, from a metadata snapshot.
func (d *driver) exclusive(ctx context.Context, id, below metadata.ID) (blocks uint64, err error) {
	count := func(m *metadata.Pool) (err error) {
		blocks, err = m.Exclusive(id, below)
		return err
	}
	const tries = 3
	ok, err := d.readSteady(tries, count)
	if err == nil && !ok {
		err = d.withMetadata(ctx, count)
	}
	return blocks, err
}

// readSteady calls f with the pool's metadata as it is on the disk. What a superblock leads
// to stays until there is another one: so what f read holds if the superblock has not
// changed meanwhile. ok is false if it did, or f failed, at each try.
func (d *driver) readSteady(tries int, f func(m *metadata.Pool) error) (ok bool, err error) {
	file, err := metadata.OpenFile(d.pool.MetadataPath())
	if err != nil {
		return false, err
	}
	defer file.Close()
	for range tries {
		m, err := metadata.Open(file)
		if err != nil {
			continue // the kernel is writing it
		}
		err = f(m)
		if now, againErr := metadata.Open(file); err == nil && againErr == nil && now.Superblock() == m.Superblock() {
			return true, nil
		}
	}
	return false, nil
}

// withMetadata calls f with the pool's metadata, under a metadata snapshot. A pool has
// one at a time, so f is short.
func (d *driver) withMetadata(ctx context.Context, f func(m *metadata.Pool) error) (err error) {
	s, err := d.pool.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if releaseErr := s.Release(); err == nil {
			err = releaseErr
		}
	}()
	file, err := metadata.OpenFile(s.Path)
	if err != nil {
		return err
	}
	defer file.Close()
	m, err := openMetadata(file)
	if err != nil {
		return err
	}
	return f(m)
}

// openMetadata reads the superblock, which the kernel may be writing.
func openMetadata(f io.ReaderAt) (m *metadata.Pool, err error) {
	const tries = 10
	for range tries {
		if m, err = metadata.Open(f); err == nil {
			m, err = m.Snapshot()
		}
		if !errdefs.IsDataLoss(err) {
			break
		}
	}
	return m, err
}
