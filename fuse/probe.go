package fuse

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	lmount "github.com/layerctl/layerctl/mount"
)

// program is the server's name, in PATH or beside the program that mounts.
const program = "fuse-layerfs"

// The features, in the kernel's words.
const (
	featUnion   = "FUSE union"
	featXattr   = "xattr"
	featReflink = "FICLONE"
	featQuota   = "project quota"
	featIDMap   = "id-mapped layers"
)

// noIDMap is why an ordinary user's layers are not id-mapped.
const noIDMap = "owners would be shown by ids that this user, or its user namespace, does not have"

// features is what was found out about one directory. Immutable.
type features struct {
	works     kprobe.Result
	all       []kprobe.Result
	fs        sys.FSType
	userxattr bool // only user.overlay.* can be set here
	userns    bool
	ordinary  bool // no user namespace's root either: fusermount3 mounts
}

// rootless reports whether owners and devices are not this process's to give.
func (f *features) rootless() bool { return f.userns || f.ordinary }

func (f *features) find(name string) (kprobe.Result, bool) {
	for _, r := range f.all {
		if r.Feature == name {
			return r, true
		}
	}
	return kprobe.Result{}, false
}

func (f *features) has(name string) bool {
	r, _ := f.find(name)
	return r.Answer == kprobe.Yes
}

func (f *features) detail(name string) string {
	if r, ok := f.find(name); ok {
		return r.String()
	}
	return name + ": not probed"
}

// idmap: the server maps owners by itself, but only to those that the mounter has.
func (f *features) idmap() kprobe.Result {
	if f.rootless() {
		return kprobe.Result{Feature: featIDMap, Answer: kprobe.No, Detail: noIDMap}
	}
	return kprobe.Result{Feature: featIDMap, Answer: f.works.Answer}
}

// xattrs are the encodings that a root here may have. Who can set trusted.* can
// serve layers made without that, too.
func (f *features) xattrs() []upper.Xattrs {
	if f.userxattr {
		return []upper.Xattrs{upper.XattrsUser}
	}
	return []upper.Xattrs{upper.XattrsTrusted, upper.XattrsUser}
}

// reason says in words whether and how the driver works.
func (f *features) reason() string {
	if f.works.Answer != kprobe.Yes {
		return f.works.Detail
	}
	how := "FUSE union on " + f.fs.String()
	if f.userxattr {
		how += " with userxattr"
	}
	if f.ordinary {
		how += ", mounted by fusermount3"
	}
	return how
}

// Probe tries whether the driver would work in dir: it mounts a union that is
// attached nowhere, and looks at what the server writes to its upper.
func Probe(ctx context.Context, dir string) drivers.Probe {
	f := probeFeatures(ctx, dir)
	return drivers.Probe{Works: f.works.Answer, Reason: f.reason(), Features: f.all}
}

func probeFeatures(ctx context.Context, dir string) features {
	s, err := upper.NewScratch(dir)
	if err != nil {
		return features{works: answer(featUnion, err)}
	}
	defer s.Remove()
	p := prober{ctx: ctx, scratch: s, f: features{userns: userns.RunningInUserNS(), ordinary: os.Geteuid() != 0}}
	p.run()
	return p.f
}

type prober struct {
	ctx     context.Context
	scratch *upper.Scratch
	f       features
}

func (p *prober) run() {
	st, err := p.scratch.Dir().Statfs()
	if err != nil {
		p.f.works = answer(featUnion, err)
		return
	}
	p.f.fs = st.Type
	xattr := p.xattr()
	p.f.works = answer(featUnion, p.try())
	p.f.works.Detail = p.explain()
	p.f.all = append(p.f.all, xattr, p.f.works, answer(featReflink, p.reflink()), p.f.idmap())
	if p.f.works.Answer == kprobe.Yes {
		p.f.all = append(p.f.all, answer(featQuota, p.quota()))
	}
}

// answer turns an error into one: what is lacking is said by a few errnos, all
// others say nothing about it.
func answer(feature string, err error) kprobe.Result {
	if err == nil {
		return kprobe.Result{Feature: feature, Answer: kprobe.Yes}
	}
	r := kprobe.Result{Feature: feature, Err: err, Detail: err.Error()}
	for _, errno := range []syscall.Errno{syscall.EINVAL, syscall.ENOSYS, syscall.ENOENT, syscall.ENODEV, syscall.ENXIO,
		syscall.EOPNOTSUPP, syscall.ENOTTY, syscall.EPERM, syscall.EACCES, syscall.EXDEV, syscall.ESRCH} {
		if errors.Is(err, errno) {
			r.Answer = kprobe.No
		}
	}
	if errdefs.IsNotImplemented(err) {
		r.Answer = kprobe.No
	}
	return r
}

