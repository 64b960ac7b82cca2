package thin

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// pretendUdev has udev seem to run, which answers nobody, until stop is called. The mount namespace is
// the test's own.
func (b *bench) pretendUdev() (stop func()) {
	b.Helper()
	b.check(sys.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	b.check(os.Mkdir("/run/udev", 0o755))
	b.check(os.WriteFile("/run/udev/control", nil, 0o600))
	return func() {
		b.Helper()
		b.check(sys.Umount("/run", 0))
	}
}

// udevAnswers does what udev's rules do for everything that is waited for.
func (b *bench) udevAnswers(i dm.Info) {
	b.Helper()
	_, err := dm.MakeNode(i)
	b.check(err)
	dmsetup := testenv.Program(b, "dmsetup", "dmsetup")
	cookies, err := exec.Command(dmsetup, "udevcookies").Output()
	b.check(err)
	for _, cookie := range regexp.MustCompile(`0x[0-9a-f]+`).FindAllString(string(cookies), -1) {
		if out, err := exec.Command(dmsetup, "udevcomplete", cookie).CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
	}
}

// A udev that does not answer holds up who waits for a node, and nobody else.
func TestUdevIsWaitedForWithoutTheLock(t *testing.T) {
	b := newBench(t)
	if dm.UdevRuns() {
		testenv.Optional(t, "udev runs here, and would answer itself")
	}
	p := b.open(b.fileSystem(128*mib), Options{})
	p.patience = time.Hour
	v := b.volume(p, 0)
	b.change(p, func(c *Change) error { return c.Deactivate(v.Name) })
	func() {
		defer b.pretendUdev()()
		activated, other, second := make(chan error, 1), make(chan error, 1), make(chan error, 1)
		activate := func(done chan error) {
			err := p.Activate(t.Context(), v)
			if err == nil && !p.Ready(v.Name) {
				err = errors.New("no node")
			}
			done <- err
		}
		go activate(activated)
		var i dm.Info
		testenv.Eventually(t, "active", func() bool { i, _ = p.Info(v.Name); return i.ActiveTable })
		go func() { other <- p.Exclusive(t.Context(), func(c *Change) error { return c.CreateThin(1) }) }()
		select {
		case err := <-other:
			b.check(err)
		case <-time.After(time.Minute):
			t.Error("it has the lock, and waits for udev")
		}
		go activate(second)
		select {
		case err := <-activated:
			t.Errorf("without udev: %v", err)
		default:
		}
		b.udevAnswers(i)
		b.check(errors.Join(<-activated, <-second))
	}()
	b.drop(p, v)
}

// A udev that never answers is an error in the end.
func TestUdevThatNeverAnswers(t *testing.T) {
	b := newBench(t)
	if dm.UdevRuns() {
		testenv.Optional(t, "udev runs here, and would answer itself")
	}
	p := b.open(b.fileSystem(128*mib), Options{})
	v := b.volume(p, 0)
	b.change(p, func(c *Change) error { return c.Deactivate(v.Name) })
	p.patience = time.Millisecond
	func() {
		defer b.pretendUdev()()
		if err := p.Activate(t.Context(), v); err == nil {
			t.Error("activated")
		}
	}()
	b.drop(p, v)
}
