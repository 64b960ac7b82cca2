package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/thin"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Factory makes devmapper drivers.
func Factory() drivers.Factory {
	return drivers.Factory{
		Name:    Name,
		Summary: "thin devices of a device-mapper pool: a layer is a snapshot of its parent's block device",
		Options: optionTable,
		Probe:   Probe,
		Open:    Open,
		Examine: examineClosed,
	}
}

var optionTable = []drivers.Option{
	{Name: "filesystem", Default: "ext4, or what the pool has", Help: "of layers without parent: ext4 or xfs. A pool may hold both"},
	{Name: "size", Default: "10GiB", Help: "of each layer's file system: what its tree can hold. For the first layers with a file system"},
	{Name: "data", Help: "block device for data; with metadata. Without them the pool is on sparse files in the driver's directory, which grow: " +
		"easy, and slower than devices. For a new pool"},
	{Name: "metadata", Help: "block device for the pool's metadata"},
	{Name: "data-size", Default: "10GiB, or nine tenths of what is free", Help: "first size of the data file"},
	{Name: "block", Default: "64KiB", Help: "the pool's unit: what a snapshot copies at the first write to it. For a new pool"},
	{Name: "full", Default: "queue for files, error for devices", Help: "a write when the pool has no space: queue (wait up to 60 s for more) or error (ENOSPC)"},
}

// options are a driver's, understood.
type options struct {
	fs   string // "" is what the pool has
	size int64
	pool thin.Options
}

const (
	defaultSize = 10 << 30
	mostBytes   = 16 << 40
)