// explain says why the driver does not work here, and what to do.
func (p *prober) explain() string {
	err := p.f.works.Err
	switch {
	case err == nil:
		return p.f.reason()
	case strings.Contains(err.Error(), "no program "+program):
		return program + " is neither in PATH nor beside this program (make install puts it there)"
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENODEV):
		return "this kernel has no FUSE (CONFIG_FUSE_FS, modprobe fuse): " + err.Error()
	case errors.Is(err, syscall.EACCES) && os.Geteuid() != 0, errors.Is(err, syscall.EACCES) && p.f.userns:
		return "/dev/fuse may not be opened (chmod 0666 /dev/fuse is what desktops have): " + err.Error()
	case errors.Is(err, syscall.EPERM) && os.Geteuid() != 0:
		return "mounting needs root, a user namespace or fusermount3: " + err.Error()
	}
	return err.Error()
}

// xattr finds the namespace in which overlayfs's xattrs can be set.
func (p *prober) xattr() kprobe.Result {
	err := p.scratch.Dir().Setxattr("", "trusted.overlay.probe", "y")
	if err == nil {
		return kprobe.Result{Feature: featXattr, Answer: kprobe.Yes, Detail: "trusted.overlay.*"}
	}
	p.f.userxattr = true
	if uerr := p.scratch.Dir().Setxattr("", "user.overlay.probe", "y"); uerr != nil {
		return answer(featXattr, errors.Join(uerr, err))
	}
	return kprobe.Result{Feature: featXattr, Answer: kprobe.Yes, Detail: "user.overlay.*"}
}

// try gives a union a lower with a file and a directory, deletes the one and
// replaces the other.
func (p *prober) try() error {
	lower, err := p.scratch.Mkdir("lower")
	if err != nil {
		return err
	}
	if err := os.Mkdir(lower+"/d", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(lower+"/f", []byte("x"), 0o644); err != nil {
		return err
	}
	up, err := p.scratch.Mkdir("upper")
	if err != nil {
		return err
	}
	work, err := p.scratch.Mkdir("work")
	if err != nil {
		return err
	}
	m, err := p.mount(up, work)
	if err != nil {
		return err
	}
	defer m.Close()
	return p.exercise(m.Path(), up)
}

func (p *prober) mount(up, work string) (*lmount.Tree, error) {
	u := union{opts: options{redirect: "follow"}, userxattr: p.f.userxattr, noBinds: p.f.ordinary}
	pl := upper.Plan{Lowers: []string{p.scratch.Path() + "/lower"}, Upper: up, Work: work}
	return lmount.Detached(p.ctx, []lmount.Mount{{Type: mountType, Source: up, Options: u.mountOptions(pl)}})
}

func (p *prober) exercise(merged, up string) error {
	if err := os.Remove(merged + "/f"); err != nil {
		return fmt.Errorf("a whiteout cannot be made: %w", err)
	}
	if err := os.Remove(merged + "/d"); err != nil {
		return err
	}
	if err := os.Mkdir(merged+"/d", 0o755); err != nil {
		return fmt.Errorf("an opaque directory cannot be made: %w", err)
	}
	dir, err := sys.OpenDir(up)
	if err != nil {
		return err
	}
	defer dir.Close()
	st, err := dir.Stat("f")
	if err != nil {
		return err
	}
	if !st.IsWhiteout() {
		return fmt.Errorf("a deleted file is no 0/0 device: %w", errdefs.ErrNotImplemented)
	}
	attr := "trusted.overlay.opaque"
	if p.f.userxattr {
		attr = "user.overlay.opaque"
	}
	if v, err := dir.Getxattr("d", attr); err != nil || v != "y" {
		return fmt.Errorf("no %s on a replaced directory: %w", attr, errors.Join(err, errdefs.ErrNotImplemented))
	}
	return nil
}

func (p *prober) reflink() error {
	d := p.scratch.Dir()
	a, err := d.Openat("a", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := a.Write([]byte(strings.Repeat("x", 4096))); err != nil {
		return err
	}
	b, err := d.Openat("b", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	defer b.Close()
	return b.Clone(a)
}

// quota bounds an upper by a project id and writes more than that as somebody
// without CAP_SYS_RESOURCE does: through a union, whose server has put it away.
func (p *prober) quota() error {
	const limit = 1 << 20
	return upper.TryQuota(p.scratch, limit, func(up, work string) error {
		m, err := p.mount(up, work)
		if err != nil {
			return err
		}
		defer m.Close()
		return os.WriteFile(m.Path()+"/big", make([]byte, 2*limit), 0o600)
	})
}
