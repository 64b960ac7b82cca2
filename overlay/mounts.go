package overlay

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// maxLowers is the kernel's OVL_MAX_STACK (fs/overlayfs/params.h, 6.18).
const maxLowers = 500

// plan is a mount before it has its final form: pure data.
type plan struct {
	upper, work string   // "" for a read-only mount
	lowers      []string // nearest first; with one and no upper it is a bind
	readOnly    bool     // of a mount that has an upper
	volatile    bool
	metacopy    bool // a lower has files without data
	idmap       drivers.IDMap
}

// Mounts says how to mount r:
//
//	writable, no parents        bind rw of ID/fs
//	writable                    overlay with upperdir
//	committed, no parents       bind ro of ID/fs
//	committed                   overlay of lowers only
//	view, read-only writable    the same, the layer's own directory on top, so
//	                            that the mount says whose it is
func (d *Driver) Mounts(ctx context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := d.loadRef(r)
	if err != nil {
		return nil, drivers.Wrap(driverName, "mounts", r.ID, err)
	}
	ms, err := d.mountsOf(s, r, o)
	return ms, drivers.Wrap(driverName, "mounts", r.ID, err)
}

func (d *Driver) mountsOf(s *state, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	if !o.ReadOnly {
		if err := refuseRebasing(s); err != nil {
			return nil, err
		}
	}
	p, err := d.plan(s, r, o)
	if err != nil {
		return nil, err
	}
	if err := d.readyVolatile(s, p); err != nil {
		return nil, err
	}
	m := d.opts.mount(p)
	if o.External {
		if err := d.checkExternal(m, len(r.Parents)); err != nil {
			return nil, err
		}
	}
	return []mount.Mount{m}, nil
}

