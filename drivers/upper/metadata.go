package upper

import (
	"errors"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// metadata is what a directory has beside its content: what Create copies from a
// parent's root, and what a rebase notes before it changes anything.
type metadata struct {
	UID    uint32            `json:"uid"`
	GID    uint32            `json:"gid"`
	Mode   uint32            `json:"mode"`
	Mtime  sys.Time          `json:"mtime"`
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// readMetadata reads a directory. overlayfs's own xattrs belong to one place in
// one layer and are left out.
func readMetadata(dir *sys.Fd) (metadata, error) {
	s, err := dir.Stat("")
	if err != nil {
		return metadata{}, err
	}
	m := metadata{UID: s.UID, GID: s.GID, Mode: s.Mode & 0o7777, Mtime: s.Mtime}
	m.Xattrs, err = layerXattrs(dir)
	return m, err
}

// shifted is m with the ids that a map shows.
func (m metadata) shifted(by drivers.IDMap) metadata {
	m.UID, m.GID = shift(by.UIDs, m.UID), shift(by.GIDs, m.GID)
	return m
}

// put gives all of it to a directory, the time last. step is called between two
// changes. Repeatable.
func (m metadata) put(to *sys.Fd, step func() error) error {
	if err := to.Chown("", m.UID, m.GID); err != nil {
		return err
	}
	if err := step(); err != nil {
		return err
	}
	if err := setXattrs(to, m.Xattrs); err != nil {
		return err
	}
	if err := to.Chmod(m.Mode); err != nil { // after the owner, whose change takes setgid away
		return err
	}
	if err := step(); err != nil {
		return err
	}
	return to.Utimes("", sys.TimeOmit, m.Mtime)
}

// setXattrs makes the xattrs of to those of want.
func setXattrs(to *sys.Fd, want map[string][]byte) error {
	have, err := layerXattrs(to)
	if err != nil {
		return err
	}
	for n := range have {
		if _, ok := want[n]; !ok {
			if err := to.Removexattr("", n); err != nil && !isAbsentXattr(err) {
				return err
			}
		}
	}
	for n, v := range want {
		if old, ok := have[n]; ok && string(old) == string(v) {
			continue
		}
		if err := to.Setxattr("", n, string(v)); err != nil && n != "security.selinux" { // the policy's to give
			return err
		}
	}
	return nil
}

// layerXattrs reads the xattrs that belong to the tree and not to overlayfs.
func layerXattrs(f *sys.Fd) (map[string][]byte, error) {
	names, err := f.Listxattr("")
	if err != nil {
		return nil, err
	}
	m := map[string][]byte{}
	for _, n := range names {
		if strings.HasPrefix(n, "trusted.overlay.") || strings.HasPrefix(n, "user.overlay.") || strings.HasPrefix(n, "btrfs.") ||
			strings.HasPrefix(n, "trusted.SGI_ACL_") {
			continue // as layer.ReadEntry
		}
		v, err := f.Getxattr("", n)
		if isAbsentXattr(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		m[n] = []byte(v)
	}
	return m, nil
}

// optionalXattr reads an xattr, "" where it is not there or cannot be.
func optionalXattr(dir *sys.Fd, name, attr string) (string, error) {
	v, err := dir.Getxattr(name, attr)
	if isAbsentXattr(err) {
		return "", nil
	}
	return v, err
}

// isAbsentXattr reports whether err says that there is no such xattr here.
func isAbsentXattr(err error) bool {
	return errors.Is(err, syscall.ENODATA) || errors.Is(err, syscall.EOPNOTSUPP)
}
