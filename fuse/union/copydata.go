package union

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// refusals remembers which pairs of file systems cannot share or copy blocks, so
// that every file is not asked again.
type refusals struct{ clone, copyRange sync.Map } // of a lower's device number

const (
	copyChunk = 8 << 20 // between two looks at who waits for it
	copyBlock = 4096
)

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// dataOptions say more about a copy of data.
type dataOptions struct {
	used   bool   // the file may have data already
	waiter uint32 // see copyRequest
}

// copyData gives the file to, open for writing, the first size bytes of the file
// that from, O_PATH or better, is open on: blocks shared, else copied by the
// kernel, else read and written; holes stay holes. What is copied is flushed,
// unless volatile.
func (u *upper) copyData(ctx context.Context, to, from int, size int64, o dataOptions) error {
	in, err := openData(from)
	if err != nil {
		return err
	}
	defer sys.CloseBare(in)
	var st sys.Stat
	if err := sys.StatBare(in, "", &st); err != nil {
		return err
	}
	if u.tryClone(to, in, &st) {
		return sys.FtruncateBare(to, size)
	}
	if o.used { // half of a copy that was ended: holes must be holes
		if err := sys.FtruncateBare(to, 0); err != nil {
			return err
		}
	}
	// The size first: whatever is left out is a hole.
	if err := sys.FtruncateBare(to, size); err != nil {
		return err
	}
	c := copier{upper: u, ctx: ctx, waiter: o.waiter, to: to, in: in, dev: st.Dev, sparse: st.Blocks*512 < st.Size}
	if err := c.all(size); err != nil || u.volatile {
		return err
	}
	return sys.FsyncBare(to, false)
}

func (u *upper) tryClone(to, in int, st *sys.Stat) bool {
	if u.can.clone == kprobe.No {
		return false
	}
	if _, refused := u.refused.clone.Load(st.Dev); refused {
		return false
	}
	switch sys.CloneBare(to, in) {
	case nil:
		return true
	case syscall.EXDEV, syscall.EOPNOTSUPP, syscall.ENOTTY, syscall.ENOSYS:
		u.refused.clone.Store(st.Dev, true)
	}
	return false // EINVAL, EPERM, ...: because of this file
}

// copier copies the data of one file.
type copier struct {
	upper  *upper
	ctx    context.Context
	waiter uint32
	to, in int
	dev    uint64 // of in
	sparse bool
	copied int // since the last look at the waiter
}

// goOn is asked after each part of n bytes: an error ends the copy.
func (c *copier) goOn(n int) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if c.copied += n; c.copied < copyChunk {
		return nil
	}
	c.copied = 0
	if err := c.upper.step("copy-up: part of the data"); err != nil {
		return err
	}
	if c.waiter != 0 && isKilled(c.waiter) {
		return syscall.EINTR
	}
	return nil
}

// isKilled tells whether a thread has a signal pending that it does not survive;
// not if there is no telling. The kernel marks each thread of a process that is to
// die with SIGKILL, whichever the signal was. FUSE_INTERRUPT would not say that: it
// comes once, for the first signal, which may be a harmless one. The thread waits
// for us, whatever happens, so the number is still its own.
func isKilled(tid uint32) bool {
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	if err != nil {
		return false
	}
	_, line, _ := strings.Cut(string(b), "\nSigPnd:\t")
	line, _, _ = strings.Cut(line, "\n")
	pending, err := strconv.ParseUint(line, 16, 64)
	return err == nil && pending&(1<<(syscall.SIGKILL-1)) != 0
}

func (c *copier) all(size int64) error {
	if !c.sparse {
		return c.extent(0, size, false)
	}
	const seekData, seekHole = 3, 4
	for off := int64(0); off < size; {
		data, err := sys.SeekBare(c.in, off, seekData)
		if err == syscall.ENXIO {
			return nil // a hole to the end
		}
		if err != nil { // no holes to be told here: look for zeros
			return c.extent(off, size, true)
		}
		end, err := sys.SeekBare(c.in, data, seekHole)
		if err != nil || end <= data {
			end = size
		}
		if data >= size {
			return nil
		}
		if err := c.extent(data, min(end, size), false); err != nil {
			return err
		}
		off = end
	}
	return nil
}

// extent copies the bytes from off to end; with skipZeros blocks of zeros are left out.
func (c *copier) extent(off, end int64, skipZeros bool) error {
	if _, refused := c.upper.refused.copyRange.Load(c.dev); refused || skipZeros {
		return c.readWrite(off, end, skipZeros)
	}
	for off < end {
		n, err := sys.CopyRangeBare(c.to, off, c.in, off, int(min(end-off, copyChunk)))
		switch err {
		case nil:
		case syscall.EXDEV, syscall.EOPNOTSUPP, syscall.ENOSYS:
			c.upper.refused.copyRange.Store(c.dev, true)
			return c.readWrite(off, end, false)
		case syscall.EINVAL:
			return c.readWrite(off, end, false)
		default:
			return err
		}
		if n == 0 { // the end, or a file system that does not know what it does
			return c.readWrite(off, end, false)
		}
		off += int64(n)
		if err := c.goOn(n); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) readWrite(off, end int64, skipZeros bool) error {
	p := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(p)
	for off < end {
		b := (*p)[:min(int64(len(*p)), end-off)]
		n, err := sys.PreadBare(c.in, b, off)
		if err != nil {
			return err
		}
		if n == 0 {
			c.upper.log("a file in a lower ended at byte %d of %d while it was copied up", off, end)
			return nil // the rest is a hole, as if it had been one
		}
		if err := c.write(b[:n], off, skipZeros); err != nil {
			return err
		}
		off += int64(n)
		if err := c.goOn(n); err != nil {
			return err
		}
	}
	return nil
}

var zeros [copyBlock]byte

func (c *copier) write(b []byte, off int64, skipZeros bool) error {
	for len(b) > 0 {
		part := b
		if skipZeros {
			part = b[:min(len(b), copyBlock)]
			if bytes.Equal(part, zeros[:len(part)]) {
				b, off = b[len(part):], off+int64(len(part))
				continue
			}
		}
		n, err := sys.PwriteBare(c.to, part, off)
		if err != nil {
			return err
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}
