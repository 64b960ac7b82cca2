package dm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// Commands, by their number in include/uapi/linux/dm-ioctl.h.
const (
	cmdVersion      = 0
	cmdListDevices  = 2
	cmdDevCreate    = 3
	cmdDevRemove    = 4
	cmdDevRename    = 5
	cmdDevSuspend   = 6
	cmdDevStatus    = 7
	cmdTableLoad    = 9
	cmdTableClear   = 10
	cmdTableDeps    = 11
	cmdTableStatus  = 12
	cmdListVersions = 13
	cmdTargetMsg    = 14
	cmdDevArmPoll   = 16
)

var cmdNames = map[uint32]string{
	cmdVersion: "DM_VERSION", cmdListDevices: "DM_LIST_DEVICES", cmdDevCreate: "DM_DEV_CREATE", cmdDevRemove: "DM_DEV_REMOVE",
	cmdDevRename: "DM_DEV_RENAME", cmdDevSuspend: "DM_DEV_SUSPEND", cmdDevStatus: "DM_DEV_STATUS", cmdTableLoad: "DM_TABLE_LOAD",
	cmdTableClear: "DM_TABLE_CLEAR", cmdTableDeps: "DM_TABLE_DEPS", cmdTableStatus: "DM_TABLE_STATUS",
	cmdListVersions: "DM_LIST_VERSIONS", cmdTargetMsg: "DM_TARGET_MSG", cmdDevArmPoll: "DM_DEV_ARM_POLL",
}

// Flags, with the kernel's spelling.
const (
	DM_READONLY_FLAG             = 1 << 0
	DM_SUSPEND_FLAG              = 1 << 1
	DM_STATUS_TABLE_FLAG         = 1 << 4
	DM_ACTIVE_PRESENT_FLAG       = 1 << 5
	DM_INACTIVE_PRESENT_FLAG     = 1 << 6
	DM_BUFFER_FULL_FLAG          = 1 << 8
	DM_SKIP_LOCKFS_FLAG          = 1 << 10
	DM_NOFLUSH_FLAG              = 1 << 11
	DM_QUERY_INACTIVE_TABLE_FLAG = 1 << 12
	DM_UEVENT_GENERATED_FLAG     = 1 << 13
	DM_DATA_OUT_FLAG             = 1 << 16
	DM_DEFERRED_REMOVE           = 1 << 17
)

const (
	controlNode = "/dev/mapper/control"
	ioctlBase   = 0xc138fd00 // _IOWR(0xfd, 0, struct dm_ioctl), whose size is 312

	// What the header holds at most, with the NUL.
	maxName, maxUUID, maxType = 128, 129, 16

	// The version that is asked for: the kernel refuses another major, and any
	// minor above its own. 4.27 has deferred removal and answers of messages.
	wantMajor, wantMinor = 4, 27

	firstBuffer = 16 << 10
	mostBuffer  = 16 << 20
)

// Version is that of the interface, or of a target.
type Version struct{ Major, Minor, Patch uint32 }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Control is the open control device. It has one owner, who closes it.
type Control struct {
	fd      *sys.Fd
	version Version // immutable
	cookie  *Cookie // nil without udev
}

// Open opens the control device, makes its node if the kernel has device-mapper
// and nobody has made it, and compares versions.
func Open() (*Control, error) {
	fd, err := sys.Open(controlNode, sys.O_RDWR, 0)
	if errors.Is(err, syscall.ENOENT) {
		if err = makeControl(); err == nil {
			fd, err = sys.Open(controlNode, sys.O_RDWR, 0)
		}
	}
	if err != nil {
		return nil, openError(err)
	}
	c := &Control{fd: fd}
	h, _, err := c.call(cmdVersion, header{}, nil)
	if err != nil {
		fd.Close()
		return nil, err
	}
	c.version = h.version
	return c, nil
}

func openError(err error) error {
	switch {
	case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("dm: the kernel has no device-mapper (CONFIG_BLK_DEV_DM, module dm_mod): %w: %w", errdefs.ErrNotImplemented, err)
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return fmt.Errorf("dm: %w: %w", errdefs.ErrPermissionDenied, err)
	}
	return fmt.Errorf("dm: %w", err)
}

// makeControl makes the node with the minor that /proc/misc tells.
func makeControl() error {
	b, err := os.ReadFile("/proc/misc")
	if err != nil {
		return err
	}
	minor, ok := miscMinor(string(b))
	if !ok {
		return fmt.Errorf("/proc/misc does not name device-mapper: %w", syscall.ENODEV)
	}
	const miscMajor = 10
	return makeNode(controlNode, sys.S_IFCHR|0o600, miscMajor, minor)
}

func miscMinor(misc string) (minor uint32, ok bool) {
	for line := range strings.Lines(misc) {
		if n, err := fmt.Sscanf(line, "%d device-mapper\n", &minor); n == 1 && err == nil {
			return minor, true
		}
	}
	return 0, false
}

// Close closes the control device; the devices stay.
func (c *Control) Close() error { return c.fd.Close() }

// Version is the kernel's version of the interface.
func (c *Control) Version() Version { return c.version }

// call performs one command, with a larger buffer until the answer fits. data is
// what follows the header.
func (c *Control) call(cmd uint32, h header, data []byte) (header, []byte, error) {
	if err := h.valid(); err != nil {
		return header{}, nil, callError(cmd, h.object(), err)
	}
	for size := max(firstBuffer, headerSize+len(data)); ; size *= 2 {
		b := make([]byte, size)
		h.encode(b)
		copy(b[headerSize:], data)
		if err := c.fd.Ioctl(cmdNames[cmd], ioctlBase|cmd, b); err != nil {
			return header{}, nil, callError(cmd, h.object(), err)
		}
		answer, out, err := decode(b)
		if err != nil {
			return header{}, nil, callError(cmd, h.object(), err)
		}
		if answer.flags&DM_BUFFER_FULL_FLAG == 0 {
			return answer, out, nil
		}
		if size >= mostBuffer {
			return header{}, nil, callError(cmd, h.object(), fmt.Errorf("the answer is over %d bytes: %w", mostBuffer, syscall.E2BIG))
		}
	}
}

func callError(cmd uint32, object string, err error) error {
	var sentinel error
	switch {
	case errors.Is(err, syscall.ENXIO):
		sentinel = errdefs.ErrNotFound
	case errors.Is(err, syscall.EBUSY) && (cmd == cmdDevCreate || cmd == cmdDevRename):
		sentinel = errdefs.ErrAlreadyExists
	case errors.Is(err, syscall.EBUSY):
		sentinel = errdefs.ErrFailedPrecondition
	case errors.Is(err, syscall.ENOTTY):
		sentinel = errdefs.ErrNotImplemented
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		sentinel = errdefs.ErrPermissionDenied
	case errors.Is(err, errBadName):
		sentinel = errdefs.ErrInvalidArgument
	default:
		return fmt.Errorf("dm: %s %s: %w", cmdNames[cmd], object, err)
	}
	return fmt.Errorf("dm: %s %s: %w: %w", cmdNames[cmd], object, sentinel, err)
}

// text is the string that b begins with, up to its NUL; false without one.
func text(b []byte) (string, bool) {
	s, _, ok := bytes.Cut(b, []byte{0})
	return string(s), ok
}
