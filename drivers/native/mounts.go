package native

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

// Mounts is one bind mount of the tree.
func (d *driver) Mounts(_ context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	ms, err := d.mounts(r.ID, o)
	return ms, d.wrap("mounts", r.ID, err)
}

func (d *driver) mounts(id drivers.ID, o drivers.MountOptions) ([]mount.Mount, error) {
	s, err := d.check(id)
	if err != nil {
		return nil, err
	}
	if o.IDMap.IsZero() && s.IDMap != nil {
		o.IDMap = *s.IDMap
	}
	if !o.IDMap.IsZero() && !d.caps.IDMap {
		return nil, fmt.Errorf("no id-mapped mounts of %s here: %w", d.root, errdefs.ErrInvalidArgument)
	}
	o.ReadOnly = o.ReadOnly || s.Kind != writable
	if o.External && o.ReadOnly && !o.IDMap.IsZero() {
		return nil, fmt.Errorf("containerd leaves a read-only bind mount without its id map: mount it with package mount: %w", errdefs.ErrFailedPrecondition)
	}
	return []mount.Mount{bind(d.treePath(id), o)}, nil
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
	return d.ownerOf(ms[0].Source)
}

// ownerOf finds ROOT/l/ID/fs at the front of a path.
func (d *driver) ownerOf(source string) (drivers.ID, bool) {
	rest, ok := strings.CutPrefix(source, d.root+"/"+roots.Layers+"/")
	if !ok {
		return 0, false
	}
	name, rest, _ := strings.Cut(rest, "/")
	if rest != treeDir && !strings.HasPrefix(rest, treeDir+"/") {
		return 0, false
	}
	return drivers.ParseID(name)
}

// Which mounts are in the way.
func mountedAtAll(mount.Info) bool        { return true }
func mountedForWriting(i mount.Info) bool { return !i.ReadOnly() }

// InUse implements drivers.UseTeller.
func (d *driver) InUse(_ context.Context, id drivers.ID) error {
	return d.wrap("in use", id, d.refuseMounted(id, mountedAtAll))
}

// refuseMounted wraps ErrFailedPrecondition if our mount namespace shows the
// layer mounted in a way that counts.
func (d *driver) refuseMounted(id drivers.ID, counts func(mount.Info) bool) error {
	infos, err := mount.List()
	if err != nil {
		return err
	}
	home, at, err := d.home(infos)
	if err != nil {
		return err
	}
	for _, i := range infos {
		rest, below := strings.CutPrefix(i.Root, at+"/")
		if !below || i.Major != home.Major || i.Minor != home.Minor {
			continue
		}
		if owner, ok := d.ownerOf(d.root + "/" + rest); ok && owner == id && counts(i) {
			return fmt.Errorf("mounted at %s: %w", i.Target, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

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
