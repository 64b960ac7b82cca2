// Package fusermount has the set-uid program of that name mount FUSE file systems
// for an ordinary user, and unmount them.
package fusermount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// program is fuse3's: that of libfuse 2 knows fewer options.
const program = "fusermount3"

// Mount mounts at target, a directory that the user may write to, and returns the
// /dev/fuse to serve. The kernel answers no call on the mount before somebody does.
// Without the program the error wraps exec.ErrNotFound. A program that ctx ends may
// have mounted.
func Mount(ctx context.Context, target string, options []string) (*sys.Fd, error) {
	ours, theirs, err := sys.Socketpair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	socket := theirs.File()
	defer socket.Close()
	cmd := exec.CommandContext(ctx, program, "-o", strings.Join(options, ","), "--", target)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{socket}
	if err := run(cmd, program); err != nil {
		return nil, err
	}
	socket.Close() // or a program that sent nothing is waited for for ever
	return ours.RecvFd("/dev/fuse")
}

// Unmount undoes a mount of the user's at target; lazily it vanishes now, and the
// kernel drops it when nobody has a file of it open. EBUSY for one in use.
func Unmount(target string, lazy bool) error {
	args := []string{"-u"}
	if lazy {
		args = append(args, "-z")
	}
	return run(exec.Command(program, append(args, "--", target)...), program+" -u")
}

func run(cmd *exec.Cmd, what string) error {
	cmd.Env = append(cmd.Environ(), "LC_ALL=C")
	b, err := cmd.CombinedOutput()
	said := strings.TrimSpace(string(b))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("no %s in PATH (Debian: fuse3): %w", program, err)
	case strings.HasSuffix(said, syscall.EBUSY.Error()) || strings.HasSuffix(said, "Device or resource busy"):
		return fmt.Errorf("%s: %w", what, syscall.EBUSY)
	case said == "":
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w: %s", what, err, said)
}

// Option spells an option, in whose value fusermount3 takes a comma with a
// backslash before it.
func Option(key, value string) string {
	return key + "=" + strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(value)
}
