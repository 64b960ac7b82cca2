package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// Factory makes native drivers. It has no options.
func Factory() drivers.Factory {
	return drivers.Factory{
		Name:    Name,
		Summary: "plain copies of whole trees, sharing blocks where the file system can",
		Probe:   Probe,
		Open:    Open,
	}
}

// Probe tries in a scratch directory below dir what the driver can do there. It
// works wherever a directory can be made.
func Probe(ctx context.Context, dir string) drivers.Probe {
	scratch, err := os.MkdirTemp(dir, ".native-probe-")
	if err != nil {
		return drivers.Probe{Works: cannotWrite(err), Reason: err.Error()}
	}
	defer os.RemoveAll(scratch)
	p := drivers.Probe{Works: kprobe.Yes, Features: features(ctx, scratch)}
	p.Reason = "copies of whole trees"
	if has(p.Features, reflink) {
		p.Reason += " that share blocks (reflink)"
	}
	if !has(p.Features, bindMount) {
		p.Reason += "; no mounts without a user namespace"
	}
	return p
}

// cannotWrite: a full disk says nothing about the driver.
func cannotWrite(err error) kprobe.Answer {
	if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM) {
		return kprobe.No
	}
	return kprobe.Unknown
}

// Open opens or makes the storage at c.Root.
func Open(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
	d, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("native: open %s: %w", c.Root, err)
	}
	return d, nil
}

func open(ctx context.Context, c drivers.Config) (*driver, error) {
	if err := drivers.CheckOptions(nil, c.Options); err != nil {
		return nil, err
	}
	root, err := makeRoot(c.Root)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(ctx, root)
	if err != nil {
		return nil, err
	}
	return &driver{root: root, caps: caps}, nil
}

// makeRoot makes what is missing of the root's directories, lasting from the
// start, and returns the root without symlinks.
func makeRoot(path string) (string, error) {
	made, err := makeDir(path)
	if err != nil {
		return "", err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	root, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return "", err
	}
	for _, name := range []string{layersDir, newDir, deletedDir} {
		also, err := makeDir(filepath.Join(root, name))
		if err != nil {
			return "", err
		}
		made = made || also
	}
	if !made { // a read-only file system is good enough
		return root, nil
	}
	f, err := sys.OpenDir(root)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return root, f.Sync()
}

// makeDir makes a directory of mode 0700 that hands no ACL of a directory
// above down to the trees below, and reports whether it was missing.
func makeDir(path string) (made bool, err error) {
	err = os.Mkdir(path, 0o700)
	if errors.Is(err, os.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, inheritNothing(path)
}

func inheritNothing(path string) error {
	f, err := sys.OpenDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, acl := range []string{"system.posix_acl_default", "system.posix_acl_access"} {
		err := f.Removexattr("", acl)
		if err != nil && !errors.Is(err, syscall.ENODATA) && !errors.Is(err, syscall.EOPNOTSUPP) {
			return err
		}
	}
	return f.Chmod(0o700) // without a setgid bit handed down
}
