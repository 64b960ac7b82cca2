package union

import (
	"path/filepath"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Layers are reached through mounts of our own that are attached nowhere, as the
// kernel's overlayfs has them: what is mounted below a layer does not show in it, the
// union itself not either, where it is mounted on a directory of a layer; and a
// lower cannot be written even by mistake. A process that may not make mounts does
// without.

// openLower opens a lower at its root.
func openLower(path string) (*sys.Fd, error) {
	plain, err := sys.OpenDir(path)
	if err != nil {
		return nil, err
	}
	m, err := plain.OpenTree(true, false)
	if err != nil {
		return plain, nil
	}
	defer m.Close()
	attr := sys.MountAttr{Set: sys.MOUNT_ATTR_RDONLY | sys.MOUNT_ATTR_NOATIME, Clear: sys.MOUNT_ATTR__ATIME}
	if err := m.SetMountAttr(attr, false); err != nil { // how times of access are kept may be locked
		if err := m.SetMountAttr(sys.MountAttr{Set: sys.MOUNT_ATTR_RDONLY}, false); err != nil {
			return plain, nil
		}
	}
	own, err := m.Openat(".", sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return plain, nil
	}
	plain.Close()
	return own, nil
}

// openUpperDirs opens upper and workdir, by way of one mount that has both: between
// two nothing can be renamed.
func openUpperDirs(c *Config) (u, w *sys.Fd, err error) {
	upper, work := c.Upper, c.Work
	if u, err = sys.OpenDir(upper); err != nil {
		return nil, nil, err
	}
	if w, err = sys.OpenDir(work); err != nil {
		u.Close()
		return nil, nil, err
	}
	ownU, ownW, ok := privateUpper(u, w, c)
	if !ok {
		return u, w, nil
	}
	u.Close()
	w.Close()
	return ownU, ownW, nil
}

func privateUpper(u, w *sys.Fd, c *Config) (ownU, ownW *sys.Fd, ok bool) {
	paths, err := truePaths(c.Upper, c.Work)
	if err != nil {
		return nil, nil, false
	}
	top, err := sys.OpenDir(paths[0])
	if err != nil {
		return nil, nil, false
	}
	defer top.Close()
	m, err := top.OpenTree(true, false)
	if err != nil {
		return nil, nil, false
	}
	defer m.Close()
	_ = m.SetMountAttr(c.atime(), false) // which may be locked
	if ownU, err = openSamePath(m, paths[1], u); err != nil {
		return nil, nil, false
	}
	if ownW, err = openSamePath(m, paths[2], w); err != nil {
		ownU.Close()
		return nil, nil, false
	}
	return ownU, ownW, true
}

// atime is how the upper's mount keeps times of access.
func (c *Config) atime() sys.MountAttr {
	a := sys.MountAttr{Clear: sys.MOUNT_ATTR__ATIME | sys.MOUNT_ATTR_NODIRATIME}
	switch c.Atime {
	case AtimeNever:
		a.Set = sys.MOUNT_ATTR_NOATIME
	case AtimeAlways:
		a.Set = sys.MOUNT_ATTR_STRICTATIME
	}
	if c.NoDirAtime {
		a.Set |= sys.MOUNT_ATTR_NODIRATIME
	}
	return a
}

// truePaths gives the directory that both are in, and both relative to it.
func truePaths(upper, work string) (paths [3]string, err error) {
	var parts [2][]string
	for i, p := range []string{upper, work} {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			p, err = filepath.Abs(p)
		}
		if err != nil {
			return paths, err
		}
		parts[i] = strings.Split(p, "/")
	}
	n := 0
	for n < min(len(parts[0]), len(parts[1])) && parts[0][n] == parts[1][n] {
		n++
	}
	paths[0] = "/" + strings.Join(parts[0][:n], "/")
	for i := range parts {
		paths[i+1] = strings.Join(append([]string{"."}, parts[i][n:]...), "/")
	}
	return paths, nil
}

// openSamePath opens a path below m, which leads to what want is open on, or fails:
// something is mounted on the way.
func openSamePath(m *sys.Fd, path string, want *sys.Fd) (*sys.Fd, error) {
	f, err := m.Openat2(path, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return nil, err
	}
	is, err := f.Stat("")
	if err == nil {
		var st sys.Stat
		if st, err = want.Stat(""); err == nil && (st.Dev != is.Dev || st.Ino != is.Ino) {
			err = syscall.EXDEV
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
