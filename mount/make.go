package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// detached makes the mount, attached nowhere. errOldKernel where the kernel
// lacks the calls.
func (p *plan) detached(ctx context.Context) (*sys.Fd, error) {
	if p.layers != nil {
		return p.overlay(ctx)
	}
	m, err := p.plain()
	if err != nil || p.ids.empty() {
		return m, err
	}
	if err := mapIDs(m, p.ids, 0, p.recursive); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (p *plan) plain() (*sys.Fd, error) {
	if p.kind == bind {
		return p.bind()
	}
	source, done, err := p.device()
	if err != nil {
		return nil, err
	}
	defer done()
	return p.filesystem(func(c *sys.FsContext) error { return c.SetString("source", source) })
}

// bind copies the mount of the source, with its attributes changed before
// anybody sees it.
func (p *plan) bind() (*sys.Fd, error) {
	src, err := sys.Open(p.source, sys.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	m, err := src.OpenTree(true, p.recursive)
	if err == nil && p.attrs|p.clear != 0 {
		if err = m.SetMountAttr(sys.MountAttr{Set: p.attrs, Clear: p.clear}, false); err != nil {
			m.Close()
		}
	}
	if isOld(err) {
		return nil, fmt.Errorf("%w: %w", errOldKernel, err)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// mapIDs shows the owners of an unattached mount as the map says, and sets
// further attributes with it.
func mapIDs(m *sys.Fd, ids idmap, attrs uint64, recursive bool) error {
	ns, err := ids.namespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	err = m.SetMountAttr(sys.MountAttr{Set: sys.MOUNT_ATTR_IDMAP | attrs, UserNS: ns}, recursive)
	if errors.Is(err, syscall.EINVAL) || isOld(err) {
		return fmt.Errorf("the file system cannot be id-mapped by this kernel (ext4 5.12, xfs 5.12, btrfs 5.15, tmpfs 6.3), or is already: %w: %w",
			errdefs.ErrNotImplemented, err)
	}
	return err
}

// device is the mount's source: with "loop" a loop device, which frees itself
// with its last user; done must be called once the mount holds it.
func (p *plan) device() (source string, done func(), err error) {
	if !p.loop {
		return p.source, func() {}, nil
	}
	dev, err := sys.AttachLoop(p.source, sys.LoopOptions{
		ReadOnly: p.flags&sys.MS_RDONLY != 0, Autoclear: true, DirectIO: p.directIO,
	})
	if err != nil {
		return "", nil, err
	}
	return dev.Name(), func() { dev.Close() }, nil
}

// filesystem configures and makes a file system of p's type, attached nowhere.
// configure names what is mounted; flags and other options follow.
func (p *plan) filesystem(configure func(*sys.FsContext) error) (*sys.Fd, error) {
	c, err := p.instance(configure)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Mount(p.attrs)
}

// instance makes the file system without a mount of it.
func (p *plan) instance(configure func(*sys.FsContext) error) (*sys.FsContext, error) {
	c, err := sys.Fsopen(p.fstype)
	if isOld(err) {
		return nil, fmt.Errorf("%w: %w", errOldKernel, err)
	}
	if err != nil {
		return nil, err
	}
	if err := p.configure(c, configure); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (p *plan) configure(c *sys.FsContext, first func(*sys.FsContext) error) error {
	if err := first(c); err != nil {
		return err
	}
	for _, w := range p.super {
		if err := c.SetFlag(w); err != nil {
			return err
		}
	}
	for _, o := range p.params {
		if err := setParam(c, o); err != nil {
			return err
		}
	}
	return c.Create()
}

func setParam(c *sys.FsContext, o param) error {
	switch {
	case !o.hasValue:
		return c.SetFlag(o.key)
	case len(o.value) > sys.MaxFsconfigString:
		return fmt.Errorf("option %s has %d bytes, fsconfig(2) takes %d: %w",
			o.key, len(o.value), sys.MaxFsconfigString, errdefs.ErrInvalidArgument)
	}
	return c.SetString(o.key, o.value)
}

// overlay makes an overlay mount. With an id map the lowers are mapped, as
// containerd does: what is written belongs to whoever writes.
func (p *plan) overlay(ctx context.Context) (*sys.Fd, error) {
	release, err := claim(ctx, p.layers)
	if err != nil {
		return nil, err
	}
	defer release()
	known := layerByLayer()
	if known.Answer == kprobe.Unknown {
		return nil, known.Err
	}
	create := func() (*sys.Fd, error) { return p.filesystem(p.setLayers) }
	if known.Answer == kprobe.No {
		create = p.overlayPage
	} else if p.ids.empty() {
		return create()
	}
	var m *sys.Fd
	err = inPrivateNamespace(func() (err error) {
		if err = p.mapLowers(); err == nil {
			m, err = create()
		}
		return err
	})
	return m, err
}

// layerByLayer tells whether fsconfig(2) takes an overlay's layers one by one.
// Before 6.5 overlayfs had no options of its own there: the generic code took
// every word, known or not, and let mount(2)'s parser judge them in the end
// (fs/fs_context.c: legacy_parse_param). So an unknown word is asked first.
var layerByLayer = kprobe.Once(func() kprobe.Result {
	r := kprobe.Result{Feature: "lowerdir+"}
	c, err := sys.Fsopen("overlay")
	if isOld(err) {
		r.Answer, r.Err = kprobe.Unknown, fmt.Errorf("%w: %w", errOldKernel, err)
		return r
	}
	if err != nil {
		r.Answer, r.Err = kprobe.Unknown, err
		return r
	}
	defer c.Close()
	if c.SetFlag("no-such-word") == nil || isUnknownWord(c.SetString("lowerdir+", "/")) {
		r.Answer, r.Detail = kprobe.No, "kernel 6.8"
		return r
	}
	r.Answer = kprobe.Yes
	return r
})

func isUnknownWord(err error) bool {
	return errors.Is(err, syscall.EINVAL) && strings.Contains(err.Error(), "Unknown parameter")
}

// overlayPage makes an overlay by mount(2), which takes one page of options,
// for kernels that cannot do it layer by layer. It runs in a mount namespace that
// nobody else sees, so where it mounts does not matter: the result is a copy of
// that mount, attached nowhere.
func (p *plan) overlayPage() (*sys.Fd, error) {
	target := p.layers.Lowers[0]
	if err := p.overlayOld(target); err != nil {
		return nil, err
	}
	at, err := sys.Open(target, sys.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	return at.OpenTree(true, false)
}

// mapLowers covers each lower with an id-mapped bind of itself. It runs in a
// mount namespace that nobody else sees: overlayfs takes its own copies of the
// mounts, and mountinfo shows the lowers' true paths.
func (p *plan) mapLowers() error {
	if p.ids.empty() {
		return nil
	}
	ns, err := p.ids.namespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	for _, dir := range append(p.layers.Lowers[:len(p.layers.Lowers):len(p.layers.Lowers)], p.layers.Data...) {
		if err := mapLower(dir, ns); err != nil {
			return err
		}
	}
	return nil
}

func mapLower(dir string, ns *sys.Fd) error {
	at, err := sys.Open(dir, sys.O_PATH, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	m, err := at.OpenTree(true, false)
	if err != nil {
		return err
	}
	defer m.Close()
	err = m.SetMountAttr(sys.MountAttr{Set: sys.MOUNT_ATTR_IDMAP | sys.MOUNT_ATTR_RDONLY, UserNS: ns}, false)
	if errors.Is(err, syscall.EINVAL) {
		return fmt.Errorf("the file system of lower %s cannot be id-mapped by this kernel: %w: %w", dir, errdefs.ErrNotImplemented, err)
	}
	if err != nil {
		return err
	}
	return m.MoveTo(at)
}

// setLayers names the layers one by one.
func (p *plan) setLayers(c *sys.FsContext) error {
	source := p.source
	if source == "" {
		source = "overlay"
	}
	if err := c.SetString("source", source); err != nil {
		return err
	}
	for _, dir := range p.layers.Lowers {
		if err := setLayer(c, "lowerdir+", dir); err != nil {
			return err
		}
	}
	for _, dir := range p.layers.Data {
		if err := setLayer(c, "datadir+", dir); err != nil {
			return err
		}
	}
	if p.layers.Upper == "" {
		return nil
	}
	if err := setLayer(c, "upperdir", p.layers.Upper); err != nil {
		return err
	}
	return setLayer(c, "workdir", p.layers.Work)
}

// setLayer names one directory. A string is the plain name for lowerdir+ and
// has escapes for upperdir (fs/overlayfs/params.c, 6.18), and is at most 255
// bytes; so names with a backslash and longer ones go by descriptor. mountinfo
// shows the true path either way, but for the last resort, which kernels before
// 6.15 need (O_PATH descriptors of layers).
func setLayer(c *sys.FsContext, key, dir string) error {
	if len(dir) <= sys.MaxFsconfigString && !strings.Contains(dir, `\`) {
		return c.SetString(key, dir)
	}
	f, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err = c.SetFd(key, f); errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EBADF) {
		return c.SetString(key, f.ProcPath())
	}
	return err
}

// attachOld performs the mount by mount(2).
func (p *plan) attachOld(ctx context.Context, at *sys.Fd) (*sys.Fd, error) {
	if !p.ids.empty() {
		return nil, fmt.Errorf("id-mapped mounts need kernel 5.12: %w", errdefs.ErrNotImplemented)
	}
	return byPath(at, func(target string) error { return p.mountOld(ctx, target) })
}

func (p *plan) mountOld(ctx context.Context, target string) error {
	if p.layers != nil {
		release, err := claim(ctx, p.layers)
		if err != nil {
			return err
		}
		defer release()
		return onOwnThread(func() error {
			if err := sys.Unshare(sys.CLONE_FS); err != nil {
				return err
			}
			return p.overlayOld(target)
		})
	}
	source, done, err := p.device()
	if err != nil {
		return err
	}
	defer done()
	if err := sys.Mount(source, target, p.fstype, p.flags, p.data()); err != nil {
		return err
	}
	if p.kind == bind && p.flags&^(sys.MS_BIND|sys.MS_REC) != 0 { // mount(2) ignores them the first time
		flags := p.flags&^sys.MS_REC | sys.MS_REMOUNT
		if err := sys.Mount("", target, "", flags, ""); err != nil {
			_ = sys.Umount(target, sys.MNT_DETACH)
			return err
		}
	}
	if p.propagation == 0 {
		return nil
	}
	flags := uintptr(p.propagation)
	if p.propagateTo {
		flags |= sys.MS_REC
	}
	return sys.Mount("", target, "", flags, "")
}

// overlayOld performs an overlay by mount(2), whose options are one page. Where
// the lowers do not fit they are named from their common directory, to which it
// changes: it runs on a thread whose working directory is its own.
func (p *plan) overlayOld(target string) error {
	page := os.Getpagesize()
	if data := p.data(); len(data) < page {
		return sys.Mount(p.source, target, "overlay", p.flags, data)
	}
	dir, short := p.relative()
	data := short.data()
	if dir == "" || len(data) >= page || !path.IsAbs(target) {
		return fmt.Errorf("%d lowers need %d bytes of options, mount(2) takes %d; kernel 6.8 takes them one by one (lowerdir+): %w: %w",
			len(p.layers.Lowers), len(data), page-1, errdefs.ErrFailedPrecondition, syscall.E2BIG)
	}
	at, err := sys.Open(dir, sys.O_PATH|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	if err := at.Fchdir(); err != nil {
		return err
	}
	return sys.Mount(p.source, target, "overlay", p.flags, data)
}

// relative names the lowers from their common directory; "" if there is none
// but the root.
func (p *plan) relative() (dir string, short plan) {
	short = *p
	all := append(p.layers.Lowers[:len(p.layers.Lowers):len(p.layers.Lowers)], p.layers.Data...)
	dir = path.Dir(all[0])
	for _, l := range all[1:] {
		for dir != "/" && dir != "." && !strings.HasPrefix(l, dir+"/") {
			dir = path.Dir(dir)
		}
	}
	if dir == "/" || dir == "." {
		return "", short
	}
	layers := *p.layers
	layers.Lowers, layers.Data = cutPrefix(layers.Lowers, dir), cutPrefix(layers.Data, dir)
	short.layers = &layers
	return dir, short
}

func cutPrefix(paths []string, dir string) []string {
	var all []string
	for _, p := range paths {
		all = append(all, strings.TrimPrefix(p, dir+"/"))
	}
	return all
}

// inPrivateNamespace runs f on a thread with a mount namespace of its own from
// which nothing propagates, and ends the thread and with it the namespace.
func inPrivateNamespace(f func() error) error {
	return onOwnThread(func() error {
		if err := sys.Unshare(sys.CLONE_NEWNS); err != nil {
			return err
		}
		if err := sys.Mount("", "/", "", sys.MS_REC|sys.MS_PRIVATE, ""); err != nil {
			return err
		}
		// The copies of all mounts go now, not when the thread has ended: until
		// then they keep file systems in use that the caller may want to unmount.
		defer sys.Umount("/", sys.MNT_DETACH)
		return f()
	})
}

// onOwnThread runs f on a thread that nothing else will ever use: it is locked
// and never unlocked, so that the runtime ends it with the goroutine. The main
// thread cannot be ended (runtime/proc.go: mexit): it would keep the namespace or
// the working directory, and so a mount, in use for the life of the process. A
// goroutine that finds itself on it holds it while another takes its place.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if syscall.Gettid() != os.Getpid() {
			done <- f()
			return
		}
		done <- onOwnThread(f)
		runtime.UnlockOSThread()
	}()
	return <-done
}
