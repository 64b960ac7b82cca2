package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/userns"
)

// enterNamespaces runs this command again inside namespaces and ends with its
// exit status. Where there are none to be had, a verb that mounts nothing goes
// on without.
func (a *app) enterNamespaces(c userns.Command) error {
	code, err := userns.Run(c)
	if err == nil {
		return exitStatus(code)
	}
	if !errdefs.IsUnavailable(err) {
		return err
	}
	if c.Keep && !a.fuseWorks() {
		return a.noMounts(err)
	}
	if !a.quiet {
		a.note("%v: going on without: owners and device nodes are kept as far as this user may", err)
	}
	return nil
}

// noMounts refuses a mount where nothing can make one for an ordinary user, with
// the reason of either way.
func (a *app) noMounts(err error) error {
	return hintf(fmt.Errorf("mount: neither user namespaces nor FUSE work here: %w; FUSE: %s", err, a.probeFUSE().Reason), allowNamespaces)
}

const allowNamespaces = "allow user namespaces, or run as root"

// fuseWorks reports whether the driver fuse can mount for this user, by way of the
// set-uid fusermount3.
func (a *app) fuseWorks() bool { return a.probeFUSE().Works == kprobe.Yes }

// probeFUSE is what the driver fuse says of this place.
func (a *app) probeFUSE() drivers.Probe {
	for _, f := range layerctl.Drivers().Factories() {
		if f.Name != "fuse" {
			continue
		}
		dir, err := os.MkdirTemp(existing(a.root), ".layerctl-info-")
		if err != nil {
			return drivers.Probe{Reason: err.Error()}
		}
		defer os.RemoveAll(dir)
		return f.Probe(context.Background(), dir)
	}
	return drivers.Probe{Reason: "no driver of that name"}
}

// countMounts counts the store's mounts inside the keeper's namespaces, by a
// run of `mount -q` there.
func (a *app) countMounts(n *userns.Namespaces, _ int) (int, error) {
	out, err := n.Output("--root", a.root, "--quiet", "mount")
	return bytes.Count(out, []byte("\n")), err
}

// countAfterFailure is countMounts for a verb that leaves a mount if it did well.
func (a *app) countAfterFailure(n *userns.Namespaces, status int) (int, error) {
	if status == exitOK {
		return 1, nil
	}
	return a.countMounts(n, status)
}

func (a *app) unshareCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "unshare [--] [COMMAND [ARG]...]", Short: "Run a command where an ordinary user's mounts are seen",
		Long: `Run a command, a shell if none is given, in the namespaces that hold the mounts
of an ordinary user. As root there are none to enter and the command just runs.
The exit code is the command's.`,
		Args:                  cobra.ArbitraryArgs,
		DisableFlagsInUseLine: true,
		RunE:                  func(cmd *cobra.Command, args []string) error { return a.unshare(args) },
	}
	c.Flags().SetInterspersed(false) // the command's own flags are not ours
	return c
}

func (a *app) unshare(args []string) error {
	if len(args) == 0 {
		shell := os.Getenv("SHELL")
		if shell == "" {
			shell = "/bin/sh"
		}
		args = []string{shell}
	}
	path := args[0]
	if !strings.Contains(path, "/") { // a path may be there inside only
		var err error
		if path, err = exec.LookPath(path); err != nil && !errors.Is(err, exec.ErrDot) {
			a.note("unshare: %v", err)
			return exitStatus(userns.ExitNotFound)
		}
	}
	if !userns.Needed() {
		return a.execHere(path, args)
	}
	code, err := userns.Run(userns.Command{Path: path, Args: args[1:], Root: a.root, Keep: true, Mounts: a.countMounts})
	if status := userns.StartStatus(err); status != 0 {
		a.note("unshare %s: %v", args[0], err)
		return exitStatus(status)
	}
	if errdefs.IsUnavailable(err) {
		err = hintf(err, allowNamespaces)
	}
	if err != nil {
		return verbError(err, "unshare", args[0])
	}
	return exitStatus(code)
}

// execHere runs the command as a child, for root and for who is inside already.
func (a *app) execHere(path string, args []string) error {
	code, err := userns.RunHere(path, args)
	if err != nil {
		a.note("unshare %s: %v", args[0], err)
		if errors.Is(err, fs.ErrNotExist) {
			return exitStatus(userns.ExitNotFound)
		}
		return exitStatus(userns.ExitCannot)
	}
	return exitStatus(code)
}
