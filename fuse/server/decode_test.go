package server

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// The sizes of include/uapi/linux/fuse.h (7.45), with the header where a request
// has one: go-fuse's types are the kernel's structs.
func TestMessagesHaveTheKernelsSizes(t *testing.T) {
	for name, x := range map[string][2]int{
		"in_header":          {sys.SizeOf[fuse.InHeader](), inHeaderSize},
		"out_header":         {sys.SizeOf[fuse.OutHeader](), outHeaderSize},
		"attr":               {sys.SizeOf[fuse.Attr](), 88},
		"entry_out":          {sys.SizeOf[fuse.EntryOut](), entrySize},
		"attr_out":           {sys.SizeOf[fuse.AttrOut](), 104},
		"open_out":           {sys.SizeOf[fuse.OpenOut](), 16},
		"create_out":         {sys.SizeOf[fuse.CreateOut](), 144},
		"write_out":          {sys.SizeOf[fuse.WriteOut](), 8},
		"statfs_out":         {sys.SizeOf[fuse.StatfsOut](), 80},
		"getxattr_out":       {sys.SizeOf[fuse.GetXAttrOut](), 8},
		"init_out":           {sys.SizeOf[fuse.InitOut](), 64},
		"statx_out":          {sys.SizeOf[fuse.StatxOut](), 288},
		"ioctl_out":          {sys.SizeOf[fuse.IoctlOut](), 16},
		"lseek_out":          {sys.SizeOf[fuse.LseekOut](), 8},
		"copy_range_out":     {sys.SizeOf[fuse.CopyFileRangeOut](), 8},
		"dirent":             {sys.SizeOf[dirent](), direntSize},
		"forget_in":          {sys.SizeOf[fuse.ForgetIn](), 40 + 8},
		"forget_one":         {sys.SizeOf[forgetOne](), 16},
		"batch_forget_in":    {sys.SizeOf[batchForget](), 40 + 8},
		"getattr_in":         {sys.SizeOf[fuse.GetAttrIn](), 40 + 16},
		"setattr_in":         {sys.SizeOf[fuse.SetAttrIn](), 40 + 88},
		"statx_in":           {sys.SizeOf[fuse.StatxIn](), 40 + 24},
		"mknod_in":           {sys.SizeOf[fuse.MknodIn](), 40 + 16},
		"mkdir_in":           {sys.SizeOf[fuse.MkdirIn](), 40 + 8},
		"rename_in":          {sys.SizeOf[oldRename](), 40 + 8},
		"rename2_in":         {sys.SizeOf[fuse.RenameIn](), 40 + 16},
		"link_in":            {sys.SizeOf[fuse.LinkIn](), 40 + 8},
		"open_in":            {sys.SizeOf[fuse.OpenIn](), 40 + 8},
		"create_in":          {sys.SizeOf[fuse.CreateIn](), 40 + 16},
		"read_in":            {sys.SizeOf[fuse.ReadIn](), 40 + 40},
		"write_in":           {sys.SizeOf[fuse.WriteIn](), 40 + 40},
		"release_in":         {sys.SizeOf[fuse.ReleaseIn](), 40 + 24},
		"flush_in":           {sys.SizeOf[fuse.FlushIn](), 40 + 24},
		"fsync_in":           {sys.SizeOf[fuse.FsyncIn](), 40 + 16},
		"fallocate_in":       {sys.SizeOf[fuse.FallocateIn](), 40 + 32},
		"lseek_in":           {sys.SizeOf[fuse.LseekIn](), 40 + 24},
		"copy_range_in":      {sys.SizeOf[fuse.CopyFileRangeIn](), 40 + 56},
		"ioctl_in":           {sys.SizeOf[fuse.IoctlIn](), 40 + 32},
		"getxattr_in":        {sys.SizeOf[fuse.GetXAttrIn](), 40 + 8},
		"setxattr_in, old":   {sys.SizeOf[oldSetxattr](), 40 + 8},
		"setxattr_in":        {sys.SizeOf[fuse.SetXAttrIn](), 40 + 16},
		"init_in":            {sys.SizeOf[fuse.InitIn](), 40 + 64},
		"notify_inval_inode": {sys.SizeOf[fuse.NotifyInvalInodeOut](), 24},
		"notify_inval_entry": {sys.SizeOf[fuse.NotifyInvalEntryOut](), 16},
	} {
		if x[0] != x[1] {
			t.Errorf("fuse_%s has %d bytes, not %d", name, x[0], x[1])
		}
	}
}

