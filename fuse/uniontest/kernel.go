package uniontest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// Kernel is the kernel's overlayfs.
func Kernel() *Subject {
	return &Subject{Name: "kernel", Kernel: true, Mount: mountKernel}
}

// kernelMount is a mount of the kernel's overlayfs.
type kernelMount struct{ target string }

func mountKernel(_ context.Context, s Spec, target string) (Mounted, error) {
	if s.LowerDir != "" {
		if err := sys.Mount("overlay", target, "overlay", s.flags(), s.data()); err != nil {
			return nil, err
		}
		return kernelMount{target}, nil
	}
	if err := kernelContext(s, target); err != nil {
		return nil, err
	}
	return kernelMount{target}, nil
}

// kernelContext mounts with the kernel's own view of what is in use: package
// mount refuses more than the kernel does, and asks the kernel several times.
func kernelContext(s Spec, target string) error {
	c, err := sys.Fsopen("overlay")
	if err != nil {
		return err
	}
	defer c.Close()
	if err := configure(c, s); err != nil {
		return said(c, err)
	}
	m, err := c.Mount(s.atimes())
	if err != nil {
		return said(c, err)
	}
	defer m.Close()
	at, err := sys.Open(target, sys.O_PATH, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	return m.MoveTo(at)
}

func configure(c *sys.FsContext, s Spec) error {
	set := func(key string, paths ...string) error {
		for _, p := range paths {
			if err := c.SetString(key, p); err != nil {
				return err
			}
		}
		return nil
	}
	errs := []error{set("source", "overlay"), set("lowerdir+", s.Lowers...), set("datadir+", s.Data...)}
	if s.Upper != "" {
		errs = append(errs, set("upperdir", s.Upper), set("workdir", s.Work))
	}
	for _, o := range s.Options {
		if _, ok := atimes[o]; ok {
			continue // of the mount, not of the file system
		}
		if key, value, ok := strings.Cut(o, "="); ok {
			errs = append(errs, set(key, value))
		} else {
			errs = append(errs, c.SetFlag(o))
		}
	}
	return errors.Join(append(errs, c.Create())...)
}

// said adds what the kernel says about an error.
func said(c *sys.FsContext, err error) error {
	if m := c.Messages(); len(m) > 0 {
		return fmt.Errorf("%w (%s)", err, strings.Join(m, "; "))
	}
	return err
}

// atimes are the options about times of access.
var atimes = map[string]uint64{"noatime": sys.MOUNT_ATTR_NOATIME, "strictatime": sys.MOUNT_ATTR_STRICTATIME,
	"nodiratime": sys.MOUNT_ATTR_NODIRATIME}

func (s Spec) atimes() (attrs uint64) {
	for _, o := range s.Options {
		attrs |= atimes[o]
	}
	return attrs
}

// flags are those of mount(2).
func (s Spec) flags() uintptr {
	if s.option("ro") != "" {
		return sys.MS_RDONLY
	}
	return 0
}

// data is the option string of mount(2) and of fuse-overlayfs, but for "ro".
func (s Spec) data() string {
	lower := s.LowerDir
	if lower == "" {
		var parts []string
		for _, p := range s.Lowers {
			parts = append(parts, mount.EscapeLayer(p))
		}
		lower = strings.Join(parts, ":")
		for _, p := range s.Data {
			lower += "::" + mount.EscapeLayer(p)
		}
	}
	all := []string{"lowerdir=" + lower}
	if s.Upper != "" {
		all = append(all, "upperdir="+mount.EscapeLayer(s.Upper), "workdir="+mount.EscapeLayer(s.Work))
	}
	for _, o := range s.Options {
		if o != "ro" {
			all = append(all, o)
		}
	}
	return strings.Join(all, ",")
}

// Unmount waits for what is just ending.
func (m kernelMount) Unmount() error { return unmount(m.target) }

func (m kernelMount) Kill() bool { return false }

// patience bounds every wait: far more than a loaded machine needs.
const patience = 60 * time.Second

func unmount(target string) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err := sys.Umount(target, 0)
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
		if time.Now().After(end) {
			_ = sys.Umount(target, sys.MNT_DETACH)
			return err
		}
	}
}
