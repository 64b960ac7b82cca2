package upper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
)

// Union shows layers merged: what a driver brings to Layers.
type Union interface {
	// Mount spells a plan as data. It performs nothing. A plan of one directory
	// is a bind as a rule: Plan.Bind spells it.
	Mount(p Plan) (mount.Mount, error)

	// Merge opens the merged, read-only tree of two or more directories, nearest
	// first, with redirects and files without data followed as far as the encoding
	// of the layers has them. Paths may be of /proc/self/fd. The tree shows owners as
	// they are stored. Diff compares such trees, Apply and Commit look into that of
	// the parents. It must leave nothing behind when the process is killed.
	Merge(ctx context.Context, lowers []string) (Tree, error)
}

// Tree is a directory tree that is open until Close.
type Tree interface {
	// Path is a path of its root, good in this process: /proc/self/fd/N for a mount
	// that is attached nowhere.
	Path() string
	Close() error
}

// Xattrs is the namespace of overlayfs's xattrs: one for all layers of a root.
type Xattrs string

// The namespaces: trusted.overlay.* needs CAP_SYS_ADMIN in the initial user
// namespace, user.overlay.* is for everybody else.
const (
	XattrsTrusted Xattrs = "trusted"
	XattrsUser    Xattrs = "user"
)

// Config is what Open needs. Immutable.
type Config struct {
	Root  string // as PrepareRoot returned it
	Union Union
	// Capabilities are the driver's, as it has found them; Driver in them begins
	// errors and names of steps.
	Capabilities drivers.Capabilities
	// NoQuota and NoIDMap say why Capabilities deny these.
	NoQuota, NoIDMap string
	// Xattrs are the namespaces that Union can use here; a new root gets the first.
	Xattrs []Xattrs
	// Volatile makes every writable mount volatile; NoVolatile says that Union
	// cannot do that.
	Volatile, NoVolatile bool
	// RealInodes says that the trees of Merge show for each regular file the inode
	// number that it has in its layer. The number of the file that is seen: not that
	// of the origin of a copy-up, as the kernel shows it of an upper. Diff then takes
	// two files of one number for one. Else it compares the bytes of the names that a
	// differing layer has, where their metadata is equal.
	RealInodes bool
	// StoredIDs says that Union maps the owners of an id-mapped layer both ways, so
	// that an upper has them as they are stored. The kernel's overlayfs maps lowers
	// only: its uppers have host ids until Commit. A layer that was made the other
	// way cannot be mounted writable.
	StoredIDs bool
}

// Layers keeps layers as directories under one root. It is a drivers.Driver, Differ
// and Applier. All fields are immutable after Open; it holds no lock and no
// descriptor, so that Close has nothing to do.
type Layers struct {
	cfg    Config
	root   string // absolute, as given: a link in it may hide ':' and ','
	real   string // root with its links resolved
	fsRoot string // real as mountinfo's root field names it, within its file system
	major  uint32 // of that file system, as mountinfo has it
	minor  uint32
	xattrs Xattrs
	fsType sys.FSType
}

// PrepareRoot checks and makes a root, and deletes the scratch directories of
// probes that were killed there. Its links are kept: a root whose real path has one
// of mount(2)'s separators can be reached by a link.
func PrepareRoot(root string) (string, error) {
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
	if err := sweepScratch(root); err != nil {
		return "", fmt.Errorf("root %s: what is left of probes: %w: %w", root, errdefs.ErrUnavailable, err)
	}
	return root, nil
}

// Open opens or makes the layers at c.Root. ErrFailedPrecondition if they are of
// another format or encoding.
func Open(c Config) (*Layers, error) {
	l := &Layers{cfg: c, root: c.Root}
	var err error
	if l.xattrs, err = openFormat(l.root, c.Xattrs); err != nil {
		return nil, err
	}
	if err := os.Mkdir(l.path(emptyDir), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	if l.real, err = filepath.EvalSymlinks(l.root); err != nil {
		return nil, err
	}
	dir, err := sys.OpenDir(l.root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	st, err := dir.Statfs()
	if err != nil {
		return nil, err
	}
	l.fsType = st.Type
	l.findInFS()
	return l, nil
}

// Capabilities says what the driver can do here.
func (l *Layers) Capabilities() drivers.Capabilities { return l.cfg.Capabilities }

// Close has nothing to release.
func (l *Layers) Close() error { return nil }

// Root returns the root's path, absolute and as it was given.
func (l *Layers) Root() string { return l.root }

// Xattrs returns the namespace of this root's layers.
func (l *Layers) Xattrs() Xattrs { return l.xattrs }

// wrap gives an error of a verb its form.
func (l *Layers) wrap(op string, id drivers.ID, err error) error {
	return drivers.Wrap(l.cfg.Capabilities.Driver, op, id, err)
}

// step marks a step of this driver; see drivers.Step.
func (l *Layers) step(ctx context.Context, done string) error {
	return drivers.Step(ctx, l.cfg.Capabilities.Driver+": "+done)
}

func (l *Layers) userxattr() bool { return l.xattrs == XattrsUser }

// whiteouts is the encoding of this root's layers.
func (l *Layers) whiteouts() layer.Whiteouts {
	if l.userxattr() {
		return layer.WhiteoutsUser
	}
	return layer.WhiteoutsTrusted
}

// xattr is the full name of one of overlayfs's xattrs.
func (l *Layers) xattr(name string) string { return string(l.xattrs) + ".overlay." + name }

// isOpaque reports whether a directory of a layer hides what is below it.
func (l *Layers) isOpaque(dir *sys.Fd) (bool, error) {
	v, err := optionalXattr(dir, "", l.xattr("opaque"))
	return v == opaqueYes, err
}
