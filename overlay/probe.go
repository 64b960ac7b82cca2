package overlay

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

// The features, in the kernel's words.
const (
	featOverlay   = "overlay"
	featUserxattr = "userxattr"
	featVolatile  = "volatile"
	featLowerdirs = "lowerdir+"
	featIDMap     = "id-mapped layers"
	featReflink   = "FICLONE"
	featQuota     = "project quota"
	featDtype     = "d_type"
	featWhiteout  = "whiteout devices"
	featXattr     = "xattr"
	featRename    = "RENAME_WHITEOUT"
	featTmpfile   = "O_TMPFILE"
	featLinks     = "origin of copies"
)

// mountOptions are those that an overlay mount may be given here, and the first
// kernel that has each.
var mountOptions = []struct{ name, value, since string }{
	{"index", "off", "4.13"},
	{"nfs_export", "off", "4.16"},
	{"metacopy", "off", "4.19"},
	{"redirect_dir", "follow", "4.15"},
	{"xino", "off", "4.17"},
	{featVolatile, "", "5.10"},
	{featUserxattr, "", "5.11"},
}

// features is what was found out about one directory. Immutable.
type features struct {
	works     kprobe.Result
	all       []kprobe.Result
	fs        sys.FSType
	userxattr bool // only user.overlay.* can be set here
	known     map[string]bool
}

func (f *features) has(name string) bool {
	for _, r := range f.all {
		if r.Feature == name {
			return r.Answer == kprobe.Yes
		}
	}
	return false
}

// Detail says of a feature why it is not there.
func (f *features) Detail(name string) string {
	for _, r := range f.all {
		if r.Feature == name {
			return r.String()
		}
	}
	return name + ": not probed"
}

func (f *features) add(r kprobe.Result) { f.all = append(f.all, r) }

// reason says in words whether and how overlayfs works.
func (f *features) reason() string {
	if f.works.Answer != kprobe.Yes {
		return f.works.Detail
	}
	how := "overlay on " + f.fs.String()
	if f.userxattr {
		how += " with userxattr"
	}
	return how
}

// supports checks that what the options ask for is there.
func (f *features) supports(o options) error {
	for name, wanted := range map[string]bool{"metacopy": o.metacopy == "on", "redirect_dir": o.redirect == "on", featVolatile: o.volatile} {
		if wanted && !f.known[name] {
			return fmt.Errorf("option %s: %w: %s", name, errdefs.ErrNotImplemented, f.Detail(name))
		}
	}
	return nil
}

// Probe tries whether the driver would work in dir: it mounts an overlay that
// is attached nowhere, and looks at what the kernel writes to its upper.
func Probe(ctx context.Context, dir string) drivers.Probe {
	f := probeFeatures(ctx, dir)
	return drivers.Probe{Works: f.works.Answer, Reason: f.reason(), Features: f.all}
}

func probeFeatures(ctx context.Context, dir string) features {
	s, err := upper.NewScratch(dir)
	if err != nil {
		return features{works: outcome(featOverlay, err, "")}
	}
	defer s.Remove()
	p := prober{ctx: ctx, scratch: s}
	p.f.known = map[string]bool{}
	p.run()
	return p.f
}

type prober struct {
	ctx     context.Context
	scratch *upper.Scratch
	f       features
}

// run asks everything; what overlay itself needs first.
func (p *prober) run() {
	st, err := p.scratch.Dir().Statfs()
	if err != nil {
		p.f.works = outcome(featOverlay, err, "")
		return
	}
	p.f.fs = st.Type
	p.f.add(p.xattr())
	p.options()
	p.f.works = p.overlay()
	p.f.add(p.f.works)
	p.f.add(p.dtype())
	p.f.add(p.renameWhiteout())
	p.f.add(p.tmpfile())
	p.f.add(p.reflink())
	if p.f.works.Answer == kprobe.Yes {
		p.f.add(p.idmap())
		p.f.add(p.quota())
	}
}

// outcome turns an error into an answer: a kernel that lacks something says so
// by a few errnos, all others say nothing about it.
func outcome(feature string, err error, since string) kprobe.Result {
	if err == nil {
		return kprobe.Result{Feature: feature, Answer: kprobe.Yes}
	}
	r := kprobe.Result{Feature: feature, Err: err, Detail: err.Error()}
	for _, errno := range []syscall.Errno{syscall.EINVAL, syscall.ENOSYS, syscall.ENODEV, syscall.EOPNOTSUPP, syscall.ENOTTY, syscall.EPERM, syscall.EACCES, syscall.EXDEV} {
		if errors.Is(err, errno) {
			r.Answer = kprobe.No
		}
	}
	if r.Answer == kprobe.No && since != "" {
		r.Detail += "; Linux " + since + " has it"
	}
	return r
}

