package upper

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	lmount "github.com/layerctl/layerctl/mount"
)

// Owner returns the layer that ms shows: of the kernel's overlay that of its
// upperdir, or else of its nearest lowerdir; of anything else that of its source: a
// bind's, and that by which a server in user space names the layer that it shows.
// Lowers that another program named relative to a directory of its choice cannot be
// told from another store's.
func (l *Layers) Owner(ms []mount.Mount) (drivers.ID, bool) {
	if len(ms) != 1 {
		return 0, false
	}
	m := ms[0]
	if m.Type != "overlay" {
		return l.ownerOfPath(m.Source)
	}
	stack, err := lmount.OverlayLayers(m)
	if err != nil {
		return 0, false
	}
	if stack.Upper != "" {
		return l.ownerOfPath(stack.Upper)
	}
	return l.ownerOfPath(stack.Lowers[0])
}

// ownerOfPath returns the layer whose fs directory path is. A path that does not
// begin with the root may still lead there, through a link or another mount of
// the file system.
func (l *Layers) ownerOfPath(path string) (drivers.ID, bool) {
	layer, ok := strings.CutSuffix(path, "/"+fsDir)
	if !ok {
		return 0, false
	}
	id, ok := drivers.ParseID(filepath.Base(layer))
	if !ok {
		return 0, false
	}
	root := filepath.Dir(layer)
	return id, root == l.root || root == l.real || sameDir(root, l.root)
}

func sameDir(a, b string) bool {
	if !filepath.IsAbs(a) {
		return false
	}
	sa, err1 := sys.StatPath(a)
	sb, err2 := sys.StatPath(b)
	return err1 == nil && err2 == nil && sa.Dev == sb.Dev && sa.Ino == sb.Ino
}

// MountOf describes the mount that a path without links lies on; false where that
// cannot be known.
func MountOf(path string) (lmount.Info, bool) {
	infos, err := lmount.List()
	if err != nil {
		return lmount.Info{}, false
	}
	best := -1
	for i, in := range infos { // a later mount at the same place covers an earlier one
		if within(path, in.Target) && (best < 0 || len(in.Target) >= len(infos[best].Target)) {
			best = i
		}
	}
	if best < 0 {
		return lmount.Info{}, false
	}
	return infos[best], true
}

// findInFS finds out where in its file system the root is: what the root field of
// mountinfo says of a bind mount of a layer. It stays empty where that cannot be
// known.
func (l *Layers) findInFS() {
	in, ok := MountOf(l.real)
	if !ok {
		return
	}
	rel, err := filepath.Rel(in.Target, l.real)
	if err != nil {
		return
	}
	l.fsRoot, l.major, l.minor = filepath.Join(in.Root, rel), in.Major, in.Minor
}

func within(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+string(os.PathSeparator))
}
