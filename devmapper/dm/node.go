package dm

import (
	"errors"
	"fmt"
	"os"
	"path"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// nodeDir is where the nodes with names are.
const nodeDir = "/dev/mapper/"

// MakeNode makes /dev/mapper/NAME for a machine without udev and returns its path. One
// that is there for the same device stays; one of another device, which a
// removal without udev has left, is replaced.
func MakeNode(i Info) (string, error) {
	p := nodeDir + i.Name
	if s, err := sys.StatPath(p); err == nil {
		if s.Type() == sys.S_IFBLK && (Dev{s.RdevMajor, s.RdevMinor}) == i.Dev {
			return p, nil
		}
		if err := os.Remove(p); err != nil {
			return "", fmt.Errorf("dm: node of another device: %w", err)
		}
	}
	if err := makeNode(p, sys.S_IFBLK|0o600, i.Dev.Major, i.Dev.Minor); err != nil {
		return "", fmt.Errorf("dm: node %s: %w", p, err)
	}
	return p, nil
}

// RemoveNode removes /dev/mapper/NAME; it is no error if it is not there.
func RemoveNode(name string) error {
	if h := (header{name: name}); name == "" || h.valid() != nil {
		return fmt.Errorf("dm: node %q: %w", name, errBadName)
	}
	if err := os.Remove(nodeDir + name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("dm: node: %w", err)
	}
	return nil
}

func makeNode(p string, mode, major, minor uint32) error {
	if err := os.MkdirAll(path.Dir(p), 0o755); err != nil {
		return err
	}
	dir, err := sys.OpenDir(path.Dir(p))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Mknod(path.Base(p), mode, major, minor); err != nil && !errors.Is(err, syscall.EEXIST) {
		return err
	}
	return nil
}
