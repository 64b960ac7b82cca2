package fuse

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/kprobe"
)

const driverName = "fuse"

// Driver keeps layers as directories under one root and shows them by the FUSE
// union. Immutable after Open; it holds nothing, so that Close has nothing to do.
type Driver struct{ *upper.Layers }

// Factory returns the driver's factory.
func Factory() drivers.Factory {
	return drivers.Factory{
		Name:    driverName,
		Summary: "FUSE union: layers are directories, as overlay has them, merged by a server in user space (fuse-layerfs)",
		Options: factoryOptions(),
		Probe:   Probe,
		Open:    func(ctx context.Context, c drivers.Config) (drivers.Driver, error) { return Open(ctx, c) },
	}
}

// Open opens or makes the driver's storage at c.Root. ErrUnavailable with the
// reason if FUSE, or our server, does not work there.
func Open(ctx context.Context, c drivers.Config) (*Driver, error) {
	opts, err := parseOptions(c.Options)
	if err != nil {
		return nil, err
	}
	root, err := upper.PrepareRoot(c.Root)
	if err != nil {
		return nil, fmt.Errorf("fuse: open: %w", err)
	}
	f := probeFeatures(ctx, root)
	if f.works.Answer != kprobe.Yes {
		return nil, fmt.Errorf("fuse: open %s: %s: %w", root, f.reason(), unavailable(f))
	}
	u := &union{opts: opts, noBinds: f.ordinary}
	l, err := upper.Open(upper.Config{
		Root: root, Union: u, Capabilities: u.capabilities(&f),
		NoQuota:   f.detail(featQuota),
		NoIDMap:   noIDMap,
		Xattrs:    f.xattrs(),
		Volatile:  opts.volatile,
		StoredIDs: true,
	})
	if err != nil {
		return nil, fmt.Errorf("fuse: open %s: %w", root, err)
	}
	u.userxattr = l.Xattrs() == upper.XattrsUser
	return &Driver{l}, nil
}

// unavailable is the sentinel and the errno of a root where the driver does not work.
func unavailable(f features) error {
	if f.works.Err != nil {
		return errors.Join(errdefs.ErrUnavailable, f.works.Err)
	}
	return errdefs.ErrUnavailable
}

func (u *union) capabilities(f *features) drivers.Capabilities {
	c := drivers.Capabilities{
		Driver: driverName, Diff: true, Apply: true, Rebase: true,
		Quota:      f.has(featQuota),
		IDMap:      !f.rootless(), // the kernel shows owners that the user namespace has; a map leads elsewhere
		Reflink:    f.has(featReflink),
		UsageBytes: true, UsageInodes: true,
		MaxParents:      upper.MaxLowers, // others mount as many: a helper has no page of options to keep to
		BreaksHardLinks: true,
		DirRenameEXDEV:  u.opts.redirect != "on",
		SharedWriter:    true,
	}
	if f.rootless() {
		c.Lost = []string{"device nodes", "owners outside the user namespace (kept in user.containers.override_stat, where a later chmod or chown is not seen)", "trusted.* xattrs"}
	}
	return c
}
