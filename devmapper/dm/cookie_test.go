package dm_test

import (
	"context"
	"errors"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// uevents is a socket on which the kernel tells what udev hears.
func uevents(b *bench) (next func() string) {
	const kobjectUevent = 15
	s, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, kobjectUevent)
	b.check(err)
	b.Cleanup(func() { syscall.Close(s) })
	b.check(syscall.SetsockoptTimeval(s, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: 60}))
	b.check(syscall.Bind(s, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK, Groups: 1}))
	return func() string {
		buf := make([]byte, 16<<10)
		n, _, err := syscall.Recvfrom(s, buf, 0)
		b.check(err)
		return string(buf[:n])
	}
}

// pretendUdev makes dmsetup believe that udev runs, which it wants for cookies. The
// mount namespace is the test's own.
func pretendUdev(b *bench) {
	b.check(sys.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	b.Cleanup(func() { b.check(sys.Umount("/run", 0)) })
	b.check(os.Mkdir("/run/udev", 0o755))
	b.check(os.WriteFile("/run/udev/control", nil, 0o600))
	if !dm.UdevRuns() {
		b.Error("UdevRuns does not see it")
	}
}

// dmsetup, called with what the kernel's event says, does what udev's rules do.
func TestCookieWaitsForUdev(t *testing.T) {
	b := newBench(t)
	if dm.UdevRuns() {
		testenv.Optional(t, "udev runs here, and would lower the cookie itself")
	}
	pretendUdev(b)
	disk, _ := b.loop(1 << 20)
	next := uevents(b)
	k, err := dm.NewCookie()
	b.check(err)
	_, err = b.Create("lt-cookie", "")
	b.check(err)
	t.Cleanup(func() { b.check(b.Remove("lt-cookie", false)) })
	b.check(b.Load("lt-cookie", []dm.Target{{Length: 8, Type: "linear", Params: disk + " 0"}}, false))
	b.check(b.With(k).Resume("lt-cookie"))
	if err := b.With(k).Rename("lt-cookie", "lt-cookie"); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("%v", err) // a failed change is not waited for
	}
	cookie := ""
	for cookie == "" {
		if m := regexp.MustCompile(`\x00DM_COOKIE=(\d+)\x00`).FindStringSubmatch(next()); m != nil {
			cookie = m[1]
		}
	}
	if all := b.dmsetup("udevcookies"); strings.Count(all, "0x") == 0 {
		t.Errorf("dmsetup sees no cookie: %s", all)
	}
	flags := b.dmsetup("udevflags", cookie)
	for _, f := range []string{"PRIMARY_SOURCE", "DISABLE_SUBSYSTEM_RULES", "DISABLE_DISK_RULES", "DISABLE_OTHER_RULES"} {
		if !strings.Contains(flags, "DM_UDEV_"+f+"_FLAG='1'") {
			t.Errorf("no %s in %s", f, flags)
		}
	}
	if strings.Contains(flags, "DISABLE_DM_RULES") {
		t.Errorf("no node: %s", flags)
	}
	b.dmsetup("udevcomplete", cookie)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b.check(k.Wait(ctx))
	if all := b.dmsetup("udevcookies"); strings.Contains(all, "0xd4d") {
		t.Errorf("left: %s", all)
	}
}

func TestCookieWithoutUdevEndsWithTheContext(t *testing.T) {
	b := newBench(t)
	disk, _ := b.loop(1 << 20)
	k, err := dm.NewCookie()
	b.check(err)
	b.device("lt-cookie", dm.Target{Length: 8, Type: "linear", Params: disk + " 0"})
	b.check(b.Load("lt-cookie", []dm.Target{{Length: 16, Type: "linear", Params: disk + " 0"}}, false))
	b.check(b.With(k).Resume("lt-cookie"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Wait(ctx); !errors.Is(err, context.Canceled) && !dm.UdevRuns() {
		t.Errorf("%v", err)
	}
}