// plan decides what is mounted on what.
func (d *Driver) plan(s *state, r drivers.Ref, o drivers.MountOptions) (plan, error) {
	p := plan{metacopy: s.metacopy(), idmap: s.about.IDMap}
	if !o.IDMap.IsZero() {
		p.idmap = o.IDMap
	}
	if !p.idmap.IsZero() && !d.caps.IDMap {
		return plan{}, fmt.Errorf("id-mapped layers: %w: %s", errdefs.ErrInvalidArgument, d.features.Detail(featIDMap))
	}
	for _, id := range r.Parents {
		p.lowers = append(p.lowers, d.fs(id))
	}
	if s.applied {
		p.lowers = append(p.lowers, d.path(emptyDir)) // whiteouts in fs must not show
	}
	d.planOwn(&p, s, o)
	if len(p.lowers) > maxLowers {
		return plan{}, fmt.Errorf("%d lowers, overlayfs takes %d: %w", len(p.lowers), maxLowers, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// planOwn puts the layer's own directory on top.
func (d *Driver) planOwn(p *plan, s *state, o drivers.MountOptions) {
	own := d.fs(s.id)
	switch {
	case s.writable() && (!o.ReadOnly || !p.idmap.IsZero() && len(p.lowers) > 0 || len(p.lowers) >= maxLowers):
		// Read-only it is a lower, so that it may be mounted elsewhere, too; but an
		// id-mapped layer's upper holds host ids, which would be shifted twice, and
		// there may be no room for another lower.
		p.upper, p.work = own, d.path(s.id.String(), workDir)
		p.readOnly = o.ReadOnly
		p.volatile = (o.Volatile || d.opts.volatile) && d.knows(featVolatile)
	case s.about.View && s.committed == nil && len(p.lowers) >= maxLowers:
		// No room to say whose mount it is; it looks like the parent's.
	default:
		p.lowers = append([]string{own}, p.lowers...)
	}
}

// mount gives a plan its form as data.
func (c options) mount(p plan) mount.Mount {
	switch {
	case p.upper != "" && len(p.lowers) == 0:
		return bind(p.upper, p.readOnly, drivers.IDMap{}) // own files have host ids already
	case p.upper == "" && len(p.lowers) == 1:
		return bind(p.lowers[0], true, p.idmap)
	}
	return mount.Mount{Type: "overlay", Source: "overlay", Options: c.overlayOptions(p)}
}

func bind(dir string, readOnly bool, m drivers.IDMap) mount.Mount {
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	return mount.Mount{Type: "bind", Source: dir, Options: append([]string{mode, "rbind"}, idmapOptions(m)...)}
}

// overlayOptions lists the options of an overlay mount. What the module has a
// default for is given in full, in the kernel's words.
func (c options) overlayOptions(p plan) []string {
	var o []string
	if p.readOnly {
		o = append(o, "ro")
	}
	for _, kv := range c.fixed(p) {
		if k, _, _ := strings.Cut(kv, "="); c.known[k] {
			o = append(o, kv)
		}
	}
	if p.volatile {
		o = append(o, "volatile")
	}
	o = append(o, idmapOptions(p.idmap)...)
	if p.upper != "" {
		o = append(o, "workdir="+p.work, "upperdir="+p.upper)
	}
	return append(o, "lowerdir="+strings.Join(p.lowers, ":"))
}

// fixed lists the options that never depend on a module's defaults. A chain
// with metacopy files can only be read with metacopy=on, which needs
// redirect_dir=on beside an upper.
func (c options) fixed(p plan) []string {
	metacopy, redirect := c.metacopy, c.redirect
	if c.userxattr {
		return []string{"userxattr", "index=off", "nfs_export=off", "metacopy=off", "redirect_dir=nofollow", "xino=" + c.xino}
	}
	if p.metacopy {
		metacopy = "on"
	}
	if metacopy == "on" {
		redirect = "on"
	}
	return []string{"index=off", "nfs_export=off", "metacopy=" + metacopy, "redirect_dir=" + redirect, "xino=" + c.xino}
}

// idmapOptions spells an id map as containerd's mount.All reads it:
// "uidmap=CONTAINER:HOST:SIZE,...".
func idmapOptions(m drivers.IDMap) []string {
	if m.IsZero() {
		return nil
	}
	return []string{"uidmap=" + spell(m.UIDs), "gidmap=" + spell(m.GIDs)}
}

func spell(rs []drivers.IDRange) string {
	s := make([]string, len(rs))
	for i, r := range rs {
		s[i] = fmt.Sprintf("%d:%d:%d", r.ContainerID, r.HostID, r.Size)
	}
	return strings.Join(s, ",")
}

// checkExternal tells whether containerd's mount.All, of 1.6 and later, can
// perform m by mount(2), which takes one page of options less its last byte.
// Capabilities.ExternalParents is kept to even where short IDs would let more in.
func (d *Driver) checkExternal(m mount.Mount, parents int) error {
	page := os.Getpagesize()
	size, lowers := externalSize(m, page)
	if size <= page-1 && parents <= d.caps.ExternalParents {
		return nil
	}
	return fmt.Errorf("%d parents, %d lowers, need up to %d bytes of mount options, mount(2) takes %d, enough for %d parents: %w "+
		"(package mount has no such limit; or squash layers)",
		parents, lowers, max(size, page), page-1, d.caps.ExternalParents, errdefs.ErrFailedPrecondition)
}

// externalSize returns the bytes of options that containerd passes for m. Where
// they would need more than a page less 512, it changes into the lowers' common
// directory and names them from there
// (containerd core/mount/mount_linux.go:compactLowerdirOption, v2.4.2).
func externalSize(m mount.Mount, page int) (size, lowers int) {
	var opts, data []string
	for _, o := range m.Options {
		if strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=") {
			continue
		}
		opts = append(opts, o)
	}
	total := 0
	for _, o := range opts {
		total += len(o)
	}
	for _, o := range opts {
		l, ok := strings.CutPrefix(o, "lowerdir=")
		if !ok {
			if o != "ro" && o != "rw" {
				data = append(data, o)
			}
			continue
		}
		dirs := strings.Split(l, ":")
		lowers = len(dirs)
		if total >= page-512 && lowers > 1 {
			for i, dir := range dirs {
				dirs[i] = dir[strings.LastIndexByte(strings.TrimSuffix(dir, "/"+fsDir), '/')+1:]
			}
		}
		data = append(data, "lowerdir="+strings.Join(dirs, ":"))
	}
	return len(strings.Join(data, ",")), lowers
}

// externalParents is how many parents fit a page when every ID has six
// characters (the two-billionth layer has seven).
func (d *Driver) externalParents() int {
	const id = "zzzzzz"
	p := plan{upper: d.path(id, fsDir), work: d.path(id, workDir), volatile: d.knows(featVolatile)}
	fits := func(n int) bool {
		p.lowers = slices.Repeat([]string{d.path(id, fsDir)}, n+1) // a view has its own, too
		size, _ := externalSize(d.opts.mount(p), os.Getpagesize())
		return size <= os.Getpagesize()-1
	}
	return max(0, sort.Search(maxLowers, func(n int) bool { return !fits(n) })-1)
}

// bootID names this boot of the machine.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown-" + strconv.Itoa(os.Getpid())
	}
	return strings.TrimSpace(string(b))
}
