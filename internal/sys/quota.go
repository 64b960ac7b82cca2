package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ProjectQuota is the limit and the use of one project id.
type ProjectQuota struct {
	Bytes  int64 // hard limit; 0 means none. Rounded up to 512 on setting.
	Inodes int64 // hard limit; 0 means none
	// What the project uses now; ignored by SetProjectQuota.
	UsedBytes, UsedInodes int64
}

// fsDiskQuota is struct fs_disk_quota of include/uapi/linux/dqblk_xfs.h. The
// kernel's quota layer (fs/quota/quota.c: quota_setxquota) serves it for ext4
// as for xfs, so that one interface does for both.
type fsDiskQuota struct {
	Version                         int8
	Flags                           int8
	Fieldmask                       uint16
	ID                              uint32
	BlkHardlimit, BlkSoftlimit      uint64 // of 512 bytes
	InoHardlimit, InoSoftlimit      uint64
	Bcount, Icount                  uint64
	Itimer, Btimer                  int32
	Iwarns, Bwarns                  uint16
	ItimerHi, BtimerHi, RtbtimerHi  int8
	_                               int8
	RtbHardlimit, RtbSoftlimit, Rtb uint64
	Rtbtimer                        int32
	Rtbwarns                        uint16
	_                               int16
	_                               [8]byte
}

// Constants of include/uapi/linux/dqblk_xfs.h and quota.h.
const (
	fsDquotVersion = 1
	fsProjQuota    = 2
	fsDqBsoft      = 1 << 2
	fsDqBhard      = 1 << 3
	fsDqIsoft      = 1 << 0
	fsDqIhard      = 1 << 1
	qXGetquota     = 'X'<<8 + 3
	qXSetqlim      = 'X'<<8 + 4
	prjquota       = 2
)

// SetProjectQuota bounds what files of project id may use on the file system
// that f is on. ENOSYS before kernel 5.14 or on a file system without quota,
// ESRCH where it is mounted without prjquota.
func (f *Fd) SetProjectQuota(id uint32, q ProjectQuota) error {
	d := fsDiskQuota{
		Version: fsDquotVersion, Flags: fsProjQuota, ID: id,
		Fieldmask:    fsDqBsoft | fsDqBhard | fsDqIsoft | fsDqIhard,
		BlkHardlimit: uint64(q.Bytes+511) / 512,
		InoHardlimit: uint64(q.Inodes),
	}
	return f.err("quotactl Q_XSETQLIM", "", f.quotactl(qXSetqlim, id, unsafe.Pointer(&d)))
}

// ProjectQuota reads limit and use of a project id; ENOENT if it has neither.
func (f *Fd) ProjectQuota(id uint32) (ProjectQuota, error) {
	var d fsDiskQuota
	if err := f.quotactl(qXGetquota, id, unsafe.Pointer(&d)); err != nil {
		return ProjectQuota{}, f.err("quotactl Q_XGETQUOTA", "", err)
	}
	return ProjectQuota{
		Bytes: int64(d.BlkHardlimit) * 512, Inodes: int64(d.InoHardlimit),
		UsedBytes: int64(d.Bcount) * 512, UsedInodes: int64(d.Icount),
	}, nil
}

// quotactl is quotactl_fd(2), which names the file system by any file on it:
// no search for a block device.
func (f *Fd) quotactl(cmd int, id uint32, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, uintptr(f.n), uintptr(cmd<<8|prjquota), uintptr(id), uintptr(arg), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
