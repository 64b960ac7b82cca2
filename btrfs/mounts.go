package btrfs

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Mounts is one bind mount of the subvolume: it works for every caller that sees
// the root, in a user namespace too, and can be id-mapped. (A mount by subvolid=
// would need the device, and the privilege to mount it.)
func (d *driver) Mounts(_ context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	ms, err := d.mounts(r.ID, o)
	return ms, d.wrap("mounts", r.ID, err)
}

func (d *driver) mounts(id drivers.ID, o drivers.MountOptions) ([]mount.Mount, error) {
	l, err := d.layer(id)
	if err != nil {
		return nil, err
	}
	l.Close()
	if o.IDMap.IsZero() && l.about.IDMap != nil {
		o.IDMap = *l.about.IDMap
	}
	if !o.IDMap.IsZero() && !d.caps.IDMap {
		return nil, fmt.Errorf("no id-mapped mounts of %s here: %w", d.root, errdefs.ErrInvalidArgument)
	}
	o.ReadOnly = o.ReadOnly || l.kind != writable
	if o.External && o.ReadOnly && !o.IDMap.IsZero() {
		return nil, fmt.Errorf("containerd leaves a read-only bind mount without its id map: mount it with package mount: %w", errdefs.ErrFailedPrecondition)
	}
	return []mount.Mount{bind(d.treePath(id, l.kind), o)}, nil
}

// bind is pure: the plan of one bind mount.
func bind(source string, o drivers.MountOptions) mount.Mount {
	m := mount.Mount{Type: "bind", Source: source, Options: []string{"rbind", "rw"}}
	if o.ReadOnly {
		m.Options[1] = "ro"
	}
	m.Options = append(m.Options, o.IDMap.MountOptions()...)
	return m
}

// Owner takes what Mounts made and what mountinfo shows of it, at the tree or
// below it.
func (d *driver) Owner(ms []mount.Mount) (drivers.ID, bool) {
	if len(ms) != 1 {
		return 0, false
	}
	id, _, ok := d.layerOf(ms[0].Source)
	return id, ok
}

// layerOf finds ROOT/l/ID/KIND at the front of a path.
func (d *driver) layerOf(source string) (drivers.ID, kind, bool) {
	rest, ok := strings.CutPrefix(source, d.root+"/"+roots.Layers+"/")
	if !ok {
		return 0, "", false
	}
	parts := strings.SplitN(rest, "/", 3)
	if len(parts) < 2 {
		return 0, "", false
	}
	k := kind(parts[1])
	id, ok := drivers.ParseID(parts[0])
	return id, k, ok && (k == writable || k == view || k == committed)
}

// mountedAt returns where this mount namespace shows the layer mounted in a way
// that counts, "" if nowhere.
func (d *driver) mountedAt(id drivers.ID, counts func(mount.Info) bool) (string, error) {
	infos, err := mount.List()
	if err != nil {
		return "", err
	}
	home, at, err := d.home(infos)
	if err != nil {
		return "", err
	}
	for _, i := range infos {
		rest, below := strings.CutPrefix(i.Root, at+"/")
		if !below || i.Major != home.Major || i.Minor != home.Minor {
			continue
		}
		i.BindSource = d.root + "/" + rest
		if owner, _, ok := d.layerAt(i); ok && owner == id && counts(i) {
			return i.Target, nil
		}
	}
	return "", nil
}

// layerAt is the layer that a mount of mountedAt shows.
func (d *driver) layerAt(i mount.Info) (drivers.ID, kind, bool) { return d.layerOf(i.BindSource) }

// home returns the mount that the root lies on and the root's place in that
// file system, which is how mountinfo names it whatever other mounts show it.
func (d *driver) home(infos []mount.Info) (mount.Info, string, error) {
	st, err := sys.StatPath(d.root)
	if err != nil {
		return mount.Info{}, "", err
	}
	for _, i := range infos {
		if uint64(i.ID) == st.MountID {
			return i, path.Join(i.Root, strings.TrimPrefix(d.root, i.Target)), nil
		}
	}
	return mount.Info{}, "", fmt.Errorf("mountinfo lacks the mount of %s: %w", d.root, errdefs.ErrUnavailable)
}
