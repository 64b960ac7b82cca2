package thin

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
)

const checkTool = "thin_check"

// FindTool finds a program, in sbin directories too; ErrUnavailable says which package
// it comes from.
func FindTool(name, from string) (string, error) {
	for _, dir := range []string{"", "/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no %s in PATH (package %s): %w", name, from, errdefs.ErrUnavailable)
}

// CheckTool finds the program thin_check.
func CheckTool() (string, error) { return FindTool(checkTool, "thin-provisioning-tools") }

// Check runs thin_check on metadata: of an active pool on its metadata snapshot, which the
// caller has taken. What it found is in words, "" if nothing. The error is that of the check
// itself: ErrUnavailable without the program.
func Check(ctx context.Context, metadata string, snapshot bool) (found string, err error) {
	program, err := CheckTool()
	if err != nil {
		return "", err
	}
	args := []string{metadata}
	if snapshot {
		args = []string{"-m", metadata}
	}
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err == nil {
		return "", nil
	}
	if !errors.As(err, new(*exec.ExitError)) {
		return "", fmt.Errorf("%s: %w", program, err)
	}
	return fmt.Sprintf("`%s %s` (%v): %s", checkTool, strings.Join(args, " "), err, lastLines(string(out))), nil
}

// lastLines are the last of what a program said, on one line.
func lastLines(s string) string {
	const most = 12
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > most {
		lines = append([]string{"..."}, lines[len(lines)-most:]...)
	}
	for i, l := range lines {
		lines[i] = strings.TrimSpace(l)
	}
	return strings.Join(lines, "; ")
}

// Rest is a pool that is not active.
type Rest struct {
	Name     string // that its device would have
	Metadata string // file or device
	Bytes    int64  // that it has
}

// AtRest calls f with the pool in a directory while nobody activates it;
// ErrFailedPrecondition if it is active, ErrNotFound if there is none.
func AtRest(dir string, f func(r Rest) error) error {
	ctl, err := dm.Open()
	if err != nil {
		return err
	}
	defer ctl.Close()
	root, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	p := &Pool{dir: dir, root: root, ctl: ctl}
	if p.name, err = p.deviceName(); err != nil {
		return err
	}
	rec, err := readRecord(root)
	if err == nil && rec == nil {
		err = fmt.Errorf("no %s in %s: %w", recordFile, dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	p.rec = *rec
	lock, err := sys.WaitLock(p.path(lockFile), sys.O_RDWR|sys.O_CREAT, sys.LockExclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := ctl.Info(p.name); !isGone(err) {
		if err == nil {
			err = fmt.Errorf("pool %s is active: %w", p.name, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	return f(Rest{p.name, p.MetadataPath(), sizeOf(p.MetadataPath())})
}

// sizeOf is the size of a file or device, 0 if it has none.
func sizeOf(path string) int64 {
	f, err := sys.Open(path, sys.O_RDONLY, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	st, err := f.Stat("")
	if err == nil && st.Type() == sys.S_IFBLK {
		st.Size, err = f.BlockBytes()
	}
	if err != nil {
		return 0
	}
	return st.Size
}
