package uniontest

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// envUser makes the test binary run the cases where it is, as root of a user
// namespace.
const envUser = "LAYERCTL_UNIONTEST_USER"

// userJob is what the process in the user namespace gets.
type userJob struct{ Kind, Dir string }

// nobody is the user of the unprivileged run, with ids of its own as
// /etc/subuid would give them.
const nobody, nobodySub = 65534, 200000

// RunUser runs the cases of layers once more as root of a user namespace, where
// unions have userxattr. c.FS has at most one kind. The calling test is run again
// in another process, where this call does the work.
func RunUser(t *testing.T, c Config) {
	if text := os.Getenv(envUser); text != "" {
		var j userJob
		if err := json.Unmarshal([]byte(text), &j); err != nil {
			t.Fatal(err)
		}
		c.User, c.FS, c.Dir = true, []string{j.Kind}, j.Dir
		Run(t, c)
		return
	}
	all := kinds(c)
	if len(all) == 0 { // LAYERCTL_FS names others
		return
	}
	kind := all[0]
	fs := testenv.FS(t, kind, testenv.Size(8<<30))
	letThrough(t, fs)
	j := userJob{kind, filepath.Join(fs, "user")}
	if err := errors.Join(os.Mkdir(j.Dir, 0o755), os.Chown(j.Dir, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	openFuse(t, fs)
	j.run(t)
}

// openFuse puts a /dev/fuse that everybody may open over the machine's.
func openFuse(t *testing.T, fs string) {
	t.Helper()
	dev := filepath.Join(fs, "fuse")
	st, err := sys.StatPath("/dev/fuse")
	if err != nil {
		testenv.Skip(t, "no /dev/fuse")
	}
	if err := unix.Mknod(dev, unix.S_IFCHR|0o600, int(unix.Mkdev(st.RdevMajor, st.RdevMinor))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dev, 0o666), sys.Mount(dev, "/dev/fuse", "", sys.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount("/dev/fuse"); err != nil {
			t.Error(err)
		}
	})
}

func (j userJob) run(t *testing.T) {
	t.Helper()
	text, err := json.Marshal(j)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+regexp.QuoteMeta(t.Name())+"$"+below(), "-test.timeout=10m")
	if testing.Verbose() {
		cmd.Args = append(cmd.Args, "-test.v")
	}
	cmd.Env = append(os.Environ(), envUser+"="+string(text))
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: nobody, Size: 1}, {ContainerID: 1, HostID: nobodySub, Size: 65535}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: 0, Gid: 0},
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("in the user namespace: %v", err)
	}
	t.Logf("in the user namespace:\n%s", out.Bytes())
}

// below is the part of -test.run that selects cases.
func below() string {
	for _, a := range os.Args {
		if v, ok := strings.CutPrefix(a, "-test.run="); ok {
			if _, cases, ok := strings.Cut(v, "/"); ok {
				return "/" + cases
			}
		}
	}
	return ""
}