func parseOptions(m map[string]string) (options, error) {
	o := options{}
	if err := drivers.CheckOptions(optionTable, m); err != nil {
		return o, err
	}
	f, err := knownFS(m["filesystem"])
	if err != nil {
		return o, fmt.Errorf("option filesystem: %w", err)
	}
	o.fs = m["filesystem"]
	o.pool.Data, o.pool.Metadata, o.pool.Full = m["data"], m["metadata"], thin.Policy(m["full"])
	for name, to := range map[string]*int64{"size": &o.size, "data-size": &o.pool.DataBytes, "block": &o.pool.BlockBytes} {
		if m[name] == "" {
			continue
		}
		n, err := parseBytes(m[name])
		if err != nil {
			return o, fmt.Errorf("option %s=%s: %w", name, m[name], err)
		}
		*to = n
	}
	if o.size != 0 && (o.size < f.least || o.size > mostBytes) {
		return o, fmt.Errorf("option size=%d: a file system of kind %s has %d MiB to 16 TiB: %w", o.size, f.name, f.least>>20, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

// parseBytes reads a number of bytes, or one with KiB, MiB, GiB, TiB behind it.
func parseBytes(s string) (int64, error) {
	number, shift := s, 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(s, unit); ok {
			number, shift = n, 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n <= 0 || n > 1<<(62-shift) {
		return 0, fmt.Errorf("is no size like 512MiB or 10GiB: %w", errdefs.ErrInvalidArgument)
	}
	return n << shift, nil
}

// agree refuses another size than the template has.
func (o *options) agree(t *template) error {
	if o.size != 0 && o.size != t.Bytes {
		return fmt.Errorf("layers with %s here have %d bytes, not %d: the size is chosen when the first is made: %w", t.FS, t.Bytes, o.size, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Probe asks the kernel and looks for the programs that make file systems; it makes no pool.
func Probe(ctx context.Context, dir string) drivers.Probe {
	if _, err := os.Stat(dir); err != nil {
		return drivers.Probe{Works: kprobe.Unknown, Reason: err.Error()}
	}
	const needed = 2 // the index of the last one: that of the default file system
	features := []kprobe.Result{
		kept("thin-pool", thin.Probe()),
		kept("loop device", tryLoop()),
	}
	for _, f := range fileSystems {
		features = append(features, kept(f.program, f.tryProgram(ctx)))
	}
	p := drivers.Probe{Works: kprobe.Yes, Features: features, Reason: "thin pool on sparse files, or on devices by options; never the default: ask for it by name"}
	for i, f := range features {
		if f.Answer != kprobe.Yes && i <= needed {
			return drivers.Probe{Works: kprobe.No, Reason: f.Detail, Features: features}
		}
	}
	return p
}

func kept(feature string, err error) kprobe.Result {
	if err == nil {
		return kprobe.Result{Feature: feature, Answer: kprobe.Yes}
	}
	return kprobe.Result{Feature: feature, Answer: kprobe.No, Detail: err.Error(), Err: err}
}

func tryLoop() error {
	f, err := sys.Open("/dev/loop-control", sys.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// Open opens or makes the pool at c.Root.
func Open(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
	d, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("devmapper: open %s: %w", c.Root, err)
	}
	return d, nil
}

func open(ctx context.Context, c drivers.Config) (d *driver, err error) {
	o, err := parseOptions(c.Options)
	if err != nil {
		return nil, err
	}
	if err := thin.Probe(); err != nil { // before there is a directory
		return nil, err
	}
	root, err := roots.Make(c.Root, tempDir)
	if err != nil {
		return nil, err
	}
	dir, err := sys.OpenDir(root)
	if err != nil {
		return nil, err
	}
	pool, err := thin.Open(ctx, root, o.pool)
	if err != nil {
		dir.Close()
		return nil, err
	}
	d = &driver{root: root, dir: dir, pool: pool}
	if err := d.start(ctx, o); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *driver) start(ctx context.Context, o options) error {
	if err := d.pool.Exclusive(ctx, d.recover); err != nil {
		return err
	}
	if err := d.openTemplate(ctx, o); err != nil {
		return err
	}
	d.caps = drivers.Capabilities{Driver: Name, Diff: true, Apply: true, UsageBytes: true, UsageBlocks: true}
	return d.tryTemplate(ctx)
}

// recover resumes what a process left suspended, and deletes what it left in tmp.
func (d *driver) recover(c *thin.Change) error {
	names, err := d.pool.Devices()
	if err != nil {
		return err
	}
	for _, name := range names {
		if i, err := d.pool.Info(name); err != nil || !i.Suspended || !i.ActiveTable {
			continue
		}
		if err := d.resumeIfLeft(name); err != nil {
			return err
		}
	}
	return d.sweepTemps(c)
}

// resumeIfLeft resumes a layer's device unless somebody alive has suspended it.
func (d *driver) resumeIfLeft(name string) error {
	id, ok := d.layerOf(name)
	if !ok {
		return nil
	}
	f, err := sys.Open(d.root+"/"+roots.Layers+"/"+id.String(), sys.O_RDONLY|sys.O_NOFOLLOW, 0)
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lock, err := f.TryLock(sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	return d.resumeLeft(context.Background(), name)
}

// tryTemplate mounts the template, attached nowhere: so the kernel shows that it has
// the file system, whether it maps ids, whether we may make one larger, and what it counts.
func (d *driver) tryTemplate(ctx context.Context) error {
	f, err := knownFS(d.template.FS)
	if err != nil {
		return err
	}
	v := d.private(d.template.Thin, d.template.sectors(), true)
	return d.shown(ctx, v, func() (err error) {
		d.alwaysCounts, err = d.countsUntold(v.Name, func() error { return d.tryMounts(ctx, f, v) })
		return err
	})
}

func (d *driver) tryMounts(ctx context.Context, f *fileSystem, v thin.Volume) error {
	one := []drivers.IDRange{{ContainerID: 0, HostID: 100000, Size: 1}}
	t, err := mount.Detached(ctx, []mount.Mount{f.mount(v, drivers.MountOptions{IDMap: drivers.IDMap{UIDs: one, GIDs: one}})})
	d.caps.IDMap = err == nil
	if err != nil {
		t, err = mount.Detached(ctx, []mount.Mount{f.mount(v, drivers.MountOptions{})})
	}
	if err != nil {
		return err
	}
	err = d.tryGrow(f, v, t.Path())
	return errors.Join(err, t.Close())
}

// tryGrow asks for what a read-only mount is refused: EPERM comes before that.
func (d *driver) tryGrow(f *fileSystem, v thin.Volume, path string) error {
	dev, err := sys.Open(thin.Node(v.Name), sys.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	root, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer root.Close()
	if d.noQuota = f.grow(root, dev, d.template.Bytes); !errors.Is(d.noQuota, syscall.EPERM) {
		d.caps.Quota, d.caps.LeastQuota, d.noQuota = true, d.template.Bytes, nil
	}
	return nil
}
