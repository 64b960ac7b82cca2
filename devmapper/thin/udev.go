package thin

import (
	"context"
	"fmt"
	"time"

	"github.com/layerctl/layerctl/devmapper/dm"
	"github.com/layerctl/layerctl/internal/sys"
)

const (
	// udevPatience bounds the wait for a udev that does not answer.
	udevPatience = 30 * time.Second
	nodePoll     = 5 * time.Millisecond
)

// announced performs a change of which udev hears; Exclusive waits, once it has given the lock
// back, until udev has seen it: one that hangs is nobody else's concern.
func (c *Change) announced(f func(*dm.Control) error) error {
	if !dm.UdevRuns() {
		return f(c.pool.ctl)
	}
	k, err := dm.NewCookie()
	if err != nil {
		return err
	}
	if err = f(c.pool.ctl.With(k)); err != nil {
		_ = k.Wait(context.Background()) // for nothing: it ends the cookie
		return err
	}
	c.waits = append(c.waits, k.Wait)
	return nil
}

// Seen waits until udev has seen what was done so far, for who needs a node before the lock
// is given back.
func (c *Change) Seen(ctx context.Context) (err error) {
	waits := c.waits
	c.waits = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.pool.patience)
	defer cancel()
	for _, wait := range waits { // each ends its cookie
		if waitErr := wait(ctx); err == nil {
			err = waitErr
		}
	}
	return err
}

// node makes the device's node, or waits with the others for the udev that does.
func (c *Change) node(name string) error {
	i, err := c.pool.ctl.Info(name)
	if err != nil {
		return err
	}
	if dm.UdevRuns() {
		c.waits = append(c.waits, func(ctx context.Context) error { return awaitNode(ctx, i) })
		return nil
	}
	_, err = dm.MakeNode(i)
	return err
}

// hasNode reports whether the node of a device is there.
func hasNode(i dm.Info) bool {
	st, err := sys.StatPath(Node(i.Name))
	return err == nil && st.RdevMajor == i.Dev.Major && st.RdevMinor == i.Dev.Minor
}

// awaitNode waits for the node of a device that another process may have just made.
func awaitNode(ctx context.Context, i dm.Info) error {
	for !hasNode(i) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("udev runs and has not made %s: %w", Node(i.Name), ctx.Err())
		case <-time.After(nodePoll):
		}
	}
	return nil
}
