package union

import (
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// refuseOverlap refuses layers that are one directory, and lowers that lie in
// another layer: what is changed in the one would change the other under its
// readers. An upper that lies in a lower is nothing unusual. As the kernel's
// overlayfs, with its errno (fs/overlayfs/super.c: ovl_check_overlapping_layers).
func refuseOverlap(c *Config) error {
	traps := map[[2]uint64]string{}
	var lowers []string
	lowers = append(append(lowers, c.Lowers...), c.DataLowers...)
	for _, p := range append([]string{c.Upper, c.Work}, lowers...) {
		if p == "" {
			continue
		}
		st, err := sys.StatPath(p)
		if err != nil {
			return err
		}
		key := [2]uint64{st.Dev, st.Ino}
		if other, ok := traps[key]; ok {
			return overlap(p, other)
		}
		traps[key] = p
	}
	for _, p := range lowers {
		if err := refuseInside(p, traps); err != nil {
			return err
		}
	}
	return nil
}

func overlap(a, b string) error {
	return fmt.Errorf("layers %s and %s overlap: %w: %w", a, b, errdefs.ErrInvalidArgument, syscall.ELOOP)
}

// refuseInside walks from path up to the root of its file system.
func refuseInside(path string, traps map[[2]uint64]string) error {
	at, err := sys.Open(path, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	st, err := at.Stat("")
	for err == nil {
		up, upErr := at.Openat("..", sys.O_PATH|sys.O_DIRECTORY, 0)
		if upErr != nil {
			break // above what this process may see
		}
		at.Close()
		at = up
		var above sys.Stat
		if above, err = at.Stat(""); err != nil || above.Dev != st.Dev || above.Ino == st.Ino {
			break
		}
		if other, ok := traps[[2]uint64{above.Dev, above.Ino}]; ok {
			err = overlap(path, other)
		}
		st = above
	}
	at.Close()
	return err
}
