package overlay

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers/upper"
	lmount "github.com/layerctl/layerctl/mount"
)

// Mount is upper.Union's.
func (k *kernel) Mount(p upper.Plan) (mount.Mount, error) {
	m := k.opts.mount(p)
	if p.External {
		return m, k.checkExternal(m, p.Parents)
	}
	return m, nil
}

// Merge is upper.Union's: a mount that is attached nowhere, of lowers only. Such a
// mount shows the inode numbers of the files that are seen
// (fs/overlayfs/inode.c:ovl_getattr, 6.18: that of the origin is shown for an upper
// alone).
func (k *kernel) Merge(ctx context.Context, lowers []string) (upper.Tree, error) {
	p := upper.Plan{Lowers: lowers, Metacopy: !k.opts.userxattr}
	m, err := lmount.Detached(ctx, []lmount.Mount{k.opts.mount(p)})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// mount gives a plan its form as data.
func (c options) mount(p upper.Plan) mount.Mount {
	if m, ok := p.Bind(); ok {
		return m
	}
	return mount.Mount{Type: "overlay", Source: "overlay", Options: c.overlayOptions(p)}
}

// overlayOptions lists the options of an overlay mount. What the module has a
// default for is given in full, in the kernel's words.
func (c options) overlayOptions(p upper.Plan) []string {
	var o []string
	if p.ReadOnly {
		o = append(o, "ro")
	}
	for _, kv := range c.fixed(p) {
		if k, _, _ := strings.Cut(kv, "="); c.known[k] {
			o = append(o, kv)
		}
	}
	if p.Volatile {
		o = append(o, "volatile")
	}
	o = append(o, p.IDMap.MountOptions()...)
	if p.Upper != "" {
		o = append(o, "workdir="+p.Work, "upperdir="+p.Upper)
	}
	return append(o, "lowerdir="+strings.Join(p.Lowers, ":"))
}

// fixed lists the options that never depend on a module's defaults. A chain
// with metacopy files can only be read with metacopy=on, which needs
// redirect_dir=on beside an upper.
func (c options) fixed(p upper.Plan) []string {
	metacopy, redirect := c.metacopy, c.redirect
	if c.userxattr {
		return []string{"userxattr", "index=off", "nfs_export=off", "metacopy=off", "redirect_dir=nofollow", "xino=" + c.xino}
	}
	if p.Metacopy {
		metacopy = "on"
	}
	if metacopy == "on" {
		redirect = "on"
	}
	return []string{"index=off", "nfs_export=off", "metacopy=" + metacopy, "redirect_dir=" + redirect, "xino=" + c.xino}
}

// checkExternal tells whether containerd's mount.All, of 1.6 and later, can
// perform m by mount(2), which takes one page of options less its last byte.
// Capabilities.ExternalParents is kept to even where short IDs would let more in.
func (k *kernel) checkExternal(m mount.Mount, parents int) error {
	page := os.Getpagesize()
	size, lowers := externalSize(m, page)
	if size <= page-1 && parents <= k.external {
		return nil
	}
	return fmt.Errorf("%d parents, %d lowers, need up to %d bytes of mount options, mount(2) takes %d, enough for %d parents: %w "+
		"(package mount has no such limit; or squash layers)",
		parents, lowers, max(size, page), page-1, k.external, errdefs.ErrFailedPrecondition)
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
				dirs[i] = dir[strings.LastIndexByte(strings.TrimSuffix(dir, "/fs"), '/')+1:]
			}
		}
		data = append(data, "lowerdir="+strings.Join(dirs, ":"))
	}
	return len(strings.Join(data, ",")), lowers
}

// externalParents is how many parents fit a page when every ID has six
// characters (the two-billionth layer has seven).
func (k *kernel) externalParents() int {
	const id = "zzzzzz"
	own := k.root + "/" + id
	p := upper.Plan{Upper: own + "/fs", Work: own + "/work", Volatile: k.opts.known[featVolatile]}
	fits := func(n int) bool {
		p.Lowers = slices.Repeat([]string{own + "/fs"}, n+1) // a view has its own, too
		size, _ := externalSize(k.opts.mount(p), os.Getpagesize())
		return size <= os.Getpagesize()-1
	}
	return max(0, sort.Search(upper.MaxLowers, func(n int) bool { return !fits(n) })-1)
}
