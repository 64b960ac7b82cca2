package userns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// spawn starts this program in new user and mount namespaces with its ids
// mapped. The child of clone has every capability there, but would lose them at
// execve, its id being unmapped still; ambient capabilities survive it.
//
// The mount namespace belongs to a less privileged user namespace, so the
// kernel makes its mounts slaves of the host's (fs/namespace.c:copy_mnt_ns):
// what the host mounts and unmounts later is followed, nothing of ours goes out.
func spawn(cmd *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, r)
	cmd.Env = append(cmd.Env, envSync+"="+strconv.Itoa(2+len(cmd.ExtraFiles)))
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS
	cmd.SysProcAttr.AmbientCaps = allCaps()
	err = cmd.Start()
	r.Close()
	if err != nil {
		return explain(err)
	}
	if err := mapIDs(cmd.Process.Pid); err != nil {
		w.Close()
		_ = cmd.Wait()
		return fmt.Errorf("user namespace: map ids: %w", err)
	}
	if _, err := w.Write([]byte{1}); err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	return nil
}

// mapIDs writes the maps; where the mapping tools refuse the ranges, the user's
// own ids at least.
func mapIDs(pid int) error {
	m := maps()
	err := writeMaps(pid, m)
	if err == nil || m.single != "" {
		return err
	}
	own := idMaps{uid: m.uid[:1], gid: m.gid[:1], single: err.Error()}
	if err2 := writeMaps(pid, own); err2 != nil {
		return errors.Join(err, err2)
	}
	fmt.Fprintf(os.Stderr, "layerctl: only your own user id is mapped: %v\n", err)
	return nil
}

// allCaps lists the capabilities that the kernel knows.
func allCaps() []uintptr {
	last := 40 // CAP_CHECKPOINT_RESTORE, Linux 5.9
	if b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			last = n
		}
	}
	caps := make([]uintptr, last+1)
	for i := range caps {
		caps[i] = uintptr(i)
	}
	return caps
}

// explain says what stands in the way of user namespaces, by errno and by the
// switches that distributions have.
func explain(err error) error {
	var why []string
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
		why = append(why, switches()...)
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EUSERS) { // in words: there is space on every device
		return fmt.Errorf("user namespace: %w: no more are allowed (user.max_user_namespaces=%s)", errdefs.ErrUnavailable, sysctl("user/max_user_namespaces"))
	}
	if errors.Is(err, syscall.EINVAL) {
		why = append(why, "the kernel is built without CONFIG_USER_NS")
	}
	if len(why) == 0 {
		return fmt.Errorf("user namespace: %w: %w", errdefs.ErrUnavailable, err)
	}
	return fmt.Errorf("user namespace: %w: %w (%s)", errdefs.ErrUnavailable, err, strings.Join(why, ", "))
}

// switches names the settings that forbid user namespaces here.
func switches() []string {
	var on []string
	for _, s := range []struct{ name, forbids string }{
		{"kernel/unprivileged_userns_clone", "0"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1"},
		{"user/max_user_namespaces", "0"},
	} {
		if sysctl(s.name) == s.forbids {
			on = append(on, strings.ReplaceAll(s.name, "/", ".")+"="+s.forbids)
		}
	}
	if len(on) == 0 {
		on = append(on, "a sandbox, a seccomp filter or a chroot forbids it")
	}
	return on
}

func sysctl(name string) string {
	b, _ := os.ReadFile("/proc/sys/" + name)
	return strings.TrimSpace(string(b))
}
