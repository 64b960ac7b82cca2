package ioctl

import "github.com/layerctl/layerctl/internal/sys"

// BTRFS_IOC_SEND is _IOW 38, struct btrfs_ioctl_send_args.
const (
	BTRFS_IOC_SEND               = 0x40489426
	BTRFS_SEND_FLAG_NO_FILE_DATA = 1
)

// Send writes to out, a pipe's end, the stream that turns the subvolume with the
// id parent into the subvolume subvol, both read-only; parent 0 is the empty
// tree. noData leaves out what files hold and says only where it changed. It
// returns when all is written, so somebody else has to read. No signal interrupts it:
// the kernel would begin the stream anew in the middle of it, as it still does when the
// whole process is stopped and goes on.
func Send(subvol, out *sys.Fd, parent uint64, noData bool) error {
	var flags uint64
	if noData {
		flags = BTRFS_SEND_FLAG_NO_FILE_DATA
	}
	return sys.Undisturbed(func() error {
		return subvol.Ioctl("BTRFS_IOC_SEND", BTRFS_IOC_SEND, sendArgs(out.Int(), parent, flags))
	})
}

// sendArgs is struct btrfs_ioctl_send_args without clone sources: s64 send_fd,
// u64 clone_sources_count, u64 *clone_sources, u64 parent_root, u64 flags, u32
// version, u8 reserved[28].
func sendArgs(fd int, parent, flags uint64) []byte {
	b := make([]byte, 72)
	le.PutUint64(b, uint64(int64(fd)))
	le.PutUint64(b[24:], parent)
	le.PutUint64(b[32:], flags)
	return b
}
