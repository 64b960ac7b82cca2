package fuse

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	lmount "github.com/layerctl/layerctl/mount"
)

// mountType makes mount.fuse3 start our server; see package mount.
const mountType = "fuse3." + program

// union is the FUSE union, with the options that were asked for. Immutable once
// Open has returned.
type union struct {
	opts      options
	userxattr bool
	noBinds   bool // an ordinary user has the set-uid fusermount3 to mount, which binds nothing
}

// Mount is upper.Union's. The source names the layer, so that mountinfo tells whose
// mount it is.
func (u *union) Mount(p upper.Plan) (mount.Mount, error) {
	if m, ok := p.Bind(); ok && !u.noBinds {
		return m, nil
	}
	source := p.Upper
	if source == "" {
		source = p.Lowers[0]
	}
	return mount.Mount{Type: mountType, Source: source, Options: u.mountOptions(p)}, nil
}

// mountOptions lists the options of a mount, in the words of fuse-layerfs. Nothing
// is left to its defaults that concerns what is on disk.
func (u *union) mountOptions(p upper.Plan) []string {
	mode := "rw"
	if p.ReadOnly || p.Upper == "" {
		mode = "ro"
	}
	redirect := u.opts.redirect
	if p.Metacopy { // an upper on such layers makes more of them
		redirect = "on"
	}
	o := []string{mode, "dev", "suid", "aufs_whiteouts=0", "index=off", "nfs_export=off",
		"metacopy=" + onOff(p.Metacopy), "redirect_dir=" + redirect}
	if u.userxattr {
		o = append(o, "userxattr")
	}
	if p.Volatile {
		o = append(o, "volatile")
	}
	if !p.IDMap.IsZero() {
		o = append(o, "uidmapping="+spell(p.IDMap.UIDs), "gidmapping="+spell(p.IDMap.GIDs))
	}
	if p.Upper != "" {
		o = append(o, "workdir="+p.Work, "upperdir="+p.Upper)
	}
	if len(p.Lowers) == 0 {
		return o
	}
	return append(o, "lowerdir="+strings.Join(p.Lowers, ":"))
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// spell writes ranges as fuse-overlayfs has them: as stored, as shown, how many.
func spell(rs []drivers.IDRange) string {
	s := make([]string, len(rs))
	for i, r := range rs {
		s[i] = fmt.Sprintf("%d:%d:%d", r.ContainerID, r.HostID, r.Size)
	}
	return strings.Join(s, ":")
}

// Merge is upper.Union's: a mount that is attached nowhere, whose server is a child
// of this process and ends with the mount.
func (u *union) Merge(ctx context.Context, lowers []string) (upper.Tree, error) {
	p := upper.Plan{Lowers: lowers, Metacopy: !u.userxattr}
	t, err := lmount.Detached(ctx, []lmount.Mount{{Type: mountType, Source: lowers[0], Options: u.mountOptions(p)}})
	if err != nil {
		return nil, err
	}
	return t, nil
}
