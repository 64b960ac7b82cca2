package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

const driverName = "overlay"

// Driver keeps layers as directories under one root and shows them by the
// kernel's overlayfs. All fields are immutable after Open; it holds no lock and
// no descriptor, so that Close has nothing to do.
type Driver struct {
	root     string // absolute, as given: a link in it may hide ':' and ','
	real     string // root with its links resolved
	fsRoot   string // real as mountinfo's root field names it, within its file system
	major    uint32 // of that file system, as mountinfo has it
	minor    uint32
	opts     options
	features features
	caps     drivers.Capabilities
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
	root, err := cleanRoot(c.Root)
	if err != nil {
		return nil, fmt.Errorf("overlay: open: %w", err)
	}
	if err := sweepProbes(root); err != nil {
		return nil, drivers.Wrap(driverName, "open", 0, err)
	}
	f := rootFeatures(ctx, root)
	if f.works.Answer != kprobe.Yes {
		return nil, fmt.Errorf("overlay: open %s: %s: %w", root, f.reason(), unavailable(f))
	}
	d := &Driver{root: root, opts: opts, features: f}
	if err := d.settle(); err != nil {
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

// settle fits options to what was found, and makes what every root has.
func (d *Driver) settle() (err error) {
	xattrs := "trusted"
	if d.features.userxattr {
		xattrs = "user"
		if d.opts, err = d.opts.inUserNS(); err != nil {
			return err
		}
	}
	d.opts.known = d.features.known
	if err := d.features.supports(d.opts); err != nil {
		return err
	}
	if err := openFormat(d.root, xattrs); err != nil {
		return err
	}
	if err := mkdirAt(d.root, emptyDir); err != nil {
		return err
	}
	if d.real, err = filepath.EvalSymlinks(d.root); err != nil {
		return err
	}
	d.findInFS()
	d.caps = d.capabilities()
	return nil
}

// cleanRoot checks and makes the root. Its links are kept: a root whose real
// path has one of mount(2)'s separators can be reached by a link.
func cleanRoot(root string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	if i := strings.IndexAny(root, `:,\`); i >= 0 {
		return "", fmt.Errorf("root %q: %w: %q separates mount options; make a symbolic link to it without one and use that",
			root, errdefs.ErrInvalidArgument, root[i])
	}
	if err := os.Mkdir(root, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("root %s: %w: %w", root, errdefs.ErrFailedPrecondition, err)
	}
	return root, nil
}

func mkdirAt(root, name string) error {
	if err := os.Mkdir(filepath.Join(root, name), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// knows reports whether the kernel has a mount option.
func (d *Driver) knows(option string) bool { return d.opts.known[option] }

// Capabilities says what the driver can do here.
func (d *Driver) Capabilities() drivers.Capabilities { return d.caps }

func (d *Driver) capabilities() drivers.Capabilities {
	c := drivers.Capabilities{
		Driver: driverName, Diff: true, Apply: true, Rebase: true,
		Quota:      d.features.has(featQuota),
		IDMap:      d.features.has(featIDMap),
		Reflink:    d.features.has(featReflink),
		UsageBytes: true, UsageInodes: true,
		MaxParents: maxLowers, ExternalParents: d.externalParents(),
		BreaksHardLinks: true,
		DirRenameEXDEV:  d.opts.redirect != "on" && d.opts.metacopy != "on",
		SharedWriter:    true,
		LinksSettle:     !d.features.has(featLinks),
	}
	if d.opts.userxattr {
		c.Lost = []string{"device nodes", "owners outside the user namespace (kept in user.containers.override_stat, where a later chmod or chown is not seen)", "trusted.* xattrs"}
	}
	return c
}

// Close has nothing to release.
func (d *Driver) Close() error { return nil }

// whiteouts and opaques: the xattr namespace that this root's layers use.
func (d *Driver) xattr(name string) string {
	if d.opts.userxattr {
		return "user.overlay." + name
	}
	return "trusted.overlay." + name
}

// isOpaque reports whether a directory of a layer hides what is below it.
func (d *Driver) isOpaque(dir *sys.Fd) (bool, error) {
	v, err := optionalXattr(dir, "", d.xattr("opaque"))
	return v == "y", err
}
