package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/fusermount"
	"github.com/layerctl/layerctl/internal/sys"
)

// MountOptions say how a mount is made.
type MountOptions struct {
	Source      string   // what df(1) shows
	Type        string   // the mount's type is "fuse." and this
	Flags       uintptr  // MS_ flags of mount(2)
	AllowOther  bool     // others than the mounting user may enter
	Permissions bool     // the kernel checks modes and ACLs (default_permissions)
	Extra       []string // further options of the kernel's, such as context=
}

// Mount mounts at target and returns the /dev/fuse to serve. A target of the
// form /dev/fd/N was mounted by somebody else, who hands its descriptor on.
// Without the privilege to mount, fusermount3 does it. The kernel answers no
// call on the mount before Serve runs.
func Mount(target string, o MountOptions) (*sys.Fd, error) {
	if n, ok := mounted(target); ok {
		return sys.NewFd(n, target), nil
	}
	root, err := sys.StatPath(target)
	if err != nil {
		return nil, err
	}
	dev, err := sys.Open("/dev/fuse", sys.O_RDWR, 0)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.ENODEV) {
		return nil, fmt.Errorf("%w: the kernel has no FUSE (modprobe fuse)", err)
	}
	if err != nil && os.Geteuid() == 0 {
		return nil, err
	}
	if err == nil {
		options := append([]string{fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d", dev.Int(), root.Type(), os.Geteuid(), os.Getegid())},
			o.options()...)
		err = sys.Mount(o.Source, target, "fuse."+o.Type, o.Flags, strings.Join(options, ","))
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, syscall.EPERM) || os.Geteuid() == 0 {
			return nil, err
		}
	}
	return byFusermount(target, o)
}

// mounted reports whether target names a descriptor.
func mounted(target string) (n int, ok bool) {
	digits, ok := strings.CutPrefix(target, "/dev/fd/")
	if !ok {
		return 0, false
	}
	u, err := strconv.ParseUint(digits, 10, 31)
	return int(u), err == nil
}

func (o *MountOptions) options() []string {
	var list []string
	if o.Permissions {
		list = append(list, "default_permissions")
	}
	if o.AllowOther {
		list = append(list, "allow_other")
	}
	return append(list, o.Extra...)
}

// flagNames are the options by which fusermount3 takes flags of mount(2).
var flagNames = []struct {
	flag uintptr
	on   string
	off  string
}{
	{sys.MS_RDONLY, "ro", "rw"}, {sys.MS_NOSUID, "nosuid", ""}, {sys.MS_NODEV, "nodev", ""}, {sys.MS_NOEXEC, "noexec", "exec"},
	{sys.MS_SYNCHRONOUS, "sync", ""}, {sys.MS_DIRSYNC, "dirsync", ""}, {sys.MS_NOATIME, "noatime", ""},
}

// byFusermount has the set-uid program mount.
func byFusermount(target string, o MountOptions) (*sys.Fd, error) {
	options := append([]string{fusermount.Option("fsname", o.Source), "subtype=" + o.Type}, o.options()...)
	for _, f := range flagNames {
		if o.Flags&f.flag != 0 {
			options = append(options, f.on)
		} else if f.off != "" {
			options = append(options, f.off)
		}
	}
	return fusermount.Mount(context.Background(), target, options)
}

// Unmount takes a mount of ours away from target. Who is still in it stays;
// Serve returns when the last has left.
func Unmount(target string) error {
	err := sys.Umount(target, sys.MNT_DETACH|sys.UMOUNT_NOFOLLOW)
	if errors.Is(err, syscall.EPERM) {
		return fusermount.Unmount(target, true)
	}
	return err
}
