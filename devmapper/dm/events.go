package dm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// Events waits for events of any device of the machine (kernel 4.14). It has one
// owner, who closes it.
type Events struct {
	control *Control
	file    *os.File // the same descriptor's twin, known to the runtime's poller
}

// Watch begins to watch: an event from now on ends a Wait.
func Watch() (*Events, error) {
	fd, err := sys.Open(controlNode, sys.O_RDWR|sys.O_NONBLOCK, 0)
	if err != nil {
		return nil, openError(err)
	}
	twin, err := fd.Dup()
	if err != nil {
		fd.Close()
		return nil, err
	}
	e := &Events{control: &Control{fd: fd}, file: twin.File()}
	if err := e.arm(); err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

func (e *Events) arm() error {
	_, _, err := e.control.call(cmdDevArmPoll, header{}, nil)
	return err
}

// Wait returns after an event, or with ctx's error. Which device's it was the event
// counters in Info tell; one that comes while the caller looks ends the next Wait.
func (e *Events) Wait(ctx context.Context) error {
	raw, err := e.file.SyscallConn()
	if err != nil {
		return err
	}
	if err := e.file.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("dm: events: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = e.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var pollErr error
	err = raw.Read(func(fd uintptr) (done bool) {
		done, pollErr = e.control.fd.Readable()
		return done || pollErr != nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := errors.Join(err, pollErr); err != nil {
		return fmt.Errorf("dm: events: %w", err)
	}
	return e.arm()
}

// Close ends the watch.
func (e *Events) Close() error { return errors.Join(e.file.Close(), e.control.Close()) }
