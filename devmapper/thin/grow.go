package thin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	growLock     = "grow"
	mostLowWater = 512 << 20
	leastStep    = 64 << 20
	keepFree     = 16 << 20 // of the file system that the files are on
)

// lowWater is the number of free blocks at which the kernel tells: a quarter, at
// most 512 MiB.
func (r *record) lowWater(blocks int64) int64 { return min(blocks/4, mostLowWater/r.Block) }

// Grow makes the pool larger if it runs low, or if its devices have become larger;
// ErrResourceExhausted if it needs space and there is none. It happens by itself
// while a Pool is open.
func (p *Pool) Grow(ctx context.Context) error {
	if err := p.grow(ctx); err != nil {
		return fmt.Errorf("thin pool in %s: %w", p.dir, err)
	}
	return nil
}

func (p *Pool) grow(ctx context.Context) error {
	return p.whileGrowing(func(s Status, data, metadata *sys.Fd) (err error) {
		var short error
		if p.rec.onFiles() {
			if short, err = p.growFiles(ctx, s, data, metadata); err != nil {
				return err
			}
		}
		full := p.rec.Full
		if short != nil {
			full = Error // there is nothing to wait for
		}
		if err := p.reload(ctx, s, data, metadata, full); err != nil {
			return err
		}
		return short
	})
}

// whileGrowing calls f with the state of the pool, if it can grow in that, and its devices. It has a lock of its own:
// who changes the pool may be waiting for a write, and that for more space.
func (p *Pool) whileGrowing(f func(s Status, data, metadata *sys.Fd) error) error {
	lock, err := p.growing()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := p.resumeLeft(); err != nil {
		return err
	}
	s, err := p.Status()
	if err != nil || s.Mode != ReadWrite && s.Mode != OutOfData {
		return err
	}
	data, metadata, err := p.ownDevices()
	if err != nil {
		return err
	}
	defer data.Close()
	defer metadata.Close()
	return f(s, data, metadata)
}

// growing is the lock of who exchanges the pool's table, or resumes the pool.
func (p *Pool) growing() (*sys.Lock, error) {
	return sys.WaitLock(p.path(growLock), sys.O_RDWR|sys.O_CREAT, sys.LockExclusive)
}

// growFiles makes the files larger that are low. short says that there is no room.
func (p *Pool) growFiles(ctx context.Context, s Status, data, metadata *sys.Fd) (short, err error) {
	// What the devices have, which is more than the pool's where a growth ended halfway.
	dataBytes, err := data.BlockBytes()
	if err != nil {
		return nil, err
	}
	metadataBytes, err := metadata.BlockBytes()
	if err != nil {
		return nil, err
	}
	total := dataBytes / p.rec.Block
	if free := total - int64(s.DataUsed); free <= p.rec.lowWater(total) {
		if short, err = p.growFile(ctx, dataFile, data, dataBytes); err != nil {
			return nil, err
		}
		if free > 0 {
			short = nil // not yet
		}
	}
	if total := uint64(metadataBytes / 4096); total-s.MetadataUsed <= total/4 && metadataBytes < mostMetadata {
		noRoom, err := p.growFile(ctx, metadataFile, metadata, metadataBytes)
		if err != nil || noRoom != nil {
			return short, err // the kernel stops in time
		}
	}
	return short, nil
}

// mostMetadata is what the kernel uses at most (THIN_METADATA_MAX_SECTORS).
const mostMetadata = 255 * (1 << 14) * 4096

// growFile makes a file half as large again, and its loop device, which has so many bytes, as
// large, as far as what its file system has free covers that and the holes that it has already.
func (p *Pool) growFile(ctx context.Context, name string, loop *sys.Fd, bytes int64) (short, err error) {
	f, err := p.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.size/sector > bytes/sector { // a process died that had come so far
		return p.enlarge(ctx, f.Fd, f.size, loop)
	}
	free, err := freeBytes(p.root)
	if err != nil {
		return nil, err
	}
	room := free - keepFree - f.holes
	step := max(f.size/2, leastStep)
	if name == metadataFile {
		step = f.size / 2
	}
	step = min(step, room) / p.rec.Block * p.rec.Block
	if step <= 0 {
		return fmt.Errorf("%s cannot grow, %d bytes are free on its file system: %w", f.Name(), free, errNoSpace), nil
	}
	return p.enlarge(ctx, f.Fd, f.size+step, loop)
}

