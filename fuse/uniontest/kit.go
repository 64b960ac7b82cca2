package uniontest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// Kit is what a case works with: one union, the directories of its layers, and
// helpers that end the test on an error. For one goroutine.
type Kit struct {
	*testing.T
	actor  *Subject // mounts while the case works
	reader *Subject // mounts afterwards and must list the same
	fs     *fsys

	dir     string // holds everything of this case
	spec    Spec
	mnt     string // the mountpoint
	mounted Mounted
	mounts  int        // how many there were
	before  [][]string // the lowers' listings, before the first mount
	start   sys.Time   // no layer has a later time
	saved   []string   // the upper's form on disk in the end
	files   []*os.File // opened by the case
	tmpfses []string   // mounted for the case

	unread string // why the reader is not asked
	unlike string // why the two uppers are not compared
	// unrepaired: an upper was made by hand, and a subject does not repair it.
	unrepaired bool
	noLowers   bool // the case changes lowers itself
}

// newKit makes the directories of a case.
func newKit(t *testing.T, f *fsys, actor, reader *Subject) *Kit {
	t.Helper()
	k := &Kit{T: t, fs: f, actor: actor, reader: reader, dir: f.newDir(t), start: now(t)}
	k.mnt = k.mkdir("m")
	k.spec.Upper, k.spec.Work = k.mkdir("u"), k.mkdir("w")
	if f.user {
		k.spec.Options = append(k.spec.Options, "userxattr")
	}
	return k
}

// now is a time of the file systems' clock, which is coarser than the
// processor's.
func now(t testing.TB) sys.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts); err != nil {
		t.Fatal(err)
	}
	return sys.Time{Sec: ts.Sec, Nsec: uint32(ts.Nsec)}
}

func (k *Kit) mkdir(name string) string {
	p := filepath.Join(k.dir, name)
	k.ok(os.Mkdir(p, 0o755))
	return p
}

// ov is the full name of an overlay xattr under the union's options.
func (k *Kit) ov(name string) string {
	if k.spec.option("userxattr") != "" {
		return "user.overlay." + name
	}
	return "trusted.overlay." + name
}

// options adds mount options. It comes before layers that depend on them.
func (k *Kit) options(o ...string) {
	k.Helper()
	k.spec = k.spec.with(o...)
	if k.spec.option("index") == "on" {
		k.needRoot("index=on, which wants file handles")
	}
	if k.spec.option("metacopy") == "on" {
		k.needRoot("metacopy=on")
	}
}

// lower adds a lower below those that are there, made by changes.
func (k *Kit) lower(changes ...change) string {
	k.Helper()
	d := k.mkdir(fmt.Sprintf("l%d", len(k.spec.Lowers)))
	k.ok(build(d, k.ov(""), changes))
	k.spec.Lowers = append(k.spec.Lowers, d)
	return d
}

// datalower adds a data-only lower.
func (k *Kit) datalower(changes ...change) {
	k.Helper()
	d := k.mkdir(fmt.Sprintf("d%d", len(k.spec.Data)))
	k.ok(build(d, k.ov(""), changes))
	k.spec.Data = append(k.spec.Data, d)
}

// upper makes the upper by hand, as an earlier mount would have left it.
func (k *Kit) upper(changes ...change) {
	k.Helper()
	k.ok(build(k.spec.Upper, k.ov(""), changes))
	k.unrepaired = k.differs(NoRepair) || k.reader.differs(NoRepair) != ""
}

// readOnly leaves upper and workdir out.
func (k *Kit) readOnly() { k.spec.Upper, k.spec.Work = "", "" }

// defaults are options that the subjects would otherwise choose for themselves.
var defaults = []string{"index=off", "redirect_dir=off", "metacopy=off", "xino=off"}

// full is the spec with every option said.
func (k *Kit) full() Spec {
	s := k.spec
	s.Options = nil
	for _, d := range defaults {
		key, _, _ := strings.Cut(d, "=")
		if key == "redirect_dir" && k.spec.option("userxattr") != "" {
			d = "redirect_dir=nofollow" // what the kernel takes with userxattr
		}
		if k.spec.option(key) == "" {
			s.Options = append(s.Options, d)
		}
	}
	s.Options = append(s.Options, k.spec.Options...)
	return s
}

