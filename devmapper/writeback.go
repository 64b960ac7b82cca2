package devmapper

import (
	"context"
	"errors"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// suspend stops a layer's device with all on the pool that was written to it. suspended is false if
// nobody has it open, and somebody took it away meanwhile.
func (d *driver) suspend(ctx context.Context, fs *fileSystem, v thin.Volume) (suspended bool, err error) {
	if err := d.writeBack(ctx, fs, v); err != nil {
		return false, err
	}
	err = d.pool.Suspend(v.Name)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// writeBack has the pool take what a layer's file system, whoever has it mounted, has in memory, and then
// the pool as large as it is to be. To become larger it suspends all its devices, for which it waits for one
// that is being suspended: what that has to write must fit into what is free.
func (d *driver) writeBack(ctx context.Context, fs *fileSystem, v thin.Volume) error {
	if i, err := d.pool.Info(v.Name); err != nil || i.Open == 0 {
		return nil // the suspend says what is wrong
	}
	t, err := mount.Detached(ctx, []mount.Mount{fs.mount(v, drivers.MountOptions{})}) // one superblock with the others
	if errors.Is(err, syscall.EBUSY) {
		return nil // not a file system, or none that is written to
	}
	if err != nil {
		return err
	}
	err = syncTree(t.Path())
	if closeErr := t.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		_ = d.pool.Grow(ctx) // where there is no more room, none is missing yet
	}
	return err
}

// syncTree flushes the file system of a directory, and says what could not be written meanwhile.
func syncTree(path string) error {
	root, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer root.Close()
	return root.SyncFS()
}
