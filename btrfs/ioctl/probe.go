package ioctl

import (
	"errors"
	"os"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// try is a call that changes nothing, and what the kernel answers to it if it
// knows the request.
type try struct {
	feature string
	since   string // the first kernel
	call    func(fd *sys.Fd) error
	knows   []syscall.Errno
}

// refused is an argument that no request takes: flags of all ones.
func refused(name string, request uint32, at int) func(*sys.Fd) error {
	return func(fd *sys.Fd) error {
		b := make([]byte, request>>16&0x3fff)
		le.PutUint64(b[at:], ^uint64(0))
		return fd.Ioctl(name, request, b)
	}
}

// noQgroup is a qgroup that no file system has: of the highest level, without
// number.
const noQgroup = uint64(0xffff) << 48

// noSuchQgroup is what the kernel says of it, with quota off or on.
var noSuchQgroup = []syscall.Errno{syscall.ENOTCONN, syscall.ENOENT, syscall.EINVAL}

// feature reads what btrfs says in sysfs alone; ENOTTY if it does not.
func feature(fd *sys.Fd, name string) (string, error) {
	if _, err := Info(fd); err != nil {
		return "", err
	}
	text, err := os.ReadFile("/sys/fs/btrfs/features/" + name)
	if errors.Is(err, os.ErrNotExist) {
		err = syscall.ENOTTY
	}
	return strings.TrimSpace(string(text)), err
}

func trySimpleQuota(fd *sys.Fd) error {
	_, err := feature(fd, "simple_quota")
	return err
}

func trySendStream2(fd *sys.Fd) error {
	version, err := feature(fd, "send_stream_version")
	if version == "1" {
		err = syscall.ENOTTY
	}
	return err
}

var tries = []try{
	{"SUBVOL_CREATE_V2", "3.0", refused("BTRFS_IOC_SUBVOL_CREATE_V2", BTRFS_IOC_SUBVOL_CREATE_V2, 16), []syscall.Errno{syscall.EOPNOTSUPP, syscall.EINVAL}},
	{"SNAP_CREATE_V2", "3.0", refused("BTRFS_IOC_SNAP_CREATE_V2", BTRFS_IOC_SNAP_CREATE_V2, 16), []syscall.Errno{syscall.EOPNOTSUPP, syscall.EINVAL}},
	{"SNAP_DESTROY_V2", "5.7", refused("BTRFS_IOC_SNAP_DESTROY_V2", BTRFS_IOC_SNAP_DESTROY_V2, 16), []syscall.Errno{syscall.EOPNOTSUPP, syscall.EINVAL}},
	{"GET_SUBVOL_INFO", "4.18", func(fd *sys.Fd) error { _, err := SubvolInfo(fd); return err }, nil},
	{"GET_SUBVOL_ROOTREF", "4.18", func(fd *sys.Fd) error { _, err := Children(fd); return err }, nil},
	{"INO_LOOKUP_USER", "4.18", func(fd *sys.Fd) error { _, _, err := UserPath(fd, Child{ID: 1}); return err }, []syscall.Errno{syscall.ENOENT}},
	{"INO_LOOKUP", "2.6.34", func(fd *sys.Fd) error { _, err := SubvolID(fd); return err }, nil},
	{"TREE_SEARCH_V2", "3.16", func(fd *sys.Fd) error { return first(Search(fd, Query{})) }, nil},
	{"SEND", "3.6", trySend, []syscall.Errno{syscall.EOPNOTSUPP, syscall.EINVAL}},
	{"SPACE_INFO", "2.6.34", func(fd *sys.Fd) error { _, err := SpaceInfo(fd); return err }, nil},
	{"DEV_INFO", "3.2", func(fd *sys.Fd) error { _, err := DeviceInfo(fd, 0); return err }, []syscall.Errno{syscall.ENODEV}},
	{"SUBVOL_SYNC_WAIT", "6.13", waitForNothing, []syscall.Errno{syscall.EINVAL, syscall.ENOENT}},
	{"SUBVOL_GETFLAGS", "2.6.39", func(fd *sys.Fd) error { _, err := ReadOnly(fd); return err }, nil},
	{"SUBVOL_SETFLAGS", "2.6.39", refused("BTRFS_IOC_SUBVOL_SETFLAGS", BTRFS_IOC_SUBVOL_SETFLAGS, 0), []syscall.Errno{syscall.EOPNOTSUPP, syscall.EINVAL}},
	{"WAIT_SYNC", "2.6.37", func(fd *sys.Fd) error { return WaitSync(fd, 1) }, []syscall.Errno{syscall.EINVAL}},
	{"FS_INFO", "3.2", func(fd *sys.Fd) error { _, err := Info(fd); return err }, nil},
	{"QUOTA_CTL", "3.6", refused("BTRFS_IOC_QUOTA_CTL", BTRFS_IOC_QUOTA_CTL, 0), []syscall.Errno{syscall.EINVAL}},
	{"QGROUP_LIMIT", "3.6", func(fd *sys.Fd) error { return limitQgroup(fd, noQgroup, QgroupUsage{}) }, noSuchQgroup},
	{"QGROUP_CREATE", "3.6", func(fd *sys.Fd) error { return DestroyQgroup(fd, noQgroup) }, noSuchQgroup},
	{"simple quotas", "6.7", trySimpleQuota, nil},
	{"SEND stream 2", "6.0", trySendStream2, nil},
	{"quota", "3.6", func(fd *sys.Fd) error {
		m, _, err := Quota(fd)
		if err == nil && m == QuotaOff {
			err = errQuotaOff
		}
		return err
	}, nil},
}

// trySend: the kernel looks at privileges first, then whether the subvolume is
// read-only, both EPERM, then at the flags. Who may search trees may send.
func trySend(fd *sys.Fd) error {
	err := refused("BTRFS_IOC_SEND", BTRFS_IOC_SEND, 32)(fd)
	if errors.Is(err, syscall.EPERM) {
		return first(Search(fd, Query{}))
	}
	return err
}

var errQuotaOff = errors.New("is off; `btrfs quota enable` switches it on, for the whole file system")

func waitForNothing(fd *sys.Fd) error {
	b := make([]byte, 16)
	le.PutUint32(b[8:], ^uint32(0)) // no mode
	return fd.Ioctl("BTRFS_IOC_SUBVOL_SYNC_WAIT", BTRFS_IOC_SUBVOL_SYNC_WAIT, b)
}

func first(items func(func(Item, error) bool)) error {
	for _, err := range items {
		return err
	}
	return nil
}

// Probe tries what the kernel and this process's privileges allow on the file
// system of fd, the root of a subvolume. It changes nothing.
func Probe(fd *sys.Fd) []kprobe.Result {
	var all []kprobe.Result
	for _, t := range tries {
		all = append(all, t.answer(t.call(fd)))
	}
	return all
}

// answer judges what the kernel said.
func (t *try) answer(err error) kprobe.Result {
	r := kprobe.Result{Feature: t.feature, Err: err}
	known := err == nil
	for _, e := range t.knows {
		known = known || errors.Is(err, e)
	}
	switch {
	case known:
		r.Answer, r.Err = kprobe.Yes, nil
	case errors.Is(err, syscall.ENOTTY):
		r.Answer, r.Detail = kprobe.No, "not btrfs, or a kernel before "+t.since
	case errors.Is(err, syscall.EPERM):
		r.Answer, r.Detail = kprobe.No, "needs CAP_SYS_ADMIN outside any user namespace"
	case errors.Is(err, errQuotaOff):
		r.Answer, r.Detail = kprobe.No, err.Error()
	default:
		r.Detail = err.Error()
	}
	return r
}
