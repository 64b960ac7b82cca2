package ioctl

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// Requests of include/uapi/linux/btrfs.h.
const (
	BTRFS_IOC_QUOTA_CTL         = 0xc0109428 // _IOWR 40, struct btrfs_ioctl_quota_ctl_args
	BTRFS_IOC_QGROUP_CREATE     = 0x4010942a // _IOW 42, struct btrfs_ioctl_qgroup_create_args
	BTRFS_IOC_QGROUP_LIMIT      = 0x8030942b // _IOR 43, struct btrfs_ioctl_qgroup_limit_args
	BTRFS_IOC_QUOTA_RESCAN_WAIT = 0x942e     // _IO 46

	BTRFS_QUOTA_CTL_ENABLE              = 1
	BTRFS_QUOTA_CTL_DISABLE             = 2
	BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA = 4 // Linux 6.7

	BTRFS_QGROUP_LIMIT_MAX_RFER = 1 << 0
	BTRFS_QGROUP_LIMIT_MAX_EXCL = 1 << 1

	BTRFS_QGROUP_STATUS_FLAG_RESCAN       = 1 << 1
	BTRFS_QGROUP_STATUS_FLAG_INCONSISTENT = 1 << 2
	BTRFS_QGROUP_STATUS_FLAG_SIMPLE_MODE  = 1 << 3
)

// QuotaMode is how a file system counts what subvolumes use.
type QuotaMode int

// The modes.
const (
	QuotaOff    QuotaMode = iota
	QuotaFull             // qgroups: exclusive and shared, by back references
	QuotaSimple           // simple quotas: to whoever wrote it
)

func (m QuotaMode) String() string { return [...]string{"off", "qgroups", "simple quotas"}[m] }

// SetQuota switches accounting of the whole file system.
func SetQuota(fd *sys.Fd, m QuotaMode) error {
	b := make([]byte, 16) // u64 cmd, u64 status
	le.PutUint64(b, [...]uint64{BTRFS_QUOTA_CTL_DISABLE, BTRFS_QUOTA_CTL_ENABLE, BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA}[m])
	return fd.Ioctl("BTRFS_IOC_QUOTA_CTL", BTRFS_IOC_QUOTA_CTL, b)
}

// WaitQuota waits for the scan that counts what was there before.
func WaitQuota(fd *sys.Fd) error {
	return fd.Ioctl("BTRFS_IOC_QUOTA_RESCAN_WAIT", BTRFS_IOC_QUOTA_RESCAN_WAIT, nil)
}

// Quota tells the mode, by the quota tree's status item, and whether the figures
// are right: they are not while a scan is on or due.
func Quota(fd *sys.Fd) (m QuotaMode, right bool, err error) {
	key := Key{Type: BTRFS_QGROUP_STATUS_KEY}
	for i, err := range Search(fd, Query{Tree: BTRFS_QUOTA_TREE_OBJECTID, Min: key, Max: key}) {
		if isErrno(err, syscall.ENOENT) {
			return QuotaOff, false, nil
		}
		if err != nil {
			return QuotaOff, false, err
		}
		return decodeQuotaStatus(i.Data)
	}
	return QuotaOff, false, nil
}

// decodeQuotaStatus reads struct btrfs_qgroup_status_item: u64 version,
// generation, flags, rescan.
func decodeQuotaStatus(b []byte) (m QuotaMode, right bool, err error) {
	if len(b) < 32 {
		return QuotaOff, false, short("btrfs_qgroup_status_item", b)
	}
	flags := le.Uint64(b[16:])
	m = QuotaFull
	if flags&BTRFS_QGROUP_STATUS_FLAG_SIMPLE_MODE != 0 {
		m = QuotaSimple
	}
	return m, flags&(BTRFS_QGROUP_STATUS_FLAG_RESCAN|BTRFS_QGROUP_STATUS_FLAG_INCONSISTENT) == 0, nil
}

// Limit bounds what the qgroup of the subvolume fd may count; 0 is no bound. A snapshot
// has its source's bounds. ENOTCONN while quota is off.
func Limit(subvol *sys.Fd, most QgroupUsage) error { return limitQgroup(subvol, 0, most) }

// limitQgroup limits a qgroup; 0 is that of the subvolume fd is in.
func limitQgroup(fd *sys.Fd, qgroup uint64, most QgroupUsage) error {
	return fd.Ioctl("BTRFS_IOC_QGROUP_LIMIT", BTRFS_IOC_QGROUP_LIMIT, limitArgs(qgroup, most))
}

// limitArgs is struct btrfs_ioctl_qgroup_limit_args: u64 qgroupid, flags, max_rfer,
// max_excl, rsv_rfer, rsv_excl.
func limitArgs(qgroup uint64, most QgroupUsage) []byte {
	b := make([]byte, 48)
	le.PutUint64(b, qgroup)
	le.PutUint64(b[8:], BTRFS_QGROUP_LIMIT_MAX_RFER|BTRFS_QGROUP_LIMIT_MAX_EXCL)
	le.PutUint64(b[16:], orClear(most.Referenced))
	le.PutUint64(b[24:], orClear(most.Exclusive))
	return b
}

// orClear is what lifts a limit, for 0.
func orClear(bytes uint64) uint64 {
	if bytes == 0 {
		return ^uint64(0) // CLEAR_VALUE
	}
	return bytes
}

// QgroupUsage is what a subvolume's qgroup counts.
type QgroupUsage struct{ Referenced, Exclusive uint64 }

// Qgroup reads what the qgroup of a subvolume counted when the last transaction
// was committed. ENOENT if there is none.
func Qgroup(fd *sys.Fd, subvol uint64) (QgroupUsage, error) {
	key := Key{Type: BTRFS_QGROUP_INFO_KEY, Offset: subvol}
	for i, err := range Search(fd, Query{Tree: BTRFS_QUOTA_TREE_OBJECTID, Min: key, Max: key}) {
		if err != nil {
			return QgroupUsage{}, err
		}
		return decodeQgroup(i.Data)
	}
	return QgroupUsage{}, syscall.ENOENT
}

// decodeQgroup reads struct btrfs_qgroup_info_item: u64 generation, rfer, rfer_cmpr,
// excl, excl_cmpr.
func decodeQgroup(b []byte) (QgroupUsage, error) {
	if len(b) < 40 {
		return QgroupUsage{}, short("btrfs_qgroup_info_item", b)
	}
	return QgroupUsage{Referenced: le.Uint64(b[8:]), Exclusive: le.Uint64(b[24:])}, nil
}

// DestroyQgroup drops the qgroup of a subvolume that is deleted. EBUSY until the
// subvolume's blocks are free (in 6.1's stable series, too), when Linux 6.11 does it
// by itself, but for one that simple quotas still count something for. Qgroups become
// inconsistent (Linux 6.10) if this one counts something yet: right after the blocks
// were freed, say, before the transaction is committed that says so.
func DestroyQgroup(fd *sys.Fd, subvol uint64) error {
	b := make([]byte, 16) // struct btrfs_ioctl_qgroup_create_args: u64 create, u64 qgroupid
	le.PutUint64(b[8:], subvol)
	return fd.Ioctl("BTRFS_IOC_QGROUP_CREATE", BTRFS_IOC_QGROUP_CREATE, b)
}
