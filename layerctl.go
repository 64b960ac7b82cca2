// Package layerctl is the front door for engines: the one list of drivers, and
// Open, which gives a store with those of them that work at a directory.
//
// What a store can do is in package snapshot: a View is a containerd
// Snapshotter, mounts are containerd's, performed by package mount or by
// anybody else. An engine that wants one driver and no store imports that
// driver's package alone.
//
// # Life cycle
//
//	Open -> Store --View--> Prepare, Mounts, Diff, Commit ... -> Close
//
// Any number of processes may have one store open. Close leaves mounts in place.
package layerctl

import (
	"context"

	"github.com/layerctl/layerctl/btrfs"
	"github.com/layerctl/layerctl/devmapper"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/fuse"
	"github.com/layerctl/layerctl/overlay"
	"github.com/layerctl/layerctl/snapshot"
)

// Drivers returns every driver there is, in the order in which they are tried where
// none is named. The caller owns the list.
func Drivers() *drivers.Registry {
	return drivers.NewRegistry(
		overlay.Factory(),
		btrfs.Factory(),
		fuse.Factory(),
		native.Factory(),
		devmapper.Factory(), // behind one that always works: only who asks for it by name gets it
	)
}

// Options are those of package snapshot. The zero value opens a durable store
// with every driver of Drivers.
type Options = snapshot.Options

// Open opens the store at root, or makes one if root is absent or empty, and
// repairs what dead processes left there. Without a Registry in o it has every
// driver of Drivers. Its errors are those of snapshot.Open.
func Open(ctx context.Context, root string, o Options) (*snapshot.Store, error) {
	if o.Registry == nil {
		o.Registry = Drivers()
	}
	return snapshot.Open(ctx, root, o)
}
