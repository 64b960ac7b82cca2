package thin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

// start makes the pool if there is none, and activates it.
func (c *Change) start(ctx context.Context, o Options) error {
	p := c.pool
	r, err := readRecord(p.root)
	if err != nil {
		return err
	}
	if r == nil {
		r = o.record()
		if err := r.refuseUsedDevices(); err != nil {
			return err
		}
		if err := r.refuseInUse(); err != nil {
			return err
		}
		if err := WriteJSON(p.root, recordFile, r); err != nil {
			return err
		}
		if err := faults.Point(ctx, "thin: open: recorded"); err != nil {
			return err
		}
	}
	if err := o.agree(r); err != nil {
		return err
	}
	p.rec = *r
	if r.New {
		if err := c.renew(ctx); err != nil {
			return err
		}
	}
	if err := c.activatePool(ctx); err != nil {
		return err
	}
	if r.New {
		p.rec.New = false
		if err := WriteJSON(p.root, recordFile, &p.rec); err != nil {
			return err
		}
		if err := faults.Point(ctx, "thin: open: new no more"); err != nil {
			return err
		}
	}
	if err := p.grow(ctx); err != nil && !errdefs.IsResourceExhausted(err) {
		return err
	}
	err = p.healthy()
	p.sick = err != nil
	return err
}

func (r *record) refuseUsedDevices() error {
	if r.onFiles() {
		return nil
	}
	return errors.Join(refuseUsed(r.Data, false), refuseUsed(r.Metadata, true))
}

// renew begins a new pool again, of which an Open that died may have left
// something.
func (c *Change) renew(ctx context.Context) error {
	p := c.pool
	if err := c.dismantle(); err != nil {
		return err
	}
	if _, err := p.ctl.Info(p.name); err == nil {
		return fmt.Errorf("pool %s: %w", p.name, errBusy)
	}
	if !p.rec.onFiles() {
		return p.rec.refuseUsedDevices()
	}
	bytes, err := p.rec.firstDataBytes(p.root)
	if err != nil {
		return err
	}
	sizes := map[string]int64{dataFile: bytes, metadataFile: p.rec.firstMetadataBytes()}
	for _, name := range []string{dataFile, metadataFile} {
		size := sizes[name]
		f, err := p.root.Openat(name, sys.O_RDWR|sys.O_CREAT|sys.O_TRUNC|sys.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		if err = f.Truncate(size); err == nil && name == metadataFile {
			err = allocate(f, size)
		}
		if err == nil {
			err = f.Sync()
		}
		f.Close()
		if err == nil {
			err = faults.Point(ctx, "thin: open: "+name+" made")
		}
		if err != nil {
			return err
		}
	}
	return p.root.Sync()
}

// allocate takes the space for a metadata file at once, where the file system can: the
// kernel stops a pool whose metadata it cannot write, and only thin_check lets it go
// on.
func allocate(f *sys.Fd, size int64) error {
	err := f.Allocate(size)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	return err
}

// firstDataBytes is what was asked for, or 10 GiB, or nine tenths of what is free.
func (r *record) firstDataBytes(dir *sys.Fd) (int64, error) {
	if r.DataBytes != 0 {
		return r.DataBytes, nil
	}
	free, err := freeBytes(dir)
	if err != nil {
		return 0, err
	}
	bytes := min(defaultData, free/10*9) / r.Block * r.Block
	if bytes < leastData {
		return 0, fmt.Errorf("%d bytes are free, a pool needs 16 MiB: %w", free, errNoSpace)
	}
	return bytes, nil
}

func (r *record) firstMetadataBytes() int64 {
	if r.MetadataBytes != 0 {
		return r.MetadataBytes
	}
	return defaultMetadata
}

func freeBytes(dir *sys.Fd) (int64, error) {
	s, err := dir.Statfs()
	return int64(s.BlocksUser) * s.BlockSize, err
}

// activatePool makes the pool's device if it is not there, and finishes what a
// process began that died.
func (c *Change) activatePool(ctx context.Context) error {
	p := c.pool
	i, err := p.ctl.Info(p.name)
	switch {
	case isGone(err):
		if err := p.rec.refuseInUse(); err != nil {
			return err
		}
		if _, err := p.ctl.Create(p.name, uuid(p.name)); err != nil {
			return err
		}
	case err != nil:
		return err
	case i.ActiveTable:
		if err := p.sameDevices(); err != nil {
			return err
		}
		return p.goOn()
	}
	if err := c.loadAlone(ctx); err != nil {
		_ = p.ctl.Remove(p.name, false)
		return fmt.Errorf("pool %s (the kernel's log says more): %w", p.name, err)
	}
	return nil
}

// uuid of a device: dmsetup shows by it whose it is.
func uuid(name string) string { return "LAYERCTL-" + strings.TrimPrefix(name, "layerctl-") }

// refuseInUse refuses devices that something else uses.
func (r *record) refuseInUse() error {
	if r.onFiles() {
		return nil
	}
	for _, path := range []string{r.Data, r.Metadata} {
		f, err := sys.Open(path, sys.O_RDWR|sys.O_EXCL, 0)
		if errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("the device is mounted, or another pool uses it: %w: %w", errdefs.ErrFailedPrecondition, err)
		}
		if err != nil {
			return err
		}
		f.Close()
	}
	return nil
}

