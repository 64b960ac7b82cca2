package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// serve mounts, says so to ready, and returns when the mount is gone.
func serve(c *commandLine, stderr io.Writer, ready *readiness) error {
	_ = sys.SetName(name)
	debug.SetGCPercent(gcPercent)
	slack := make([]byte, slackSize)
	defer runtime.KeepAlive(slack)
	runtime.GOMAXPROCS(max(processors, runtime.NumCPU()))
	log, err := openLog(c.options.log, stderr)
	if err != nil {
		return err
	}
	defer log.Close()
	target, err := absolute(c.target)
	if err != nil {
		return err
	}
	srv := server.New(serverOptions(c, log))
	config := c.options.union
	config.ReadOnly = config.ReadOnly || c.options.mount.readOnly()
	config.Atime, config.NoDirAtime = c.options.mount.atime()
	config.Log, config.Invalidate = log.printf, srv.Invalidate
	u, err := union.Open(context.Background(), config)
	if err != nil {
		return err
	}
	dev, err := server.Mount(target, mountOptions(c))
	if err != nil {
		return errors.Join(err, u.Close())
	}
	stop := handleSignals(srv, u, target, log)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(u, dev) }()
	select {
	case err = <-served:
	case <-srv.Ready():
		if ready != nil {
			_ = os.Chdir("/") // a daemon keeps no file system busy
		}
		ready.tell(up)
		err = <-served
	}
	return errors.Join(err, u.Close())
}

// The heap may grow by a third of what lives, and of slack, before it is searched
// for what does not: slack is memory that nobody touches, so none for the kernel.
// Without it the search begins at 2 MiB and comes back each time the nodes of a tree
// that is being read have grown by half, which was a quarter of a cold walk's cost.
const (
	gcPercent = 33
	slackSize = 24 << 20
)

// processors is how many goroutines may run at a time. A thread that waits for a
// request counts as one for as long as the runtime does not look closer, and where
// more are allowed than wait it seldom does: that is half of what a small request
// costs.
const processors = 8

func absolute(target string) (string, error) {
	if _, ok := inherited(target); ok {
		return target, nil
	}
	path, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

func serverOptions(c *commandLine, log *logger) server.Options {
	o := &c.options
	s := server.Options{
		Timeout: o.timeout, Writeback: o.writeback && o.maxThreads != 1, ReadOnly: o.mount.readOnly() || !o.upper,
		Export: o.union.NFSExport, NoACL: o.union.NoACL || o.union.Permissions != union.PermissionsInode, NoXattrs: o.noXattrs, NoFsync: !o.fsync,
		MaxThreads: o.maxThreads, MaxIdle: o.maxIdle, Debug: c.debug, Log: log.printf,
	}
	// Modes that are kept in an xattr no write through the file below takes setuid bits from.
	if o.union.Permissions == union.PermissionsInode && (o.passthroughSet || mayPassthrough()) {
		s.Passthrough = o.passthrough
	}
	if x, err := sys.StatfsPath(o.union.Upper); err == nil && (x.Type == sys.OVERLAYFS_SUPER_MAGIC || x.Type == sys.FUSE_SUPER_MAGIC) {
		s.StackDepth = 2
	}
	return s
}

// mayPassthrough reports whether the kernel would let us register files: it
// wants CAP_SYS_ADMIN in the first user namespace.
func mayPassthrough() bool {
	if !sys.InFirstUserNS() {
		return false
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	const sysAdmin = 21
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			return err == nil && caps&(1<<sysAdmin) != 0
		}
	}
	return false
}

func mountOptions(c *commandLine) server.MountOptions {
	m, root := &c.options.mount, os.Geteuid() == 0
	o := server.MountOptions{Source: m.fsname, Type: m.subtype, Flags: m.flags(root), AllowOther: m.allowOther || root,
		Permissions: true, Extra: m.extra}
	if o.Source == "" {
		o.Source = c.source
	}
	if o.Source == "" {
		o.Source = name
	}
	if o.Type == "" {
		o.Type = name
	}
	if !c.options.upper {
		o.Flags |= sys.MS_RDONLY
	}
	if !sys.InFirstUserNS() {
		// SELinux takes none there for FUSE (security/selinux/hooks.c:
		// selinux_set_mnt_opts), and an engine gives one all the same.
		o.Extra = nil
	}
	return o
}

// handleSignals unmounts when asked to end, and prints counts.
func handleSignals(srv *server.Server, u *union.FS, target string, log *logger) (stop func()) {
	signals := make(chan os.Signal, 4)
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1)
	go func() {
		for sig := range signals {
			if sig == syscall.SIGUSR1 {
				log.printf("%v, %v", u.Counts(), srv.Counts())
				continue
			}
			if _, ok := inherited(target); ok {
				os.Exit(0) // it is for who mounted it to unmount
			}
			if err := server.Unmount(target); err != nil {
				log.printf("%v", err)
				os.Exit(1)
			}
		}
	}()
	return func() { signal.Stop(signals); close(signals) }
}

// logger writes lines.
type logger struct {
	mu   sync.Mutex
	w    io.Writer
	file *os.File
}

func openLog(path string, stderr io.Writer) (*logger, error) {
	if path == "" {
		return &logger{w: stderr}, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil { // a daemon has no other place where a crash could leave its stacks
		err = debug.SetCrashOutput(f, debug.CrashOptions{})
	}
	return &logger{w: f, file: f}, err
}

func (l *logger) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		format = time.Now().Format(time.RFC3339) + " " + format
	}
	fmt.Fprintf(l.w, name+": "+format+"\n", args...)
}

// Close closes the file, if it is one.
func (l *logger) Close() error { return l.file.Close() }