// xattr finds the namespace in which overlayfs's xattrs can be set. A user
// namespace has no trusted.*, so user.overlay.* takes its place.
func (p *prober) xattr() kprobe.Result {
	const probe = "overlay.probe"
	err := p.scratch.Dir().Setxattr("", "trusted."+probe, "y")
	if err == nil {
		return kprobe.Result{Feature: featXattr, Answer: kprobe.Yes, Detail: "trusted.overlay.*"}
	}
	p.f.userxattr = true
	if uerr := p.scratch.Dir().Setxattr("", "user."+probe, "y"); uerr != nil {
		return outcome(featXattr, errors.Join(uerr, err), "")
	}
	return kprobe.Result{Feature: featXattr, Answer: kprobe.Yes, Detail: "user.overlay.*"}
}

// options asks for each mount option by configuring an overlay that is never
// made. Before Linux 6.5 overlayfs judges them only when mounting, so one is.
func (p *prober) options() {
	c, err := sys.Fsopen("overlay")
	if err != nil {
		for _, o := range mountOptions {
			p.f.add(outcome(o.name, err, "5.2"))
		}
		return
	}
	defer c.Close()
	checks := c.SetFlag("no-such-option") != nil
	for _, o := range mountOptions {
		r := p.option(c, o.name, o.value, o.since, checks)
		p.f.known[o.name] = r.Answer == kprobe.Yes
		p.f.add(r)
	}
	p.f.add(p.lowerdirs(c, checks))
}

func (p *prober) option(c *sys.FsContext, name, value, since string, checks bool) kprobe.Result {
	switch {
	case !checks:
		return outcome(name, p.tryOption(name, value), since)
	case value == "":
		return outcome(name, c.SetFlag(name), since)
	}
	return outcome(name, c.SetString(name, value), since)
}

