package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/internal/socket"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
	"github.com/layerctl/layerctl/snapshot/service"
)

// daemon is the running service. What a reload changes is set by the goroutine of
// serve alone.
type daemon struct {
	flags *flags
	c     *config
	level *slog.LevelVar
	log   *slog.Logger

	activated  map[string][]net.Listener
	store      *snapshot.Store
	containerd *service.Containerd // nil without a diff service
	differ     *service.Differ     // nil without a diff service
	metrics    *metrics            // nil where nobody looks
	servers    []*served
	garbage    *garbage
}

// served is a socket with what serves it.
type served struct {
	name   string // "layerd", or the view that it is for
	server *service.Server
	l      net.Listener
}

// serve runs the service until a signal ends it.
func serve(ctx context.Context, f *flags) (err error) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	d := &daemon{flags: f, level: &slog.LevelVar{}}
	if d.activated, err = socket.Activated(); err != nil {
		return err
	}
	if d.c, err = f.settings(); err != nil {
		return err
	}
	d.log = newLog(d.c.Log, d.level)
	if err := d.start(ctx); err != nil {
		return errors.Join(err, d.stop())
	}
	failed := make(chan error, len(d.servers))
	for _, s := range d.servers {
		go func() { failed <- s.server.Serve(s.l) }()
		d.log.Info("serving", "socket", s.l.Addr().String(), "name", s.name)
	}
	socket.Notify("READY=1")
	d.garbage.start()
	err = d.wait(signals, failed)
	socket.Notify("STOPPING=1")
	return errors.Join(err, d.stop())
}

func newLog(c logConfig, level *slog.LevelVar) *slog.Logger {
	level.Set(c.Level)
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}

// wait waits for a reason to end.
func (d *daemon) wait(signals <-chan os.Signal, failed <-chan error) error {
	for {
		select {
		case s := <-signals:
			if s != syscall.SIGHUP {
				d.log.Info("stopping", "signal", s.String())
				return nil
			}
			d.reload()
		case err := <-failed:
			return fmt.Errorf("a socket ended: %w", err)
		}
	}
}

// start opens everything. After an error stop closes what is open.
func (d *daemon) start(ctx context.Context) (err error) {
	if d.store, err = layerctl.Open(ctx, d.c.Root, layerctl.Options{
		Volatile: d.c.Volatile, DriverOptions: d.c.DriverOpt,
		Log: func(m string) { d.log.Warn(m) },
	}); err != nil {
		return err
	}
	for _, f := range d.store.Recovered() {
		d.log.Warn("recovered", "finding", fmt.Sprint(f))
	}
	d.garbage = newGarbage(d.store, d.log, time.Duration(d.c.GC))
	if d.c.Metrics.Address != "" {
		if d.metrics, err = newMetrics(d.c.Metrics.Address, d.store, d.log); err != nil {
			return err
		}
	}
	if d.c.Diff.Enabled {
		if err := d.makeDiffer(); err != nil {
			return err
		}
	}
	views, err := d.views()
	if err != nil {
		return err
	}
	return d.listen(views)
}

// views are handles of the store's views. Their drivers are opened when a call
// needs one: one that does not work here says so then, every time, and why.
func (d *daemon) views() (service.Views, error) {
	views := service.Views{}
	for name, v := range d.c.Views {
		s, err := d.store.View(name, v.Driver)
		if err != nil {
			return nil, err
		}
		views[name] = s
	}
	return views, nil
}

func (d *daemon) makeDiffer() (err error) {
	if d.containerd, err = service.Connect(d.c.Diff.Containerd, d.c.serviceLimits()); err != nil {
		return err
	}
	o := service.DifferOptions{
		Store: d.store, Content: d.containerd.Content(), Leases: d.containerd.Leases(), Lease: time.Duration(d.c.Diff.Lease),
		Limits:            layer.Limits{Window: d.c.Limits.Window, Entries: d.c.Limits.Entries, Size: d.c.Limits.Size},
		SkipWhiteoutNames: d.c.Diff.SkipWhiteouts,
		Log:               d.log,
	}
	for _, v := range d.c.Views {
		o.Rebase = o.Rebase || v.Rebase
	}
	if d.metrics != nil {
		o.Transferred = d.metrics.transferred
	}
	d.differ = service.NewDiffer(o)
	return nil
}

func (c *config) serviceLimits() service.Limits {
	return service.Limits{Message: c.Limits.Message, Streams: c.Limits.Streams, Labels: c.Limits.Labels, Label: c.Limits.Label}
}

