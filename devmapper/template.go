package devmapper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// template is the empty file system that every layer without parent begins as, in
// template.json. Immutable once made. A root has one for each kind of file system that
// it was opened with.
type template struct {
	FS    string `json:"fs"`
	Bytes int64  `json:"bytes"`
	UUID  string `json:"uuid"`
	Thin  uint32 `json:"thin"`
	Tool  string `json:"tool"` // that made it, with its arguments
}

func (t *template) sectors() uint64 { return uint64(t.Bytes / 512) }

// templateFile is where the template of a kind stands.
func (f *fileSystem) templateFile() string {
	if f == fileSystems[0] {
		return "template.json"
	}
	return "template-" + f.name + ".json"
}

// readTemplate reads one; ENOENT if there is none.
func (d *driver) readTemplate(f *fileSystem) (t template, err error) {
	if err := thin.ReadJSON(d.dir, f.templateFile(), &t); err != nil {
		return t, err
	}
	if t.Bytes == 0 || t.FS != f.name {
		return t, fmt.Errorf("%s: file system %q of %d bytes: %w", f.templateFile(), t.FS, t.Bytes, errdefs.ErrDataLoss)
	}
	return t, nil
}

// templates reads all that there are: another process may have made one meanwhile.
func (d *driver) templates() (ts []template, err error) {
	for _, f := range fileSystems {
		t, err := d.readTemplate(f)
		if errors.Is(err, syscall.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		ts = append(ts, t)
	}
	return ts, nil
}

// templateThins are the ids that templates have.
func (d *driver) templateThins() (map[uint32]bool, error) {
	ts, err := d.templates()
	if err != nil {
		return nil, err
	}
	ids := map[uint32]bool{}
	for _, t := range ts {
		ids[t.Thin] = true
	}
	return ids, nil
}

// openTemplate reads the one of the kind that is asked for, or of the first kind that
// there is one of; or makes it.
func (d *driver) openTemplate(ctx context.Context, o options) error {
	ts, err := d.templates()
	if err != nil {
		return err
	}
	for _, t := range ts {
		if o.fs == "" || o.fs == t.FS {
			d.template = t
			return o.agree(&t)
		}
	}
	return d.makeTemplate(ctx, o)
}

// makeTemplate makes it under the pool's lock: others that open the root wait for it.
func (d *driver) makeTemplate(ctx context.Context, o options) error {
	f, err := knownFS(o.fs)
	if err != nil {
		return err
	}
	return d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if t, err := d.readTemplate(f); err == nil {
			d.template = t
			return o.agree(&t) // another was quicker
		}
		size, err := d.templateSize(f, o.size)
		if err != nil {
			return err
		}
		if err := f.tryProgram(ctx); err != nil {
			return err
		}
		tmp, err := d.reserve(c, c.CreateThin)
		if err != nil {
			return err
		}
		t, err := d.fillTemplate(ctx, c, f, size, tmp.id)
		if err == nil {
			err = thin.WriteJSON(d.dir, f.templateFile(), &t)
		}
		if err != nil {
			return errors.Join(err, d.dropTemplate(c, f, tmp))
		}
		d.forget(tmp)
		d.template = t
		return nil
	})
}

// templateSize is what is asked for in whole blocks of the pool.
func (d *driver) templateSize(f *fileSystem, asked int64) (int64, error) {
	if asked == 0 {
		asked = defaultSize
	}
	size := asked / d.pool.BlockBytes() * d.pool.BlockBytes()
	if size < f.least {
		return 0, fmt.Errorf("option size=%d: in whole blocks of the pool (%d bytes) that is %d, and a file system of kind %s has at least %d: %w",
			asked, d.pool.BlockBytes(), size, f.name, f.least, errdefs.ErrInvalidArgument)
	}
	return size, nil
}

// fillTemplate makes the file system on a thin device without blocks.
func (d *driver) fillTemplate(ctx context.Context, c *thin.Change, f *fileSystem, size int64, id uint32) (template, error) {
	t := template{FS: f.name, Bytes: size, Thin: id, Tool: f.program + " " + strings.Join(f.args(size), " ")}
	v := d.private(id, t.sectors(), false)
	err := c.Activate(v)
	if err == nil {
		err = c.Seen(ctx) // mkfs is run with the pool's lock
	}
	if err != nil {
		return t, errors.Join(err, c.Deactivate(v.Name))
	}
	err = t.make(ctx, f, v)
	if dropErr := deactivateSoon(c, v.Name); err == nil {
		err = dropErr
	}
	if err != nil {
		return t, fmt.Errorf("template: %w", err)
	}
	return t, drivers.Step(ctx, "devmapper: open: template made")
}

// dropTemplate deletes a template's thin device unless the template may be there: what
// writes that down may fail after it has.
func (d *driver) dropTemplate(c *thin.Change, f *fileSystem, tmp temp) error {
	if there, err := d.dir.Exists(f.templateFile()); err != nil || there {
		tmp.lock.Close() // a sweep will know
		return err
	}
	return d.drop(c, tmp)
}

// deactivateSoon removes a device that is just being closed.
func deactivateSoon(c *thin.Change, name string) (err error) {
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		err = c.Deactivate(name)
		if !errdefs.IsFailedPrecondition(err) || time.Now().After(end) {
			return err
		}
	}
}

// make makes the file system and takes lost+found away, once for all layers.
func (t *template) make(ctx context.Context, f *fileSystem, v thin.Volume) error {
	if err := f.make(ctx, v); err != nil {
		return err
	}
	m, err := mount.Detached(ctx, []mount.Mount{f.mount(v, drivers.MountOptions{})})
	if err != nil {
		return err
	}
	defer m.Close()
	root, err := sys.OpenDir(m.Path())
	if err != nil {
		return err
	}
	if err := root.Unlink("lost+found", sys.AT_REMOVEDIR); err != nil && !errors.Is(err, syscall.ENOENT) {
		root.Close()
		return err
	}
	err = emptyRoot(root, drivers.Owner{})
	root.Close()
	if err == nil {
		err = m.Close()
	}
	if err == nil {
		t.UUID, err = t.flush(f, v)
	}
	return err
}

// emptyRoot gives the root directory of an empty layer its metadata.
func emptyRoot(root *sys.Fd, owner drivers.Owner) error {
	if err := root.Chmod(0o755); err != nil {
		return err
	}
	if err := root.Chown("", owner.UID, owner.GID); err != nil {
		return err
	}
	// A layer whose archive does not name its root is the same whenever it is unpacked.
	return root.Utimes("", sys.Time{}, sys.Time{})
}

// flush has everything on the pool that was written to a device that is not mounted,
// and returns the file system's UUID.
func (t *template) flush(f *fileSystem, v thin.Volume) (string, error) {
	dev, err := sys.Open(thin.Node(v.Name), sys.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer dev.Close()
	i, err := f.identify(dev)
	if err == nil {
		err = dev.Sync()
	}
	return i.uuid, err
}