// loadAlone loads while nobody grows the pool: who does may be at work with the devices of one
// that was removed meanwhile, and, in the middle of the resume, it looks as if it were left suspended.
func (c *Change) loadAlone(ctx context.Context) error {
	lock, err := c.pool.growing()
	if err != nil {
		return err
	}
	defer lock.Close()
	return c.load(ctx)
}

// load gives the pool's device its table and lets it go.
func (c *Change) load(ctx context.Context) error {
	p := c.pool
	if err := faults.Point(ctx, "thin: open: device created"); err != nil {
		return err
	}
	if err := p.rec.checkSuperblock(p.MetadataPath()); err != nil {
		return err
	}
	data, err := p.attach(p.DataPath())
	if err != nil {
		return err
	}
	defer data.Close() // the pool has it then
	metadata, err := p.attach(p.MetadataPath())
	if err != nil {
		return err
	}
	defer metadata.Close()
	t, err := p.table(data, metadata, p.rec.Full)
	if err != nil {
		return err
	}
	if err := p.ctl.Load(p.name, []dm.Target{t}, false); err != nil {
		return err
	}
	if err := faults.Point(ctx, "thin: open: table loaded"); err != nil {
		return err
	}
	if err := c.announced(func(ctl *dm.Control) error { return ctl.Resume(p.name) }); err != nil {
		return err
	}
	return faults.Point(ctx, "thin: open: resumed")
}

// attach opens a device, or makes a file one.
func (p *Pool) attach(path string) (*sys.Fd, error) {
	if p.rec.onFiles() {
		return sys.AttachLoop(path, sys.LoopOptions{Autoclear: true})
	}
	return sys.Open(path, sys.O_RDWR, 0)
}

// table is the pool's, as large as the data device is.
func (p *Pool) table(data, metadata *sys.Fd, full Policy) (dm.Target, error) {
	bytes, err := data.BlockBytes()
	if err != nil {
		return dm.Target{}, err
	}
	var numbers [2]dm.Dev
	for i, f := range []*sys.Fd{metadata, data} {
		st, err := f.Stat("")
		if err != nil {
			return dm.Target{}, err
		}
		numbers[i] = dm.Dev{Major: st.RdevMajor, Minor: st.RdevMinor}
	}
	blocks := bytes / p.rec.Block
	features := "0"
	if full == Error {
		features = "1 error_if_no_space"
	}
	return dm.Target{Length: uint64(blocks * p.rec.Block / sector), Type: "thin-pool",
		Params: fmt.Sprintf("%s %s %d %d %s", numbers[0], numbers[1], p.rec.Block/sector, p.rec.lowWater(blocks), features)}, nil
}

