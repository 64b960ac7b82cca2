package overlay

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/kprobe"
)

const driverName = "overlay"

// Driver keeps layers as directories under one root and shows them by the
// kernel's overlayfs. Immutable after Open; it holds no lock and no descriptor, so
// that Close has nothing to do.
type Driver struct {
	*upper.Layers
	features features
}

// kernel is the kernel's overlayfs, with the options that were found out to work.
// Immutable.
type kernel struct {
	root     string
	opts     options
	external int // Capabilities.ExternalParents
}

// Factory returns the driver's factory.
func Factory() drivers.Factory {
	return drivers.Factory{
		Name:    driverName,
		Summary: "kernel overlayfs: layers are directories, mounts are merged by the kernel",
		Options: factoryOptions(),
		Probe:   Probe,
		Open:    func(ctx context.Context, c drivers.Config) (drivers.Driver, error) { return Open(ctx, c) },
	}
}

// Open opens or makes the driver's storage at c.Root. ErrUnavailable with the
// reason if overlayfs does not work there.
func Open(ctx context.Context, c drivers.Config) (*Driver, error) {
	opts, err := parseOptions(c.Options)
	if err != nil {
		return nil, err
	}
	root, err := upper.PrepareRoot(c.Root)
	if err != nil {
		return nil, fmt.Errorf("overlay: open: %w", err)
	}
	f := rootFeatures(ctx, root)
	if f.works.Answer != kprobe.Yes {
		return nil, fmt.Errorf("overlay: open %s: %s: %w", root, f.reason(), unavailable(f))
	}
	d := &Driver{features: f}
	if err := d.open(root, opts); err != nil {
		return nil, fmt.Errorf("overlay: open %s: %w", root, err)
	}
	return d, nil
}

// unavailable is the sentinel and the errno of a root where overlayfs does not work.
func unavailable(f features) error {
	if f.works.Err != nil {
		return errors.Join(errdefs.ErrUnavailable, f.works.Err)
	}
	return errdefs.ErrUnavailable
}

// open fits options to what was found, and opens the layers.
func (d *Driver) open(root string, opts options) (err error) {
	f := &d.features
	xattrs := upper.XattrsTrusted
	if f.userxattr {
		xattrs = upper.XattrsUser
		if opts, err = opts.inUserNS(); err != nil {
			return err
		}
	}
	opts.known = f.known
	if err := f.supports(opts); err != nil {
		return err
	}
	k := &kernel{root: root, opts: opts}
	k.external = k.externalParents()
	d.Layers, err = upper.Open(upper.Config{
		Root: root, Union: k, Capabilities: k.capabilities(f),
		NoQuota: f.Detail(featQuota), NoIDMap: f.Detail(featIDMap),
		Xattrs:   []upper.Xattrs{xattrs},
		Volatile: opts.volatile, NoVolatile: !opts.known[featVolatile],
		RealInodes: true,
	})
	return err
}

func (k *kernel) capabilities(f *features) drivers.Capabilities {
	c := drivers.Capabilities{
		Driver: driverName, Diff: true, Apply: true, Rebase: true,
		Quota:      f.has(featQuota),
		IDMap:      f.has(featIDMap),
		Reflink:    f.has(featReflink),
		UsageBytes: true, UsageInodes: true,
		MaxParents: upper.MaxLowers, ExternalParents: k.external,
		BreaksHardLinks: true,
		DirRenameEXDEV:  k.opts.redirect != "on" && k.opts.metacopy != "on",
		SharedWriter:    true,
		LinksSettle:     !f.has(featLinks),
	}
	if k.opts.userxattr {
		c.Lost = []string{"device nodes", "owners outside the user namespace (kept in user.containers.override_stat; mounts show the own ones)", "trusted.* xattrs"}
	}
	return c
}