func TestDeviceNumbers(t *testing.T) {
	for _, x := range [][2]uint32{{0, 0}, {1, 3}, {8, 255}, {259, 70000}, {4095, 1<<20 - 1}} {
		if major, minor := decodeDev(encodeDev(x[0], x[1])); major != x[0] || minor != x[1] {
			t.Errorf("%v became %d, %d", x, major, minor)
		}
	}
	if got := encodeDev(8, 1); got != 0x801 {
		t.Errorf("8:1 is %#x", got)
	}
}

func TestHandles(t *testing.T) {
	var h handles[int]
	seen := map[uint64]*int{}
	for i := range 3 * handleChunk {
		v := i
		n := h.add(&v)
		if n == 0 || seen[n] != nil {
			t.Fatalf("number %d", n)
		}
		seen[n] = &v
	}
	for n, v := range seen {
		if h.get(n) != v || h.remove(n) != v || h.get(n) != nil || h.remove(n) != nil {
			t.Fatalf("number %d", n)
		}
	}
	if h.count() != 0 || h.get(0) != nil || h.get(1<<40) != nil {
		t.Error("something is left")
	}
}

// message makes a request of a code and what follows its header.
func message(code uint32, node uint64, body []byte) []byte {
	b := make([]byte, inHeaderSize, inHeaderSize+len(body))
	binary.NativeEndian.PutUint32(b[4:], code)
	binary.NativeEndian.PutUint64(b[8:], 7)
	binary.NativeEndian.PutUint64(b[16:], node)
	b = append(b, body...)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	return b
}

// FuzzRequest: no message that anybody could send makes the server panic, or
// answer more than there is room for; every answer is of the message's number.
func FuzzRequest(f *testing.F) {
	dir := f.TempDir()
	for _, d := range []string{"l", "u", "w"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			f.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "l", "f"), []byte("x"), 0o644); err != nil {
		f.Fatal(err)
	}
	s := New(Options{Writeback: true, Log: func(format string, _ ...any) {
		if len(format) > 5 && format[:5] == "panic" {
			panic(format)
		}
	}})
	u, err := union.Open(context.Background(), union.Config{Lowers: []string{filepath.Join(dir, "l")},
		Upper: filepath.Join(dir, "u"), Work: filepath.Join(dir, "w"), Invalidate: s.Invalidate})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.closeAll(); u.Close() })
	s.union = u
	var init fuse.InitIn
	init.Major, init.Minor, init.Flags, init.Flags2 = 7, 45, ^uint32(0), ^uint32(0)
	f.Add(uint32(opInit), uint64(0), sys.Bytes(&init)[inHeaderSize:], false)
	f.Add(uint32(opLookup), uint64(1), []byte("f\x00"), false)
	f.Add(uint32(opOpen), uint64(2), make([]byte, 8), true)
	f.Add(uint32(opOpendir), uint64(1), make([]byte, 8), true)
	f.Add(uint32(opRename2), uint64(1), append(binary.NativeEndian.AppendUint64(nil, 1), "\x00\x00\x00\x00\x00\x00\x00\x00f\x00g\x00"...), false)
	for code := range uint32(opCount) {
		f.Add(code, uint64(1), make([]byte, 100), true)
	}
	r, out := &request{}, make([]byte, room)
	f.Fuzz(func(t *testing.T, code uint32, node uint64, body []byte, short bool) {
		in := message(code, node, body)
		if short {
			in = in[:len(in)-len(body)/2]
		}
		// A request never asks for more than was agreed on.
		n := s.handle(r, in, out)
		if n == 0 {
			return
		}
		h := sys.View[fuse.OutHeader](out)
		if n < outHeaderSize || n > len(out) || int(h.Length) != n || h.Unique != 7 || h.Status > 0 || h.Status < -4095 {
			t.Fatalf("code %d: %d bytes, header %+v", code, n, *h)
		}
	})
}