// unlikeBy leaves the comparison of the two uppers out where either subject has a
// difference.
func (k *Kit) unlikeBy(d Difference) {
	for _, s := range []*Subject{k.actor, k.reader} {
		if why := s.differs(d); why != "" {
			k.unlike = why
		}
	}
}

// union builds a usual union: changes of one lower, then mount.
func (k *Kit) union(changes ...change) { k.Helper(); k.lower(changes...); k.mount() }

// mount mounts the union.
func (k *Kit) mount() { k.Helper(); k.ok(k.tryMount()) }

func (k *Kit) tryMount() error {
	k.Helper()
	if k.before == nil {
		k.before = k.listLowers()
	}
	m, err := k.actor.Mount(k.Context(), k.full(), k.mnt)
	if err == nil {
		k.mounted = m
		k.mounts++
		k.fs.watch(m)
	}
	return err
}

// refused says that mounting must fail; errno is what the kernel answers.
func (k *Kit) refused(errno syscall.Errno) {
	k.Helper()
	err := k.tryMount()
	if err == nil {
		k.Fatalf("mounted, which must fail with %v", errno)
	}
	if k.actor.Kernel && !errors.Is(err, errno) {
		k.Errorf("mounting fails with %v, want %v", err, errno)
	}
	k.unread = "nothing was mounted"
}

// unmount closes what the case opened and unmounts, if mounted.
func (k *Kit) unmount() {
	k.Helper()
	k.closeAll()
	if m := k.mounted; m != nil {
		k.mounted = nil
		k.fs.watch(nil)
		if err := m.Unmount(); err != nil {
			k.Fatalf("unmount: %v", err)
		}
	}
}

// remount unmounts and mounts again.
func (k *Kit) remount() { k.Helper(); k.unmount(); k.mount() }