// enlarge gives a file, and the loop device on it, so many bytes.
func (p *Pool) enlarge(ctx context.Context, f *sys.Fd, size int64, loop *sys.Fd) (short, err error) {
	if filepath.Base(f.Name()) == metadataFile { // first: the next Open takes the file as large as it is
		err = allocate(f, size)
	}
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil { // or after a cut the pool is larger than its file
		err = f.Sync()
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		short = fmt.Errorf("%s cannot grow to %d bytes: %w: %w", f.Name(), size, errNoSpace, err)
		return short, shrinkTo(f, loop)
	}
	if err == nil {
		err = faults.Point(ctx, "thin: grow: file larger")
	}
	if err == nil {
		err = loop.GrowLoop()
	}
	if err == nil {
		err = faults.Point(ctx, "thin: grow: loop device larger")
	}
	return nil, err
}

// shrinkTo takes from a file again what its loop device does not know of.
func shrinkTo(f, loop *sys.Fd) error {
	bytes, err := loop.BlockBytes()
	if err != nil {
		return err
	}
	return f.Truncate(bytes)
}

// reload gives the pool a table of its devices' present sizes, unless it is that
// already. If it cannot, the pool goes on with the one that it has.
func (p *Pool) reload(ctx context.Context, s Status, data, metadata *sys.Fd, full Policy) error {
	t, err := p.table(data, metadata, full)
	if err != nil {
		return err
	}
	bytes, err := metadata.BlockBytes()
	if err != nil {
		return err
	}
	larger := uint64(min(bytes, mostMetadata))/4096 > s.MetadataTotal
	if t.Length == s.DataTotal*uint64(p.rec.Block/sector) && full == s.Policy && !larger {
		return nil
	}
	if t.Length < s.DataTotal*uint64(p.rec.Block/sector) {
		return fmt.Errorf("%s has become smaller than the pool: %w", p.DataPath(), errOther)
	}
	if err := p.ctl.Load(p.name, []dm.Target{t}, false); err != nil {
		return err
	}
	err = faults.Point(ctx, "thin: grow: table loaded")
	if err == nil {
		err = p.exchange(ctx)
	}
	if err != nil {
		return errors.Join(err, p.ctl.Clear(p.name), p.resumeLeft())
	}
	return faults.Point(ctx, "thin: grow: resumed")
}

// exchange makes the table that was loaded the pool's. Nothing in it waits for anybody: the name of the device does not
// change, so udev, which hears of it, is not waited for.
func (p *Pool) exchange(ctx context.Context) error {
	// What is under way stays in the queue: it may be waiting for this.
	if err := p.ctl.Suspend(p.name, dm.SuspendOptions{NoFlush: true, SkipLockFS: true}); err != nil {
		return err
	}
	if err := faults.Point(ctx, "thin: grow: suspended"); err != nil {
		return err
	}
	return p.ctl.Resume(p.name)
}

// running calls f while nobody grows the pool: the kernel opens no thin device in one
// that is suspended for that.
func (p *Pool) running(f func() error) error {
	for {
		lock, err := sys.WaitLock(p.path(growLock), sys.O_RDWR|sys.O_CREAT, sys.LockShared)
		if err != nil {
			return err
		}
		if !p.suspended() {
			defer lock.Close()
			return f()
		}
		lock.Close()
		if err := p.goOn(); err != nil {
			return err
		}
	}
}

// openBlock opens a block device by its number.
func openBlock(d dm.Dev) (*sys.Fd, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%s/uevent", d))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return sys.Open("/dev/"+name, sys.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("block device %s has no name: %w", d, errOther)
}
