package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/roots"
	"github.com/layerctl/layerctl/internal/kprobe"
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
	root, err := roots.Make(c.Root)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(ctx, root)
	if err != nil {
		return nil, err
	}
	return &driver{root: root, caps: caps}, nil
}