// dropCaches forgets what the kernel has cached of all file systems.
func (k *Kit) dropCaches() {
	k.Helper()
	if d, err := sys.OpenDir(k.mnt); err == nil {
		k.ok(d.SyncFS())
		d.Close()
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil && !k.fs.user {
		k.Fatal(err)
	}
}

func (k *Kit) listLowers() [][]string {
	k.Helper()
	all := [][]string{}
	for _, d := range slices.Concat(k.spec.Lowers, k.spec.Data) {
		lines, err := listing{ctimes: true}.list(d)
		k.ok(err)
		all = append(all, lines)
	}
	return all
}

// p is a path in the mount.
func (k *Kit) p(path string) string { return k.mnt + "/" + path }

// u is a path in the upper.
func (k *Kit) u(path string) string { return k.spec.Upper + "/" + path }

// l is a path in lower n.
func (k *Kit) l(n int, path string) string { return k.spec.Lowers[n] + "/" + path }

// finish compares what must be the same after every case.
func (k *Kit) finish() {
	k.Helper()
	if k.Failed() {
		return
	}
	k.closeAll()
	live := k.listMount()
	k.unmount()
	k.lowersUntouched()
	k.workIsClean()
	if k.spec.Upper != "" {
		lines, err := listing{since: k.start, comparable: true}.list(k.spec.Upper)
		k.ok(err)
		k.saved = lines
	}
	if k.unread != "" || live == nil || k.Failed() {
		return
	}
	k.readBy(k.reader, live)
	if !k.Failed() && !k.actor.Kernel {
		k.readBy(k.actor, live)
	}
	k.lowersUntouched()
}

// listMount lists the mount, nil if there is none.
func (k *Kit) listMount() []string {
	k.Helper()
	if k.mounted == nil {
		return nil
	}
	lines, err := listing{}.list(k.mnt)
	k.ok(err)
	return lines
}

// readBy mounts what the case left and compares the listing.
func (k *Kit) readBy(s *Subject, live []string) {
	k.Helper()
	m, err := s.Mount(k.Context(), k.full(), k.mnt)
	if err != nil {
		k.Errorf("%s does not mount what %s left: %v", s.Name, k.actor.Name, err)
		return
	}
	k.fs.watch(m)
	defer k.fs.watch(nil)
	lines, err := listing{}.list(k.mnt)
	if err != nil {
		k.Errorf("list by %s: %v", s.Name, err)
	} else if d := difference(live, lines); d != "" {
		k.Errorf("after the case %s shows otherwise (+) than %s did (-):\n%s", s.Name, k.actor.Name, d)
	}
	if err := m.Unmount(); err != nil {
		k.Errorf("unmount by %s: %v", s.Name, err)
	}
}

func (k *Kit) lowersUntouched() {
	k.Helper()
	if k.before == nil || k.noLowers {
		return
	}
	for i, lines := range k.listLowers() {
		if d := difference(k.before[i], lines); d != "" {
			k.Errorf("lower %d was changed:\n%s", i, d)
		}
	}
}

// workIsClean: work/work is empty but for what volatile keeps there, and one
// 0/0 device, which the kernel keeps to link whiteouts to, and clears away at the
// next mount. work/index may hold entries.
func (k *Kit) workIsClean() {
	k.Helper()
	if k.spec.Work == "" {
		return
	}
	work := filepath.Join(k.spec.Work, "work")
	names, _ := os.ReadDir(work) // may not be there
	spare := 0
	for _, n := range names {
		if st, err := sys.LstatPath(work + "/" + n.Name()); err == nil && st.IsWhiteout() && spare == 0 {
			spare++
		} else if n.Name() != "incompat" {
			k.Errorf("left in the workdir: %s", n.Name())
		}
	}
}

// closeAll closes what the case opened.
func (k *Kit) closeAll() {
	for _, f := range k.files {
		f.Close()
	}
	k.files = nil
}

// cleanup leaves nothing, whatever happened.
func (k *Kit) cleanup() {
	k.closeAll()
	k.unmountLate()
	for _, d := range k.tmpfses {
		if err := unmount(d); err != nil {
			k.Errorf("cleanup: %v", err)
		}
	}
	if err := os.RemoveAll(k.dir); err != nil {
		k.Errorf("cleanup: %v", err)
	}
}

func (k *Kit) unmountLate() {
	if k.mounted == nil {
		return
	}
	m := k.mounted
	k.mounted = nil
	k.fs.watch(nil)
	err := sys.Umount(k.mnt, sys.MNT_DETACH)
	m.Kill()
	if err != nil {
		k.Errorf("cleanup: %v", err)
	}
}

// as runs f with another user's ids, without capabilities, in a thread that
// ends with it. Files opened before stay open.
func (k *Kit) as(uid, gid int, f func()) {
	k.Helper()
	k.inThread(func() syscall.Errno {
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0); e != 0 {
			return e
		}
		g, u := uintptr(gid), uintptr(uid)
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESGID, g, g, g); e != 0 {
			return e
		}
		_, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, u, u, u)
		return e
	}, f)
}

// inThread runs f in a thread of its own that set has changed. A fatal error in
// f ends the case.
func (k *Kit) inThread(set func() syscall.Errno, f func()) {
	k.Helper()
	done := make(chan error, 1)
	go func() {
		err := errors.New("f did not return")
		defer func() { done <- err }()
		runtime.LockOSThread() // never unlocked: the thread ends here
		if e := set(); e != 0 {
			err = fmt.Errorf("change the thread: %w", e)
			return
		}
		f()
		err = nil
	}()
	if err := <-done; err != nil {
		if !k.Failed() {
			k.Error(err)
		}
		k.FailNow()
	}
}

// needRoot ends a case that a user namespace cannot run.
func (k *Kit) needRoot(what string) {
	k.Helper()
	if k.fs.user {
		k.skip("not in a user namespace: " + what)
	}
}

func (k *Kit) skip(reason string) { k.Helper(); testenv.Optional(k.T, reason) }

// differs returns whether the actor has a named difference.
func (k *Kit) differs(d Difference) bool { return k.actor.differs(d) != "" }

// watchdog kills a server that hangs, so that the case fails instead of hanging.
const watchdog = 3 * time.Minute

// tmpfs mounts a file system of its own for the case and returns its root.
func (k *Kit) tmpfs(size int64) string {
	k.Helper()
	d := k.mkdir(fmt.Sprintf("t%d", len(k.tmpfses)))
	k.ok(sys.Mount("tmpfs", d, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	k.tmpfses = append(k.tmpfses, d)
	return d
}
