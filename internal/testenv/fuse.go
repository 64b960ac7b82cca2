package testenv

import (
	"os"
	"path/filepath"

	"github.com/layerctl/layerctl/internal/sys"
)

// openFUSE gives everybody a /dev/fuse, as desktops and servers do; where it is
// root's alone, only in this private namespace. Nothing happens without one.
func openFUSE() error {
	const device = "/dev/fuse"
	st, err := sys.StatPath(device)
	if err != nil || st.Mode&0o666 == 0o666 {
		return nil
	}
	dir := filepath.Join(scratch, "dev")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	if err := sys.Mount("dev", dir, "tmpfs", 0, "mode=711"); err != nil {
		return err
	}
	fd, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer fd.Close()
	if err := fd.Mknod("fuse", sys.S_IFCHR|0o666, st.RdevMajor, st.RdevMinor); err != nil {
		return err
	}
	if err := fd.ChmodAt("fuse", 0o666); err != nil { // whatever the umask
		return err
	}
	return sys.Mount(dir+"/fuse", device, "", sys.MS_BIND, "")
}
