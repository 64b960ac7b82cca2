package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/ext4"
	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// template is the empty file system that every layer without parent begins as, in
// template.json. Immutable once the driver is open.
type template struct {
	FS    string `json:"fs"`
	Bytes int64  `json:"bytes"`
	UUID  string `json:"uuid"`
	Thin  uint32 `json:"thin"`
	Tool  string `json:"tool"` // that made it, with its arguments
}

func (t *template) sectors() uint64 { return uint64(t.Bytes / 512) }

// mkfsArgs make a small file system: thin devices read as zeros where nothing was
// written, so that no inode table needs to be, neither now nor by the kernel later;
// a short journal, as each layer comes to have its own copy; and features that every
// kernel since 5.10 knows.
var mkfsArgs = []string{"-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=16", "-O", "^orphan_file,^metadata_csum_seed",
	"-E", "assume_storage_prezeroed=1,lazy_itable_init=1,packed_meta_blocks=1,nodiscard,root_owner=0:0"}

const mkfsTool = "mke2fs"

// mke2fs finds the program, in sbin directories too.
func mke2fs() (string, error) {
	for _, name := range []string{mkfsTool, "/usr/sbin/" + mkfsTool, "/sbin/" + mkfsTool} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no %s in PATH (package e2fsprogs, 1.47 or newer): %w", mkfsTool, errdefs.ErrUnavailable)
}

// openTemplate reads template.json, or makes the template.
func (d *driver) openTemplate(ctx context.Context, o options) error {
	err := thin.ReadJSON(d.dir, templateFile, &d.template)
	if err == nil {
		return o.agree(&d.template)
	}
	if !errors.Is(err, syscall.ENOENT) {
		return err
	}
	return d.makeTemplate(ctx, o)
}

// makeTemplate makes it under the pool's lock: others that open the root wait for it.
func (d *driver) makeTemplate(ctx context.Context, o options) error {
	return d.pool.Exclusive(ctx, func(c *thin.Change) error {
		if err := thin.ReadJSON(d.dir, templateFile, &d.template); err == nil {
			return o.agree(&d.template) // another was quicker
		}
		id, err := d.freeID(c)
		if err != nil {
			return err
		}
		if o.size == 0 {
			o.size = defaultSize
		}
		t := template{FS: "ext4", Bytes: o.size / d.pool.BlockBytes() * d.pool.BlockBytes(), Thin: id, Tool: mkfsTool + " " + strings.Join(mkfsArgs, " ")}
		v := thin.Volume{Name: d.deviceName(0, id), ID: id, Sectors: t.sectors()}
		if err := c.Deactivate(v.Name); err != nil { // of an Open that died
			return err
		}
		if err := c.Delete(id); err != nil {
			return err
		}
		if err := c.CreateThin(id); err != nil {
			return err
		}
		if err := c.Activate(ctx, v); err != nil {
			return err
		}
		err = t.make(ctx, v)
		if dropErr := deactivateSoon(c, v.Name); err == nil {
			err = dropErr
		}
		if err != nil {
			return fmt.Errorf("template: %w", err)
		}
		if err := drivers.Step(ctx, "devmapper: open: template made"); err != nil {
			return err
		}
		if err := thin.WriteJSON(d.dir, templateFile, &t); err != nil {
			return err
		}
		d.template, d.used[id] = t, true
		return nil
	})
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
func (t *template) make(ctx context.Context, v thin.Volume) error {
	program, err := mke2fs()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, program, append(append([]string(nil), mkfsArgs...), thin.Node(v.Name))...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s (1.47 or newer is needed): %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	m, err := mount.Detached(ctx, []mount.Mount{t.mount(v, drivers.MountOptions{})})
	if err != nil {
		return err
	}
	defer m.Close()
	root, err := sys.OpenDir(m.Path())
	if err != nil {
		return err
	}
	if err := root.Unlink("lost+found", sys.AT_REMOVEDIR); err != nil {
		root.Close()
		return err
	}
	err = emptyRoot(root, drivers.Owner{})
	root.Close()
	if err == nil {
		err = m.Close()
	}
	if err == nil {
		t.UUID, err = t.flush(v)
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
func (t *template) flush(v thin.Volume) (string, error) {
	f, err := sys.Open(thin.Node(v.Name), sys.O_RDONLY, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	s, err := ext4.Identify(f)
	if err == nil {
		err = f.Sync()
	}
	return s.UUID, err
}

// mount is pure: the plan of a mount of a device.
func (t *template) mount(v thin.Volume, o drivers.MountOptions) mount.Mount {
	m := mount.Mount{Type: t.FS, Source: thin.Node(v.Name)}
	switch {
	case v.ReadOnly: // a clean journal, which must not be looked at, or the mount fails
		m.Options = []string{"ro", "noload"}
	case o.ReadOnly:
		m.Options = []string{"ro"}
	default: // what is deleted goes back to the pool
		m.Options = []string{"rw", "discard"}
		if o.Volatile {
			m.Options = append(m.Options, "nobarrier")
		}
	}
	m.Options = append(m.Options, o.IDMap.MountOptions()...)
	return m
}
