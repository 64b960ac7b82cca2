package upper

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
)

// MaxLowers is the kernel's OVL_MAX_STACK (fs/overlayfs/params.h, 6.18), and the
// bound of every driver on this layout: each can open the other's root.
const MaxLowers = 500

// Plan is a mount before it has its final form: pure data, absolute paths.
type Plan struct {
	Upper, Work string        // "" for a read-only mount
	Lowers      []string      // nearest first; with one and no upper it is a bind
	ReadOnly    bool          // of a mount that has an upper
	Volatile    bool          // the upper may be lost in a crash
	Metacopy    bool          // a lower has files without data
	IDMap       drivers.IDMap // of the lowers; of the upper too, if its ids are stored ones
	StoredIDs   bool          // the upper's ids are as they are stored; see Config.StoredIDs
	External    bool          // to be performed by mount(2), or others' helpers
	Parents     int           // of the layer, for errors
}

// Mounts says how to mount r:
//
//	writable, no parents        bind rw of ID/fs
//	writable                    a union with an upper
//	committed, no parents       bind ro of ID/fs
//	committed                   a union of lowers only
//	view, read-only writable    the same, the layer's own directory on top, so
//	                            that the mount says whose it is
func (l *Layers) Mounts(ctx context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := l.loadRef(r)
	if err != nil {
		return nil, l.wrap("mounts", r.ID, err)
	}
	ms, err := l.mountsOf(s, r, o)
	return ms, l.wrap("mounts", r.ID, err)
}

func (l *Layers) mountsOf(s *state, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	p, err := l.plan(s, r, o)
	if err != nil {
		return nil, err
	}
	m, err := l.cfg.Union.Mount(p)
	if err != nil {
		return nil, err
	}
	if err := l.readyVolatile(s, p); err != nil {
		return nil, err
	}
	return []mount.Mount{m}, nil
}

// plan decides what is mounted on what.
func (l *Layers) plan(s *state, r drivers.Ref, o drivers.MountOptions) (Plan, error) {
	p := Plan{Metacopy: s.metacopy(), IDMap: s.about.IDMap, StoredIDs: l.cfg.StoredIDs, External: o.External, Parents: len(r.Parents)}
	if !o.IDMap.IsZero() {
		p.IDMap = o.IDMap
	}
	if !p.IDMap.IsZero() && !l.cfg.Capabilities.IDMap {
		return Plan{}, fmt.Errorf("id-mapped layers: %w: %s", errdefs.ErrInvalidArgument, l.cfg.NoIDMap)
	}
	if err := l.refuseWriting(s, o); err != nil {
		return Plan{}, err
	}
	for _, id := range r.Parents {
		p.Lowers = append(p.Lowers, l.Dir(id))
	}
	if s.applied {
		p.Lowers = append(p.Lowers, l.path(emptyDir)) // whiteouts in fs must not show
	}
	l.planOwn(&p, s, o)
	if len(p.Lowers) > MaxLowers {
		return Plan{}, fmt.Errorf("%d lowers, %d are the most: %w", len(p.Lowers), MaxLowers, errdefs.ErrFailedPrecondition)
	}
	return p, nil
}

// refuseWriting refuses a writable mount that would spoil the layer.
func (l *Layers) refuseWriting(s *state, o drivers.MountOptions) error {
	if s.writable() && !s.about.IDMap.IsZero() && s.about.StoredIDs != l.cfg.StoredIDs {
		return fmt.Errorf("is id-mapped and was made by a driver that keeps the ids of an upper another way: "+
			"mount it with that one, or commit it: %w", errdefs.ErrFailedPrecondition)
	}
	if o.ReadOnly {
		return nil
	}
	return refuseRebasing(s)
}

// planOwn puts the layer's own directory on top.
func (l *Layers) planOwn(p *Plan, s *state, o drivers.MountOptions) {
	own := l.Dir(s.id)
	hostIDs := !p.IDMap.IsZero() && !l.cfg.StoredIDs
	switch {
	case s.writable() && (!o.ReadOnly || hostIDs && len(p.Lowers) > 0 || len(p.Lowers) >= MaxLowers):
		// Read-only it is a lower, so that it may be mounted elsewhere, too; but an
		// upper with host ids would be shifted twice, and there may be no room for
		// another lower.
		p.Upper, p.Work = own, l.path(s.id.String(), workDir)
		p.ReadOnly = o.ReadOnly
		p.Volatile = (o.Volatile || l.cfg.Volatile) && !l.cfg.NoVolatile
	case s.about.View && s.committed == nil && len(p.Lowers) >= MaxLowers:
		// No room to say whose mount it is; it looks like the parent's.
	default:
		p.Lowers = append([]string{own}, p.Lowers...)
	}
}

// Bind spells a plan of one directory; false for a union of several.
func (p Plan) Bind() (mount.Mount, bool) {
	switch {
	case p.Upper != "" && len(p.Lowers) == 0:
		m := p.IDMap
		if !p.StoredIDs {
			m = drivers.IDMap{} // own files have host ids already
		}
		return bind(p.Upper, p.ReadOnly, m), true
	case p.Upper == "" && len(p.Lowers) == 1:
		return bind(p.Lowers[0], true, p.IDMap), true
	}
	return mount.Mount{}, false
}

func bind(dir string, readOnly bool, m drivers.IDMap) mount.Mount {
	mode := "rw"
	if readOnly {
		mode = "ro"
	}
	return mount.Mount{Type: "bind", Source: dir, Options: append([]string{mode, "rbind"}, m.MountOptions()...)}
}
