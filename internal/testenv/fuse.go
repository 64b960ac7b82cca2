package testenv

import (
	"fmt"
	"os"
	"os/exec"
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

// FUSEServer is a Setup: it builds fuse-layerfs and puts it first in PATH.
func FUSEServer(dir string) error {
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	cmd := exec.Command("go", "build", "-o", bin+"/", "github.com/layerctl/layerctl/cmd/fuse-layerfs")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build fuse-layerfs: %w\n%s", err, out)
	}
	return os.Setenv("PATH", bin+":"+os.Getenv("PATH"))
}