// deviceNumbers are those of the block devices that the active table of a pool names,
// this one or another.
func (p *Pool) deviceNumbers(pool string) (data, metadata dm.Dev, err error) {
	t, err := p.ctl.Table(pool, false)
	if err != nil {
		return data, metadata, err
	}
	if len(t) != 1 || t[0].Type != "thin-pool" {
		return data, metadata, fmt.Errorf("%s is no thin pool: %w", pool, errdefs.ErrFailedPrecondition)
	}
	if _, err := fmt.Sscanf(t[0].Params, "%d:%d %d:%d", &metadata.Major, &metadata.Minor, &data.Major, &data.Minor); err != nil {
		return data, metadata, fmt.Errorf("table %q: %w", t[0].Params, errStatus)
	}
	return data, metadata, nil
}

// devices opens the pool's block devices.
func (p *Pool) devices() (data, metadata *sys.Fd, err error) {
	d, m, err := p.deviceNumbers(p.name)
	if err != nil {
		return nil, nil, err
	}
	if data, err = openBlock(d); err != nil {
		return nil, nil, err
	}
	if metadata, err = openBlock(m); err != nil {
		data.Close()
		return nil, nil, err
	}
	return data, metadata, nil
}

// sameDevices refuses an active pool that is not on our files: the directory was
// deleted, and its numbers are in use again.
func (p *Pool) sameDevices() error {
	data, metadata, err := p.ownDevices()
	if err != nil {
		return err
	}
	data.Close()
	metadata.Close()
	return nil
}

// ownDevices opens the pool's block devices if they are on our files, which they then stay: a loop device that
// was given back meanwhile may be on another file.
func (p *Pool) ownDevices() (data, metadata *sys.Fd, err error) {
	if data, metadata, err = p.devices(); err != nil {
		return nil, nil, err
	}
	if err := p.allSame(data, metadata); err != nil {
		data.Close()
		metadata.Close()
		return nil, nil, err
	}
	return data, metadata, nil
}

func (p *Pool) allSame(data, metadata *sys.Fd) error {
	for path, f := range map[string]*sys.Fd{p.DataPath(): data, p.MetadataPath(): metadata} {
		if err := p.same(path, f); err != nil {
			return fmt.Errorf("pool %s is active, on something else than %s: remove it (dmsetup remove %s): %w: %w", p.name, path, p.name, errdefs.ErrFailedPrecondition, noSentinel{err})
		}
	}
	return nil
}

var errOther = errors.New("another device")

func (p *Pool) same(path string, f *sys.Fd) error {
	st, err := sys.StatPath(path)
	if err != nil {
		return err
	}
	if !p.rec.onFiles() {
		have, err := f.Stat("")
		if err == nil && (have.RdevMajor != st.RdevMajor || have.RdevMinor != st.RdevMinor) {
			err = errOther
		}
		return err
	}
	dev, ino, err := f.LoopBacking()
	if err == nil && (dev != st.Dev || ino != st.Ino) {
		err = errOther
	}
	return err
}

// dismantle removes the thin devices that nobody has open, and then the pool, if
// it has none.
func (c *Change) dismantle() error {
	p := c.pool
	if err := p.goOn(); err != nil {
		return err
	}
	names, err := p.Devices()
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := c.Deactivate(name); err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	// What has just been closed lets go of it at once, or udev in a moment.
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		i, err := p.ctl.Info(p.name)
		if isGone(err) {
			return nil
		}
		if err != nil {
			return err
		}
		if i.Open == 0 {
			if err = c.Deactivate(p.name); !errdefs.IsFailedPrecondition(err) {
				return err
			}
		}
		if left, err := p.Devices(); err != nil || len(left) > 0 || time.Now().After(end) {
			return err
		}
	}
}

// Devices lists the pool's thin devices that are there, by Prefix.
func (p *Pool) Devices() ([]string, error) {
	all, err := p.ctl.List()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range all {
		if strings.HasPrefix(n.Name, p.Prefix()) && n.Name != p.name {
			names = append(names, n.Name)
		}
	}
	return names, nil
}
