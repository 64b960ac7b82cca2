package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// A mount with "volatile" leaves work/work/incompat/volatile behind, and the
// kernel refuses the next mount while it stands: after a crash the upper may be
// anything. It stands after a clean unmount too, and then nothing is lost as
// long as the machine has not restarted. So Mounts notes the boot in which a
// layer is mounted volatile, and takes the kernel's mark away in the same boot;
// in another boot the layer is lost, and every call on it says so.

// incompatDir is the kernel's mark, below work/work.
const incompatDir = "incompat"

// readyVolatile prepares a writable layer to be mounted: notes the boot if p is
// volatile, and clears the mark of an earlier volatile mount in this boot.
func (d *Driver) readyVolatile(s *state, p plan) error {
	if p.upper == "" || len(p.lowers) == 0 {
		return nil
	}
	if err := d.refuseLostVolatile(s); err != nil {
		return err
	}
	dir, err := d.openLayer(s.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := clearIncompat(dir); err != nil || !p.volatile {
		return err
	}
	return writeFile(dir, volatileFile, []byte(bootID()), false)
}

// refuseLostVolatile fails when the layer was mounted volatile in an earlier
// boot: its content may never have reached the disk.
func (d *Driver) refuseLostVolatile(s *state) error {
	dir, err := d.openLayer(s.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := dir.Openat(volatileFile, sys.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	if string(b) == bootID() {
		return nil
	}
	return fmt.Errorf("was mounted volatile before the machine restarted, its content may be lost: remove it: %w", errdefs.ErrDataLoss)
}

// clearIncompat removes the kernel's mark, work/work/incompat.
func clearIncompat(dir *sys.Fd) error {
	work, err := dir.Openat2(workDir+"/"+workDir, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) { // 000: only another user's
		return nil
	}
	if err != nil {
		return err
	}
	defer work.Close()
	return removeTree(context.Background(), work, incompatDir)
}
