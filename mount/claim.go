package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	// claimWait bounds the wait for another process that is just mounting, or a
	// server that is just going away.
	claimWait = 5 * time.Second
	// goneWait bounds the wait for an upper that is in use though no namespace
	// shows it mounted: most likely a mount that is just going away.
	goneWait = 2 * time.Second
)

// Claim makes sure that no overlay has upper as its upperdir or work as its workdir,
// and keeps others who ask so, and this package, from making one until release
// is called: a server of a union file system that is not the kernel's holds its
// claim for its life. It waits up to 5 s for another claim.
func Claim(ctx context.Context, upper, work string) (release func(), err error) {
	release, err = claim(ctx, &Layers{Upper: upper, Work: work})
	if err != nil {
		return nil, withSentinel("mount: claim", err)
	}
	return release, nil
}

// claim makes sure that the upper of a writable overlay is in no other mount,
// and that none is made until release is called.
func claim(ctx context.Context, l *Layers) (release func(), err error) {
	if l.Upper == "" {
		return func() {}, nil
	}
	upper, err := lockDir(ctx, "upper", l.Upper)
	if err != nil {
		return nil, err
	}
	work, err := lockDir(ctx, "workdir", l.Work)
	release = func() { work.Close(); upper.Close() }
	if err == nil {
		err = refuseUsed(ctx, l)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// lockDir takes an exclusive flock on the upper or the workdir itself.
func lockDir(ctx context.Context, what, path string) (*sys.Lock, error) {
	dir, err := sys.OpenDir(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var lock *sys.Lock
	err = poll(ctx, claimWait, func() (done bool, err error) {
		lock, err = dir.TryLock(sys.LockExclusive)
		return !sys.IsLocked(err), err
	})
	if sys.IsLocked(err) {
		return nil, fmt.Errorf("%s %s is locked: another process mounts it, or serves it to FUSE: %w: %w", what, path, errdefs.ErrFailedPrecondition, err)
	}
	return lock, err
}

// refuseUsed asks the kernel, and finds out whom to name.
func refuseUsed(ctx context.Context, l *Layers) error {
	return poll(ctx, goneWait, func() (done bool, err error) {
		answer, cause := probeUse(l.Upper, l.Work)
		if answer == kprobe.No {
			return true, nil
		}
		where, err := findUse(l)
		switch {
		case err != nil:
			return true, err
		case where != "":
			return true, inUse(l, "mounted at "+where)
		case answer == kprobe.Unknown:
			return true, nil // nobody shows it, and the kernel does not say
		}
		how := "by a mount that no mount namespace shows: one unmounted lazily, or attached nowhere"
		return false, fmt.Errorf("%w: %w", inUse(l, how+strays()), cause)
	})
}

func inUse(l *Layers, how string) error {
	return fmt.Errorf("upper %s is in use, %s; a second mount would corrupt it: %w: %w", l.Upper, how, errdefs.ErrFailedPrecondition, syscall.EBUSY)
}

// strays names processes with a file on an overlay that their mount namespace
// does not show: among them is whoever holds a mount that cannot be found.
func strays() string {
	const most = 10 // names in a message
	var held []string
	for _, p := range processes() {
		if h, ok := p.stray(); ok && len(held) < most {
			held = append(held, h.String())
		}
	}
	if len(held) == 0 {
		return ""
	}
	return "; perhaps held by " + strings.Join(held, ", ")
}

// stray is the first file on an overlay that p uses and its mount namespace
// does not show.
func (p process) stray() (Holder, bool) {
	infos, err := listFile(p.dir + "/mountinfo")
	if err != nil {
		return Holder{}, false
	}
	shown := map[uint64]bool{}
	for _, i := range infos {
		shown[uint64(i.ID)] = true
	}
	held := p.uses(func(link string, s sys.Stat) bool {
		fs, err := sys.StatfsPath(link)
		return !shown[s.MountID] && err == nil && fs.Type == sys.OVERLAYFS_SUPER_MAGIC
	})
	if len(held) == 0 {
		return Holder{}, false
	}
	return held[0], true
}

// poll calls f until it is done, wait is over or ctx ends; it returns f's last
// error, or ctx's.
func poll(ctx context.Context, wait time.Duration, f func() (done bool, err error)) error {
	end := time.Now().Add(wait)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		done, err := f()
		if done || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// UpperInUse tells whether an overlay mount, in whatever mount namespace, has
// upper as its upperdir or work as its workdir, and if one can be found, where
// it is mounted; or whether somebody has a Claim on one of them, and who. Unknown
// where neither the kernel nor any readable namespace tells. Errors are about the
// directories.
func UpperInUse(upper, work string) (a kprobe.Answer, where string, err error) {
	for _, dir := range []string{upper, work} {
		if who := claimant(dir); who != "" {
			return kprobe.Yes, who, nil
		}
	}
	l := &Layers{Upper: upper, Work: work}
	a, err = probeUse(upper, work)
	if a == kprobe.No {
		return a, "", nil
	}
	if errors.Is(err, os.ErrNotExist) {
		return a, "", withSentinel("mount: upper in use", err)
	}
	if where, err = findUse(l); err == nil && where != "" {
		a = kprobe.Yes
	}
	return a, where, err
}

// claimant says who has the lock of a claim on a directory; "" if nobody has, or
// the directory cannot be opened.
func claimant(dir string) string {
	f, err := sys.OpenDir(dir)
	if err != nil {
		return ""
	}
	defer f.Close()
	if held, err := f.FlockHeld(); err != nil || !held {
		return ""
	}
	who := "a process that serves or mounts it"
	st, err := f.Stat("")
	if err != nil {
		return who
	}
	locks, _ := os.ReadFile("/proc/locks")
	file := fmt.Sprintf("%02x:%02x:%d", st.Dev>>32, uint32(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		// 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF
		if w := strings.Fields(line); len(w) > 5 && w[1] == "FLOCK" && w[5] == file {
			pid, _ := strconv.Atoi(w[4])
			return fmt.Sprintf("a union served or mounted by process %s (%s)", w[4], process{pid, "/proc/" + w[4]}.comm())
		}
	}
	return who
}

// probeUse asks the kernel whether upper or work are in use by an overlay: a
// throw-away overlay, never mounted, has them as lowers, and an upper of its own
// on an unattached tmpfs. With index=on the kernel answers EBUSY to a lower that is
// another mount's upper or work (fs/overlayfs/super.c: ovl_get_layers,
// ovl_report_in_use; seen on 6.1 and 6.18). It reads the directories and writes nothing
// to them. The mark is on the inode, so the mount's namespace does not matter.
//
// overlayfs turns index off by itself where it may not use file handles: in a
// user namespace, or for lowers on a file system without them. Then no index
// directory appears in the throw-away work, and the answer is Unknown.
//
// Before 6.15 the layers of an overlay must be in the caller's mount namespace
// (fs/namespace.c: clone_private_mount), so the tmpfs is attached there in a mount
// namespace for the moment, and covers the workdir, which was opened before.
func probeUse(upper, work string) (kprobe.Answer, error) {
	scratch, err := detachedTmpfs("u", "w")
	if err != nil {
		return kprobe.Unknown, err
	}
	defer scratch.Close()
	p := &plan{
		fstype: "overlay", source: "layerctl-probe",
		layers: &Layers{Lowers: []string{upper, work}, Upper: scratch.ProcPath() + "/u", Work: scratch.ProcPath() + "/w"},
		params: []param{{"index", "on", true}, {"redirect_dir", "off", true}, {"metacopy", "off", true}},
	}
	if layerByLayer().Answer == kprobe.Yes {
		a, err := p.probe(scratch, p.setLayers)
		if a != kprobe.Unknown || !errors.Is(err, syscall.EINVAL) {
			return a, err
		}
	}
	a := kprobe.Unknown
	err = inPrivateNamespace(func() (err error) {
		lowers, err := openLayers(p.layers.Lowers)
		defer closeAll(lowers)
		if err == nil {
			err = scratch.MoveTo(lowers[1])
		}
		if err == nil {
			a, err = p.probe(scratch, func(c *sys.FsContext) error { return p.setPage(c, lowers) })
		}
		return err
	})
	return a, err
}

// probe makes the throw-away overlay, whose upper and work are on scratch, and
// says what came of it.
func (p *plan) probe(scratch *sys.Fd, layers func(*sys.FsContext) error) (kprobe.Answer, error) {
	c, err := p.instance(layers)
	if errors.Is(err, syscall.EBUSY) {
		return kprobe.Yes, err
	}
	if err != nil {
		return kprobe.Unknown, err
	}
	defer c.Close()
	if _, err := scratch.Stat("w/index"); err != nil {
		return kprobe.Unknown, err
	}
	return kprobe.No, nil
}

// setPage names the layers in the words of mount(2), the lowers by descriptor: so
// they are short, and no byte of a name divides anything.
func (p *plan) setPage(c *sys.FsContext, lowers []*sys.Fd) error {
	var names []string
	for _, l := range lowers {
		names = append(names, l.ProcPath())
	}
	for _, o := range []param{{"source", p.source, true}, {"lowerdir", strings.Join(names, ":"), true},
		{"upperdir", p.layers.Upper, true}, {"workdir", p.layers.Work, true}} {
		if err := setParam(c, o); err != nil {
			return err
		}
	}
	return nil
}

func openLayers(dirs []string) (open []*sys.Fd, err error) {
	for _, dir := range dirs {
		f, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
		if err != nil {
			return open, err
		}
		open = append(open, f)
	}
	return open, nil
}

func closeAll(open []*sys.Fd) {
	for _, f := range open {
		f.Close()
	}
}

// detachedTmpfs makes a tmpfs that is attached nowhere, with directories in it.
func detachedTmpfs(dirs ...string) (*sys.Fd, error) {
	p := &plan{fstype: "tmpfs", source: "layerctl-probe", params: []param{{"size", "1m", true}}}
	m, err := p.plain()
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		if err := m.Mkdir(d, 0o700); err != nil {
			m.Close()
			return nil, err
		}
	}
	return m, nil
}

// findUse looks for an overlay with the same upper or work in every mount
// namespace that can be read, and says where it is; "" if there is none.
func findUse(l *Layers) (where string, err error) {
	upper, err := sys.StatPath(l.Upper)
	if err != nil {
		return "", err
	}
	work, err := sys.StatPath(l.Work)
	if err != nil {
		return "", err
	}
	same := func(root, dir string, s sys.Stat) bool {
		t, err := sys.StatPath(path.Join(root, dir))
		return err == nil && dir != "" && t.Dev == s.Dev && t.Ino == s.Ino
	}
	err = everyNamespace(func(p process, infos []Info) bool {
		root := p.dir + "/root"
		for _, i := range infos {
			if i.Type != "overlay" {
				continue
			}
			o, err := OverlayLayers(i.Mount())
			if err != nil || !same(root, o.Upper, upper) && !same(root, o.Work, work) {
				continue
			}
			where = i.Target
			if p.pid != 0 {
				where = fmt.Sprintf("%s in the mount namespace of process %d (%s)", i.Target, p.pid, p.comm())
			}
			return true
		}
		return false
	})
	return where, err
}
