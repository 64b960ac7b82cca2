package thin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
)

// Options say what a new pool is made of. Of a pool that is there, those that
// are not zero must agree with it, but for the sizes.
type Options struct {
	// Data and Metadata are block devices; both empty: sparse files in the
	// directory, which grow.
	Data, Metadata string
	// DataBytes and MetadataBytes are the first sizes of files. 0: 10 GiB, or what
	// is free; 16 MiB, which are allocated at once.
	DataBytes, MetadataBytes int64
	// BlockBytes is the pool's unit: 64 KiB (0) to 1 GiB, a multiple of that.
	BlockBytes int64
	// Full is Queue (files) or Error (devices) if empty.
	Full Policy
}

const (
	sector          = 512
	defaultBlock    = 64 << 10
	mostBlock       = 1 << 30
	defaultData     = 10 << 30
	defaultMetadata = 16 << 20
	leastData       = 16 << 20
)

func (o Options) check() error {
	switch {
	case (o.Data == "") != (o.Metadata == ""):
		return fmt.Errorf("a pool on devices needs one for data and one for metadata: %w", errdefs.ErrInvalidArgument)
	case o.Data != "" && (o.DataBytes != 0 || o.MetadataBytes != 0):
		return fmt.Errorf("sizes are for files; devices have theirs: %w", errdefs.ErrInvalidArgument)
	case o.BlockBytes != 0 && (o.BlockBytes < defaultBlock || o.BlockBytes > mostBlock || o.BlockBytes%defaultBlock != 0):
		return fmt.Errorf("a block of %d bytes is not a multiple of 64 KiB up to 1 GiB: %w", o.BlockBytes, errdefs.ErrInvalidArgument)
	case o.Full != "" && o.Full != Queue && o.Full != Error:
		return fmt.Errorf("what to do when the pool is full is %q, not %q or %q: %w", o.Full, Queue, Error, errdefs.ErrInvalidArgument)
	case o.DataBytes < 0 || o.MetadataBytes < 0 || o.DataBytes > 0 && o.DataBytes < leastData || o.MetadataBytes > 0 && o.MetadataBytes < 2<<20:
		return fmt.Errorf("a pool has at least 16 MiB for data and 2 MiB for metadata: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// record returns that of a new pool.
func (o Options) record() *record {
	r := &record{Format: format, Data: o.Data, Metadata: o.Metadata, Block: o.BlockBytes, Full: o.Full, New: true,
		DataBytes: o.DataBytes, MetadataBytes: o.MetadataBytes}
	if r.Block == 0 {
		r.Block = defaultBlock
	}
	if r.Full == "" {
		if r.Full = Error; r.onFiles() {
			r.Full = Queue
		}
	}
	return r
}

// agree refuses options that a pool was not made with.
func (o Options) agree(r *record) error {
	for _, c := range []struct{ what, want, is string }{
		{"data device", o.Data, r.Data}, {"metadata device", o.Metadata, r.Metadata}, {"policy", string(o.Full), string(r.Full)},
	} {
		if c.want != "" && c.want != c.is {
			return fmt.Errorf("the pool's %s is %q, not %q: %w", c.what, c.is, c.want, errdefs.ErrFailedPrecondition)
		}
	}
	if o.BlockBytes != 0 && o.BlockBytes != r.Block {
		return fmt.Errorf("the pool has blocks of %d bytes, not %d: %w", r.Block, o.BlockBytes, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Pool is an open, active pool. It has one owner, who closes it; many goroutines
// may use it.
type Pool struct {
	dir  string
	root *sys.Fd
	ctl  *dm.Control
	name string
	rec  record // immutable after Open

	mu    sync.Mutex // one Exclusive at a time in this process
	claim uint64     // guarded by mu: the number of our last Claim

	patience time.Duration // with udev

	full atomic.Int64 // when the pool was last seen without a free block, in Unix seconds

	opened bool // immutable once open: the pool's device is there, or was
	sick   bool // set by an Open that found the pool active and of no use
	users  *sys.Lock

	stop     context.CancelFunc
	watching sync.WaitGroup // what stop ends
	closed   sync.Once
}

// Open opens the pool in the directory, which exists, makes it if there is none,
// and activates it.
func Open(ctx context.Context, dir string, o Options) (*Pool, error) {
	p, err := open(ctx, dir, o)
	if err != nil {
		return nil, fmt.Errorf("thin pool in %s: %w", dir, err)
	}
	return p, nil
}

func open(ctx context.Context, dir string, o Options) (*Pool, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	p := &Pool{dir: dir, patience: udevPatience}
	if err := p.open(ctx, o); err != nil {
		if p.sick { // what repairs it wants it inactive
			err = errors.Join(err, p.leave())
		}
		p.letGo()
		return nil, err
	}
	return p, nil
}

func (p *Pool) open(ctx context.Context, o Options) (err error) {
	if p.ctl, err = dm.Open(); err != nil {
		return noThin(err)
	}
	if p.root, err = sys.OpenDir(p.dir); err != nil {
		return err
	}
	if p.name, err = p.deviceName(); err != nil {
		return err
	}
	if p.users, err = sys.WaitLock(p.path(usersFile), sys.O_RDWR|sys.O_CREAT, sys.LockShared); err != nil {
		return err
	}
	if err = p.Exclusive(ctx, func(c *Change) error { return c.start(ctx, o) }); err != nil {
		return err
	}
	p.opened = true
	if err := p.releaseLeft(ctx); err != nil {
		return err
	}
	return p.watch()
}

// noThin adds to an error of the control device what is needed of the kernel.
func noThin(err error) error {
	if errdefs.IsNotImplemented(err) {
		return fmt.Errorf("needs CONFIG_DM_THIN_PROVISIONING: %w", err)
	}
	return err
}

// Probe says whether the kernel has thin pools, and why not. It loads the module
// if there is one, and leaves nothing.
func Probe() error {
	ctl, err := dm.Open()
	if err != nil {
		return noThin(err)
	}
	defer ctl.Close()
	targets, err := ctl.Targets()
	if err != nil {
		return err
	}
	if _, ok := targets["thin-pool"]; ok {
		return nil
	}
	// A table that names a target loads its module; its parameters are refused.
	name := fmt.Sprintf("layerctl-probe-%d", os.Getpid())
	if _, err := ctl.Create(name, ""); err != nil {
		return err
	}
	defer ctl.Remove(name, false)
	_ = ctl.Load(name, []dm.Target{{Length: 8, Type: "thin-pool", Params: ""}}, false)
	if targets, err = ctl.Targets(); err != nil {
		return err
	}
	if _, ok := targets["thin-pool"]; !ok {
		return fmt.Errorf("the kernel has device-mapper, but no target thin-pool (CONFIG_DM_THIN_PROVISIONING, module dm_thin_pool): %w", errdefs.ErrNotImplemented)
	}
	return nil
}

func (p *Pool) path(name string) string { return filepath.Join(p.dir, name) }

// deviceName is made of the directory's numbers: a copy of it, which says the same
// of itself, has others.
func (p *Pool) deviceName() (string, error) {
	st, err := p.root.Stat("")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("layerctl-%d.%d-%d-pool", st.Dev>>32, st.Dev&(1<<32-1), st.Ino), nil
}

// Name is that of the pool's device.
func (p *Pool) Name() string { return p.name }

// Prefix begins the names of the pool's thin devices, as callers of Activate
// choose them: "layerctl-8.1-1234-".
func (p *Pool) Prefix() string { return strings.TrimSuffix(p.name, "pool") }

// BlockBytes is the pool's unit of allocation.
func (p *Pool) BlockBytes() int64 { return p.rec.Block }

// OnFiles reports whether the pool is on files in its directory.
func (p *Pool) OnFiles() bool { return p.rec.onFiles() }

// MetadataPath is the file or device that the pool's metadata is on.
func (p *Pool) MetadataPath() string {
	if p.rec.onFiles() {
		return p.path(metadataFile)
	}
	return p.rec.Metadata
}

// DataPath is the file or device that the pool's data is on.
func (p *Pool) DataPath() string {
	if p.rec.onFiles() {
		return p.path(dataFile)
	}
	return p.rec.Data
}

// Status is the pool's state. What the kernel has in memory is not committed for
// it.
func (p *Pool) Status() (Status, error) {
	t, err := p.ctl.Status(p.name, true)
	if err != nil {
		return Status{}, err
	}
	if len(t) != 1 || t[0].Type != "thin-pool" {
		return Status{}, fmt.Errorf("%s is no thin pool: %w", p.name, errdefs.ErrFailedPrecondition)
	}
	s, err := ParseStatus(t[0].Params)
	if err == nil && (s.Mode == OutOfData || s.DataUsed == s.DataTotal) {
		p.full.Store(time.Now().Unix())
	}
	return s, err
}

// fullFor is how long a pool that was full, and has grown since, is why a write failed.
const fullFor = 60 * time.Second

// Explain says in words what is wrong with the pool; nil if nothing is.
func (p *Pool) Explain() error {
	s, err := p.Status()
	if err != nil {
		return err
	}
	if err := p.explain(s); err != nil || !p.rec.onFiles() {
		return err
	}
	free, err := freeBytes(p.root)
	if err == nil && free < p.rec.Block {
		err = fmt.Errorf("the file system that pool %s has its files on (%s) is full: %w", p.name, p.dir, errdefs.ErrResourceExhausted)
	}
	return err
}

func (p *Pool) explain(s Status) error {
	return s.Explain(p.name, p.MetadataPath(), sizeOf(p.MetadataPath()))
}

// RepairWords are the commands that mend the pool's metadata.
func (p *Pool) RepairWords() string {
	return RepairWords(p.name, p.MetadataPath(), sizeOf(p.MetadataPath()))
}

// RebuildWords are the command that makes the pool's metadata anew once it is inactive.
func (p *Pool) RebuildWords() string {
	return RebuildWords(p.MetadataPath(), sizeOf(p.MetadataPath()))
}

// ExplainWrite is Explain for a write to a thin device that was an error: it says, too,
// what was wrong a moment ago.
func (p *Pool) ExplainWrite() error {
	err := p.Explain()
	if err == nil && time.Since(time.Unix(p.full.Load(), 0)) < fullFor {
		return fmt.Errorf("pool %s had no free data block a moment ago; it has grown since: %w", p.name, errdefs.ErrResourceExhausted)
	}
	return err
}

// Flush has the kernel commit what it has of the pool's metadata in memory, and
// with it everything that was written to thin devices.
func (p *Pool) Flush() error {
	_, err := p.ctl.Status(p.name, false)
	if err == nil {
		err = p.healthy()
	}
	return err
}

// healthy returns an error if the pool cannot keep what it is told.
func (p *Pool) healthy() error {
	s, err := p.Status()
	if err == nil && s.Mode != ReadWrite && s.Mode != OutOfData {
		err = p.explain(s)
	}
	return err
}

// Close ends the use of the pool. Without another user thin devices that nobody
// has open are removed, and then, if there is none, the pool's. A pool on files that stays, as a device
// is open, is made as large as there is room for: nobody will do so when it runs low. A second Close does
// nothing.
func (p *Pool) Close() (err error) {
	p.closed.Do(func() {
		if p.stop != nil {
			p.stop()
			p.watching.Wait()
		}
		err = p.leave()
		p.letGo()
	})
	return err
}

// leave takes the pool away if nobody else uses it.
func (p *Pool) leave() error {
	p.users.Close()
	p.users, p.opened = nil, false
	last, err := sys.LockFile(p.path(usersFile), sys.LockExclusive)
	if sys.IsLocked(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer last.Close()
	ctx := context.Background()
	if err := p.Exclusive(ctx, (*Change).dismantle); err != nil {
		return err
	}
	_ = p.growAhead(ctx) // or it is as large as it is
	return nil
}

func (p *Pool) letGo() {
	p.users.Close()
	p.root.Close()
	if p.ctl != nil {
		p.ctl.Close()
	}
}

// Exclusive calls f while no other process and no other Exclusive changes the
// pool. Where udev runs it returns when udev has seen what f did.
func (p *Pool) Exclusive(ctx context.Context, f func(c *Change) error) error {
	c := &Change{pool: p}
	err := p.exclusive(ctx, c, f)
	if seenErr := c.Seen(ctx); err == nil {
		err = seenErr
	}
	return err
}

func (p *Pool) exclusive(ctx context.Context, c *Change, f func(c *Change) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	lock, err := sys.WaitLock(p.path(lockFile), sys.O_RDWR|sys.O_CREAT, sys.LockExclusive)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := ctx.Err(); err != nil {
		return err
	}
	c.lock = lock.Fd()
	if p.opened {
		if err := c.ready(ctx); err != nil {
			return err
		}
	}
	return f(c)
}

// ready has the pool there and not suspended, whatever was done behind our back.
func (c *Change) ready(ctx context.Context) error {
	if _, err := c.pool.ctl.Info(c.pool.name); isGone(err) {
		return c.activatePool(ctx)
	}
	return c.pool.goOn()
}

var errBusy = fmt.Errorf("somebody has it open: %w", errdefs.ErrFailedPrecondition)

// isGone reports whether a device is not there.
func isGone(err error) bool { return errors.Is(err, errdefs.ErrNotFound) }
