package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Init is the guest's first process: it makes the guest ready, runs the task
// and powers off. In any other process it returns at once. What it cannot do it
// writes to the console and panics; a kernel without a first process does, too,
// and so the host learns.
func Init() {
	if os.Getpid() != 1 || os.Getenv(envRun) == "" {
		return
	}
	if err := serve(os.Getenv(envRun)); err != nil {
		panic(fmt.Sprintf("vm: the guest cannot be made ready: %v", err))
	}
	syscall.Sync()
	err := syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	panic(fmt.Sprintf("vm: power off: %v", err))
}

func serve(run string) error {
	b, err := os.ReadFile(filepath.Join(run, taskFile))
	if err != nil {
		return err
	}
	var t task
	if err := json.Unmarshal(b, &t); err != nil {
		return err
	}
	if err := firstMounts(); err != nil {
		return err
	}
	if err := loadModules(t.Modules); err != nil {
		return err
	}
	// Open before /tmp, which may hold the run's directory, is another one.
	if err := mountHost(run); err != nil {
		return err
	}
	status, err := os.Create(filepath.Join(run, statusFile))
	if err != nil {
		return err
	}
	if err := ownPlaces(t); err != nil {
		return err
	}
	code, err := perform(t)
	if err != nil {
		return err
	}
	if _, err := status.WriteString(strconv.Itoa(code) + "\n"); err != nil {
		return err
	}
	return errors.Join(status.Sync(), status.Close())
}

// firstMounts mounts the kernel's own file systems. Before them /proc is the host's.
func firstMounts() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := sys.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	for _, l := range [][2]string{{"/proc/self/fd", "fd"}, {"fd/0", "stdin"}, {"fd/1", "stdout"}, {"fd/2", "stderr"}} {
		if err := os.Symlink(l[0], "/dev/"+l[1]); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

func loadModules(files []string) error {
	for _, f := range files {
		m, err := sys.Open(f, sys.O_RDONLY, 0)
		if err != nil {
			return err
		}
		err = m.LoadModule()
		m.Close()
		if err != nil && !errors.Is(err, syscall.EEXIST) {
			return err
		}
	}
	return nil
}

// mountHost makes a directory of the host writable, at its own path.
func mountHost(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil && !errors.Is(err, syscall.EROFS) {
		return err
	}
	return sys.Mount("host", dir, "hostfs", 0, dir)
}

// own are the directories that the guest has for itself, in memory.
var own = []string{"/tmp", "/var/tmp", "/run", "/mnt", "/dev/shm"}

// ownPlaces gives the guest directories of its own, and then those of the host that
// can be below them: where the command runs, and what it may write to.
func ownPlaces(t task) error {
	for _, m := range [][3]string{{"devpts", "/dev/pts", "ptmxmode=666"}, {"cgroup2", "/sys/fs/cgroup", ""}} {
		if err := mountNew(m[0], m[1], m[2]); err != nil {
			return err
		}
	}
	for _, dir := range own {
		if err := mountNew("tmpfs", dir, "mode=1777"); err != nil {
			return err
		}
	}
	if dir := hiddenBy(own, t.Dir); dir != "" {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := sys.Mount("host", dir, "hostfs", sys.MS_RDONLY, dir); err != nil {
			return err
		}
	}
	for _, dir := range t.Share {
		if err := mountHost(dir); err != nil {
			return err
		}
	}
	return nil
}

func mountNew(kind, dir, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil && !errors.Is(err, syscall.EROFS) {
		return err
	}
	return sys.Mount(kind, dir, kind, 0, data)
}

// hiddenBy returns the directory right below one of the own ones that dir is or
// is below.
func hiddenBy(own []string, dir string) string {
	for _, o := range own {
		if rest, ok := strings.CutPrefix(dir, o+"/"); ok {
			first, _, _ := strings.Cut(rest, "/")
			return filepath.Join(o, first)
		}
	}
	return ""
}

// perform runs the command on the two serial lines and returns its status.
func perform(t task) (int, error) {
	stdout, err := serial("/dev/ttyS0")
	if err != nil {
		return 0, err
	}
	stderr, err := serial("/dev/ttyS1")
	if err != nil {
		return 0, err
	}
	if err := os.Chdir(t.Dir); err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	out, errs := os.NewFile(uintptr(stdout.Int()), "stdout"), os.NewFile(uintptr(stderr.Int()), "stderr")
	code := 127 // as a shell says it
	program, err := lookPath(t.Argv[0], t.Env)
	if err == nil {
		code, err = await(program, t, null, out, errs)
	}
	if err != nil {
		fmt.Fprintf(errs, "vm: %s: %v\n", t.Argv[0], err)
	}
	return code, errors.Join(stdout.Drain(), stderr.Drain())
}

func serial(path string) (*sys.Fd, error) {
	f, err := sys.Open(path, sys.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	return f, f.MakeRaw()
}

func lookPath(name string, env []string) (string, error) {
	os.Clearenv()
	for _, kv := range env {
		for i := range kv {
			if kv[i] == '=' {
				os.Setenv(kv[:i], kv[i+1:])
				break
			}
		}
	}
	return exec.LookPath(name)
}

// await starts the program, reaps everything that ends, as a first process must,
// until the program does, and returns its status.
func await(program string, t task, stdio ...*os.File) (int, error) {
	p, err := os.StartProcess(program, t.Argv, &os.ProcAttr{Dir: t.Dir, Env: t.Env, Files: stdio, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return 126, err
	}
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err == syscall.EINTR || err == nil && pid != p.Pid:
		case err != nil:
			return 126, err
		case ws.Signaled():
			return 128 + int(ws.Signal()), nil
		default:
			return ws.ExitStatus(), nil
		}
	}
}
