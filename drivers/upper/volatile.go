package upper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

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
func (l *Layers) readyVolatile(s *state, p Plan) error {
	if p.Upper == "" || len(p.Lowers) == 0 {
		return nil
	}
	if err := l.refuseLostVolatile(s); err != nil {
		return err
	}
	dir, err := l.openLayer(s.id)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := clearIncompat(dir); err != nil || !p.Volatile {
		return err
	}
	return writeFile(dir, volatileFile, []byte(BootID()), false)
}

// refuseLostVolatile fails when the layer was mounted volatile in an earlier
// boot: its content may never have reached the disk.
func (l *Layers) refuseLostVolatile(s *state) error {
	dir, err := l.openLayer(s.id)
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
	if string(b) == BootID() {
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

// BootID names this boot of the machine.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown-" + strconv.Itoa(os.Getpid())
	}
	return strings.TrimSpace(string(b))
}
