package dmtest

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/testenv"
)

// Disk is a block device whose every write is kept, in the order in which the disk
// could no longer lose it (dm-log-writes), so that the disk can be had as it was after a power
// cut at any moment. It goes with the test.
type Disk struct {
	kernel
	// Name is that of the device while it records.
	Name string

	dir    string
	bytes  int64
	golden string // the file that Replay writes to: at first as the disk was
}

// NewDisk makes a disk of a file that is there; the file is the test's alone. It
// skips as Open does.
func NewDisk(t *testing.T, name, file string) *Disk {
	t.Helper()
	d := &Disk{kernel: kernel{t, Open(t)}, Name: name, dir: testenv.Scratch(t), golden: filepath.Join(testenv.Scratch(t), "golden")}
	st, err := os.Stat(file)
	d.check(err)
	d.bytes = st.Size()
	d.check(testenv.CopySparse(file, d.golden))
	base, log := d.attach(file), d.attach(d.file("log", 4<<30))
	d.device(name, dm.Target{Length: uint64(d.bytes / sectorBytes), Type: "log-writes", Params: base.number + " " + log.number}, d.Drop)
	base.Close()
	log.Close()
	return d
}

// file makes a file of zeros, or empties one.
func (d *Disk) file(name string, bytes int64) (path string) {
	d.Helper()
	path = filepath.Join(d.dir, name)
	d.sparse(path, bytes)
	return path
}

// Mark notes in the log, in one word, that something is true from here on.
func (d *Disk) Mark(format string, args ...any) {
	d.Helper()
	_, err := d.Message(d.Name, 0, "mark "+fmt.Sprintf(format, args...))
	d.check(err)
}

// End ends the recording: the device, which nobody has open, goes.
func (d *Disk) End() *Log {
	d.Helper()
	d.Drop(d.Name)
	f, err := os.Open(filepath.Join(d.dir, "log"))
	d.check(err)
	d.Cleanup(func() { f.Close() })
	l := &Log{f: f}
	d.check(l.read())
	return l
}

// Log is what was written.
type Log struct {
	Entries []Entry
	f       *os.File
}

// Entry is one write, discard or mark.
type Entry struct {
	Begin, Bytes int64
	Flush, FUA   bool
	Discard      bool
	Mark         string // of Mark
	at           int64  // of its bytes in the log
}

// Durable reports whether the disk kept all of the log to here when this had been done.
func (e Entry) Durable() bool { return e.Flush || e.FUA }

// The format (drivers/md/dm-log-writes.c): a sector of struct log_write_super, and for each
// entry a sector of struct log_write_entry and its data.
const (
	logMagic   = 0x6a736677736872
	logFlush   = 1
	logFUA     = 2
	logDiscard = 4
	logMark    = 8
)

func (l *Log) read() error {
	b := make([]byte, sectorBytes)
	if _, err := l.f.ReadAt(b, 0); err != nil {
		return err
	}
	le := binary.LittleEndian
	magic, version, count, size := le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint32(b[24:])
	if magic != logMagic || version != 1 || size != sectorBytes {
		return fmt.Errorf("log of magic number %#x, version %d, sectors of %d bytes", magic, version, size)
	}
	at := int64(sectorBytes)
	for range count {
		if _, err := l.f.ReadAt(b, at); err != nil {
			return err
		}
		flags, data := le.Uint64(b[16:]), int64(le.Uint64(b[24:]))
		e := Entry{Begin: int64(le.Uint64(b)) * sectorBytes, Bytes: int64(le.Uint64(b[8:])) * sectorBytes, at: at + sectorBytes,
			Flush: flags&logFlush != 0, FUA: flags&logFUA != 0, Discard: flags&logDiscard != 0}
		at += sectorBytes
		if flags&logMark != 0 {
			e.Mark = string(b[32 : 32+min(data, sectorBytes-32)])
		} else if !e.Discard {
			at += e.Bytes
		}
		l.Entries = append(l.Entries, e)
	}
	return nil
}

// Replay is the disk as it was at some entry of the log, to be had as a device.
type Replay struct {
	d      *Disk
	log    *Log
	golden *os.File
	next   int
}

// Replay begins with the disk as it was before the log.
func (d *Disk) Replay(l *Log) *Replay {
	d.Helper()
	f, err := os.OpenFile(d.golden, os.O_RDWR, 0)
	d.check(err)
	d.Cleanup(func() { f.Close() })
	return &Replay{d: d, log: l, golden: f}
}

// To goes on until n entries are done.
func (r *Replay) To(n int) {
	r.d.Helper()
	for ; r.next < n; r.next++ {
		r.d.check(r.log.apply(r.golden, r.log.Entries[r.next]))
	}
}

func (l *Log) apply(disk io.WriterAt, e Entry) error {
	const most = 1 << 20
	for at := int64(0); e.Mark == "" && at < e.Bytes; at += most {
		b := make([]byte, min(most, e.Bytes-at))
		if !e.Discard {
			if _, err := l.f.ReadAt(b, e.at+at); err != nil {
				return err
			}
		}
		if _, err := disk.WriteAt(b, e.Begin+at); err != nil {
			return err
		}
	}
	return nil
}

// Cut is the disk after a power cut here, as a device to be written to: what is written to
// it is lost with Drop. Of later entries those are on it, too, that also names.
func (r *Replay) Cut(name string, also []int) {
	d := r.d
	d.Helper()
	base, scratch := d.attach(d.golden), d.attach(d.file("cow", 512<<20))
	node := d.device(name, dm.Target{Length: uint64(d.bytes / sectorBytes), Type: "snapshot", Params: base.number + " " + scratch.number + " N 8"}, d.Drop)
	base.Close()
	scratch.Close()
	if len(also) == 0 {
		return
	}
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	d.check(err)
	defer f.Close()
	for _, i := range also {
		d.check(r.log.apply(f, r.log.Entries[i]))
	}
}