// tryOption mounts an overlay of two empty lowers with one option.
func (p *prober) tryOption(name, value string) error {
	if value != "" {
		name += "=" + value
	}
	for _, n := range []string{"empty1", "empty2"} {
		if _, err := p.scratch.Mkdir(n); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	lowers := p.scratch.Path() + "/empty1:" + p.scratch.Path() + "/empty2"
	m, err := lmount.Detached(p.ctx, []lmount.Mount{{Type: "overlay", Source: "overlay", Options: []string{name, "lowerdir=" + lowers}}})
	if err != nil {
		return err
	}
	return m.Close()
}

func (p *prober) lowerdirs(c *sys.FsContext, checks bool) kprobe.Result {
	if !checks {
		return kprobe.Result{Feature: featLowerdirs, Answer: kprobe.No, Detail: "Linux 6.8 has it; lowers must fit one page"}
	}
	return outcome(featLowerdirs, c.SetString("lowerdir+", p.scratch.Path()), "6.8")
}

// overlay mounts one and checks that its upper has what the kernel's
// documentation says after some changes.
func (p *prober) overlay() kprobe.Result {
	if err := p.tryOverlay(); err != nil {
		r := outcome(featOverlay, err, "")
		r.Detail = p.explain(err)
		return r
	}
	return kprobe.Result{Feature: featOverlay, Answer: kprobe.Yes, Detail: p.f.reasonWorks()}
}

func (f *features) reasonWorks() string {
	return "on " + f.fs.String()
}

func (p *prober) tryOverlay() error {
	s := p.scratch
	lower, err := s.Mkdir("lower")
	if err != nil {
		return err
	}
	if err := os.Mkdir(lower+"/d", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(lower+"/f", []byte("x"), 0o644); err != nil {
		return err
	}
	pl := upper.Plan{Lowers: []string{lower}}
	if pl.Upper, err = s.Mkdir("upper"); err != nil {
		return err
	}
	if pl.Work, err = s.Mkdir("work"); err != nil {
		return err
	}
	m, err := p.mount(pl, drivers.IDMap{})
	if err != nil {
		return err
	}
	defer m.Close()
	return p.exercise(m.Path(), pl.Upper)
}

// probeOptions are the driver's defaults with what is known here.
func (p *prober) probeOptions() options {
	o, _ := parseOptions(nil)
	if p.f.userxattr {
		o, _ = o.inUserNS()
	}
	o.known = p.f.known
	return o
}

func (p *prober) mount(pl upper.Plan, m drivers.IDMap) (*lmount.Tree, error) {
	pl.IDMap = m
	return lmount.Detached(p.ctx, []lmount.Mount{p.probeOptions().mount(pl)})
}

// exercise gives a lower file another name, deletes it and replaces a lower
// directory.
func (p *prober) exercise(merged, dir string) error {
	if err := p.links(merged); err != nil {
		return err
	}
	if err := os.Remove(merged + "/f"); err != nil {
		return fmt.Errorf("a whiteout cannot be made: %w", err)
	}
	if err := os.Remove(merged + "/d"); err != nil {
		return err
	}
	if err := os.Mkdir(merged+"/d", 0o755); err != nil {
		return fmt.Errorf("an opaque directory cannot be made: %w", err)
	}
	up, err := sys.OpenDir(dir)
	if err != nil {
		return err
	}
	defer up.Close()
	return p.inspect(up)
}

// links: a copied-up file keeps its inode number if overlayfs can note where it
// came from, which needs CAP_DAC_READ_SEARCH in the initial user namespace
// (fs/overlayfs/util.c:ovl_can_decode_fh, 6.18). Where not, other names of the
// file show another number until the layer is mounted again.
func (p *prober) links(merged string) error {
	before, err := sys.StatPath(merged + "/f")
	if err != nil {
		return err
	}
	if err := os.Link(merged+"/f", merged+"/g"); err != nil {
		return err
	}
	after, err := sys.StatPath(merged + "/g")
	if err != nil {
		return err
	}
	r := kprobe.Result{Feature: featLinks, Answer: kprobe.Yes}
	if before.Ino != after.Ino {
		r.Answer, r.Detail = kprobe.No, "a parent's file that is linked shows one inode number only when mounted again"
	}
	p.f.add(r)
	return nil
}

func (p *prober) inspect(up *sys.Fd) error {
	st, err := up.Stat("f")
	if err != nil {
		return err
	}
	if !st.IsWhiteout() {
		return fmt.Errorf("the kernel leaves no 0/0 device for a deleted file: %w", errdefs.ErrNotImplemented)
	}
	p.f.add(kprobe.Result{Feature: featWhiteout, Answer: kprobe.Yes})
	attr := "trusted.overlay.opaque"
	if p.f.userxattr {
		attr = "user.overlay.opaque"
	}
	if v, err := up.Getxattr("d", attr); err != nil || v != "y" {
		return fmt.Errorf("the kernel leaves no %s on a replaced directory: %w", attr, errors.Join(err, errdefs.ErrNotImplemented))
	}
	return nil
}

// explain says why an overlay cannot be mounted here, and what to do.
func (p *prober) explain(err error) string {
	switch {
	case errors.Is(err, syscall.ENODEV):
		return "this kernel has no overlayfs (CONFIG_OVERLAY_FS, modprobe overlay): " + err.Error()
	case (errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES)) && os.Geteuid() != 0:
		return "mounting needs root or a user namespace: " + err.Error()
	case errors.Is(err, syscall.EPERM) && userns.RunningInUserNS():
		return "overlayfs in a user namespace needs Linux 5.11: " + err.Error()
	case p.unsuitable():
		return fmt.Sprintf("the directory is on %s, which overlayfs does not take as an upper: "+
			"put the root on ext4, xfs, btrfs or tmpfs (in a container: on a volume): %s", p.f.fs, err)
	case errors.Is(err, syscall.EROFS):
		return "the file system is read-only: " + err.Error()
	}
	return err.Error()
}

// unsuitable reports whether the file system is one that overlayfs never takes
// as an upper (ovl_dentry_remote, ovl_get_upper in fs/overlayfs/super.c, 6.18).
func (p *prober) unsuitable() bool {
	switch p.f.fs {
	case sys.OVERLAYFS_SUPER_MAGIC, sys.FUSE_SUPER_MAGIC, sys.NFS_SUPER_MAGIC:
		return true
	}
	return false
}

// dtype: overlayfs needs to tell a whiteout from a file while reading a directory.
func (p *prober) dtype() kprobe.Result {
	if err := p.scratch.Dir().Mkdir("dtype", 0o700); err != nil {
		return outcome(featDtype, err, "")
	}
	ents, err := p.scratch.Dir().ReadDir()
	for _, e := range ents {
		if e.Name == "dtype" && e.Type == sys.S_IFDIR {
			return kprobe.Result{Feature: featDtype, Answer: kprobe.Yes}
		}
	}
	if err != nil {
		return outcome(featDtype, err, "")
	}
	return kprobe.Result{Feature: featDtype, Answer: kprobe.No, Detail: "make the file system again (xfs: ftype=1, ext4: filetype)"}
}

func (p *prober) renameWhiteout() kprobe.Result {
	d := p.scratch.Dir()
	f, err := d.Openat("old", sys.O_WRONLY|sys.O_CREAT, 0o600)
	if err != nil {
		return outcome(featRename, err, "")
	}
	f.Close()
	return outcome(featRename, d.Rename("old", d, "new", sys.RENAME_WHITEOUT), "3.18")
}

func (p *prober) tmpfile() kprobe.Result {
	f, err := p.scratch.Dir().Openat(".", sys.O_WRONLY|sys.O_TMPFILE, 0o600)
	if err == nil {
		f.Close()
	}
	return outcome(featTmpfile, err, "3.11")
}

func (p *prober) reflink() kprobe.Result {
	d := p.scratch.Dir()
	a, err := d.Openat("a", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return outcome(featReflink, err, "")
	}
	defer a.Close()
	if _, err := a.Write([]byte(strings.Repeat("x", 4096))); err != nil {
		return outcome(featReflink, err, "")
	}
	b, err := d.Openat("b", sys.O_RDWR|sys.O_CREAT, 0o600)
	if err != nil {
		return outcome(featReflink, err, "")
	}
	defer b.Close()
	r := outcome(featReflink, b.Clone(a), "")
	if r.Answer == kprobe.No {
		r.Detail = p.f.fs.String() + " shares no blocks between files: " + r.Err.Error()
	}
	return r
}

// idmap mounts an overlay whose lower is shifted, and looks at an owner.
func (p *prober) idmap() kprobe.Result {
	const first, size = 100_000, 65_536
	ranges := []drivers.IDRange{{ContainerID: 0, HostID: first, Size: size}}
	pl := upper.Plan{}
	for _, n := range []string{"mapped1", "mapped2"} {
		dir, err := p.scratch.Mkdir(n)
		if err != nil {
			return outcome(featIDMap, err, "")
		}
		pl.Lowers = append(pl.Lowers, dir)
	}
	m, err := p.mount(pl, drivers.IDMap{UIDs: ranges, GIDs: ranges})
	if errdefs.IsNotImplemented(err) || errdefs.IsPermissionDenied(err) {
		return kprobe.Result{Feature: featIDMap, Answer: kprobe.No, Err: err, Detail: "Linux 5.19 has it, not in a user namespace, not on every file system: " + err.Error()}
	}
	if err != nil {
		return outcome(featIDMap, err, "5.19")
	}
	defer m.Close()
	st, err := sys.StatPath(m.Path())
	if err == nil && st.UID != first {
		return kprobe.Result{Feature: featIDMap, Answer: kprobe.No, Detail: fmt.Sprintf("owner 0 shows as %d, not as %d", st.UID, first)}
	}
	return outcome(featIDMap, err, "")
}

// quota bounds an upper by a project id and writes more than that through an
// overlay, whose writes no capability exempts (fs/overlayfs/super.c drops
// CAP_SYS_RESOURCE).
func (p *prober) quota() kprobe.Result {
	err := p.tryQuota()
	r := outcome(featQuota, err, "")
	switch {
	case errors.Is(err, syscall.ESRCH):
		r.Answer, r.Detail = kprobe.No, "the file system is mounted without project quota (ext4: mkfs -O quota,project, mount with prjquota; xfs: mount with prjquota)"
	case r.Answer == kprobe.No:
		r.Detail = "needs project quota (ext4: mkfs -O quota,project, mount with prjquota; xfs: mount with prjquota; Linux 5.14): " + err.Error()
	}
	return r
}

// tryQuota bounds the upper of an overlay.
func (p *prober) tryQuota() error {
	const limit = 1 << 20
	return upper.TryQuota(p.scratch, limit, func(up, work string) error {
		m, err := p.mount(upper.Plan{Lowers: []string{p.scratch.Path() + "/lower"}, Upper: up, Work: work}, drivers.IDMap{})
		if err != nil {
			return err
		}
		defer m.Close()
		return os.WriteFile(m.Path()+"/big", make([]byte, 2*limit), 0o600)
	})
}