// listen makes a server for each socket.
func (d *daemon) listen(views service.Views) error {
	if err := d.serveAt("layerd", "", d.c.Listen.Address, views); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(d.c.Views)) {
		if v := d.c.Views[name]; v.Socket != "" || len(d.activated[name]) > 0 {
			if err := d.serveAt(name, name, v.Socket, views); err != nil {
				return err
			}
		}
	}
	for name, ls := range d.activated {
		if len(ls) > 0 {
			return fmt.Errorf("systemd handed over %d sockets named %q: one is named layerd, or a view: %w", len(ls), name, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// serveAt makes the server of one socket: systemd's of that name, else one of our
// own.
func (d *daemon) serveAt(name, only, address string, views service.Views) error {
	o := service.Options{
		Views: views, Only: only, Differ: d.differ, Limits: d.c.serviceLimits(), Log: d.log,
		Allowed: service.Allowed{UIDs: d.c.Listen.UIDs, GIDs: d.c.Listen.GIDs},
	}
	if d.metrics != nil {
		o.Observe = d.metrics.observe
	}
	server, err := service.New(o)
	if err != nil {
		return err
	}
	l, ok := d.takeActivated(name)
	if !ok {
		if l, err = socket.Listen(address, d.c.Listen.options()); err != nil {
			return err
		}
	}
	d.servers = append(d.servers, &served{name, server, l})
	return nil
}

// takeActivated takes a socket that systemd handed over; one that has no name but
// its unit's is the service's.
func (d *daemon) takeActivated(name string) (net.Listener, bool) {
	for _, n := range []string{name, name + ".socket", "unknown"} {
		if n == "unknown" && name != "layerd" {
			continue
		}
		if ls := d.activated[n]; len(ls) > 0 {
			d.activated[n] = ls[1:]
			return ls[0], true
		}
	}
	return nil, false
}

func (l listenConfig) options() socket.Options {
	return socket.Options{Mode: os.FileMode(l.Mode), UID: l.UID, GID: l.GID, Chown: l.UID >= 0 || l.GID >= 0}
}

// reload takes what may change from the configuration; a wrong one changes
// nothing.
func (d *daemon) reload() {
	c, err := d.flags.settings()
	if err != nil {
		d.log.Error("configuration not reloaded", "error", err)
		return
	}
	d.c.Log.Level, d.c.GC, d.c.Stop = c.Log.Level, c.GC, c.Stop
	d.level.Set(c.Log.Level)
	d.garbage.every(time.Duration(c.GC))
	before, err1 := d.c.text()
	after, err2 := c.text()
	d.log.Info("configuration reloaded", "needs_restart", string(before) != string(after) || err1 != nil || err2 != nil)
}

// stop ends the calls, then closes everything. Mounts stay.
func (d *daemon) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(d.c.Stop))
	defer cancel()
	var drain errgroup.Group
	for _, s := range d.servers {
		drain.Go(func() error {
			err := s.server.Drain(ctx)
			if cerr := s.l.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
				err = errors.Join(err, cerr)
			}
			return err
		})
	}
	err := drain.Wait()
	for _, ls := range d.activated {
		for _, l := range ls {
			l.Close()
		}
	}
	if d.garbage != nil {
		d.garbage.stop()
	}
	if d.metrics != nil {
		err = errors.Join(err, d.metrics.close())
	}
	if d.containerd != nil {
		err = errors.Join(err, d.containerd.Close())
	}
	if d.store != nil {
		cancel()
		err = errors.Join(err, d.store.CloseContext(ctx)) // listings that are not done are made after the next start
	}
	return err
}

// garbage removes the bytes of removed snapshots from time to time.
type garbage struct {
	store    *snapshot.Store
	log      *slog.Logger
	interval time.Duration // the first; every changes it
	changed  chan time.Duration
	cancel   context.CancelFunc
	done     chan struct{} // closed when it has ended; nil if it never began
}

func newGarbage(s *snapshot.Store, log *slog.Logger, interval time.Duration) *garbage {
	return &garbage{store: s, log: log, interval: interval, changed: make(chan time.Duration), cancel: func() {}}
}

func (g *garbage) start() {
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel, g.done = cancel, make(chan struct{})
	go func() {
		defer close(g.done)
		g.run(ctx)
	}()
}

func (g *garbage) run(ctx context.Context) {
	t := time.NewTimer(g.interval)
	defer t.Stop()
	interval := g.interval
	set := func() {
		t.Stop()
		if interval > 0 {
			t.Reset(interval)
		}
	}
	set()
	for {
		select {
		case <-ctx.Done():
			return
		case interval = <-g.changed:
		case <-t.C:
			g.collect(ctx)
		}
		set()
	}
}

func (g *garbage) collect(ctx context.Context) {
	r, err := g.store.GC(ctx)
	switch {
	case err != nil && ctx.Err() == nil:
		g.log.Error("garbage", "error", err)
	case r.Layers > 0 || len(r.Left) > 0:
		var left []string
		for _, b := range r.Left {
			left = append(left, fmt.Sprintf("%s %s: %s", b.Driver, b.ID, b.Why))
		}
		g.log.Info("garbage", "layers", r.Layers, "bytes", r.Bytes, "left", strings.Join(left, "; "))
	}
}

// every changes the interval; 0 is never.
func (g *garbage) every(interval time.Duration) {
	if g.done != nil {
		select {
		case g.changed <- interval:
		case <-g.done:
		}
	}
}

// stop ends it and waits for that.
func (g *garbage) stop() {
	g.cancel()
	if g.done != nil {
		<-g.done
	}
}
