package server

import (
	"fmt"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	kernelVersion = 7
	minMinor      = 31 // Linux 5.4
	maxMinor      = 45 // Linux 6.18

	maxWrite = 1 << 20
	pageSize = 4096
)

// always is what every mount asks of the kernel.
const always = fuse.CAP_ASYNC_READ | fuse.CAP_ATOMIC_O_TRUNC | fuse.CAP_BIG_WRITES | fuse.CAP_DONT_MASK | fuse.CAP_IOCTL_DIR |
	fuse.CAP_READDIRPLUS | fuse.CAP_ASYNC_DIO | fuse.CAP_PARALLEL_DIROPS | fuse.CAP_MAX_PAGES |
	fuse.CAP_CACHE_SYMLINKS | fuse.CAP_EXPLICIT_INVAL_DATA | fuse.CAP_HANDLE_KILLPRIV_V2 | fuse.CAP_SETXATTR_EXT |
	fuse.CAP_INIT_EXT | fuse.CAP_ALLOW_IDMAP

// wanted is what this mount asks of a kernel that offers so much.
func (s *Server) wanted(offered uint64) uint64 {
	flags := uint64(always)
	if !s.o.NoACL {
		flags |= fuse.CAP_POSIX_ACL
	}
	switch {
	case s.o.Passthrough != PassthroughOff && offered&fuse.CAP_PASSTHROUGH != 0:
		flags |= fuse.CAP_PASSTHROUGH
	case s.o.Writeback:
		flags |= fuse.CAP_WRITEBACK_CACHE
	}
	// Without a table of handles on disk a node that the kernel forgot is not
	// found by its number again; the kernel's overlayfs makes no handles then.
	if s.o.Export {
		flags |= fuse.CAP_EXPORT_SUPPORT
	} else {
		flags |= fuse.CAP_NO_EXPORT_SUPPORT
	}
	return flags
}

// init answers INIT; go-fuse would not pass on all that wanted has.
func (s *Server) init(r *request) (int, fuse.Status) {
	var in fuse.InitIn // a short one comes from an old kernel
	copy(sys.Bytes(&in), r.in)
	if in.Major != kernelVersion || in.Minor < minMinor {
		s.fail(fmt.Errorf("the kernel speaks FUSE %d.%d; 7.%d (Linux 5.4) or a newer 7 is needed", in.Major, in.Minor, minMinor))
		return 0, fuse.Status(syscall.EPROTO)
	}
	offered := uint64(in.Flags)
	if offered&fuse.CAP_INIT_EXT != 0 {
		offered |= uint64(in.Flags2) << 32
	}
	agreed := offered & s.wanted(offered)
	out := reply[fuse.InitOut](r)
	out.Major, out.Minor = kernelVersion, min(in.Minor, maxMinor)
	out.MaxReadAhead = in.MaxReadAhead
	out.Flags, out.Flags2 = uint32(agreed), uint32(agreed>>32)
	out.MaxBackground = uint16(s.o.MaxBackground)
	out.CongestionThreshold = uint16(s.o.MaxBackground * 3 / 4)
	out.MaxWrite = maxWrite
	out.MaxPages = maxWrite / pageSize
	out.TimeGran = 1
	if agreed&fuse.CAP_PASSTHROUGH != 0 {
		out.MaxStackDepth = uint32(s.o.StackDepth)
	}
	s.passthrough = agreed&fuse.CAP_PASSTHROUGH != 0
	s.writeback = agreed&fuse.CAP_WRITEBACK_CACHE != 0
	s.setxattrExt = agreed&fuse.CAP_SETXATTR_EXT != 0
	if s.o.Debug {
		s.logf("INIT 7.%d: offered %#x, agreed %#x", in.Minor, offered, agreed)
	}
	s.readyOnce.Do(func() { close(s.ready) })
	return sys.SizeOf[fuse.InitOut](), fuse.OK
}
