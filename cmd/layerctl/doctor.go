package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/snapshot"
)

func (a *app) doctorCommand() *cobra.Command {
	return inNamespaces(nsEnter, &cobra.Command{
		Use: "doctor [NAME | TARGET]", Short: "Say who uses the store on this machine, and what is left there",
		Long: `List the mounts of the store's layers in every mount namespace, with the processes
that are in them, who is at work on the store, and what is left that nobody needs: what
it is, what it costs in bytes, and what removes it. With a snapshot's name, or the place
where one is mounted, only that. Nothing is changed. The exit code is 1 if something is
left. What is on the disk, records and bytes, is for check.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return verbError(a.doctor(cmd.Context(), args), append([]string{"doctor"}, args...)...)
		},
	})
}

// doctorRow is one thing that doctor found.
type doctorRow struct {
	What string `json:"what"` // "mount", "process", "work", or a problem's name
	// Object is a snapshot, or what is left.
	Object     string `json:"object"`
	Target     string `json:"target,omitempty"`
	Mode       string `json:"mode,omitempty"` // "rw" or "ro"
	Driver     string `json:"driver,omitempty"`
	Namespace  string `json:"namespace,omitempty"`
	PID        int    `json:"pid,omitempty"` // of a process in another namespace, or of a holder
	Comm       string `json:"comm,omitempty"`
	How        string `json:"how,omitempty"` // a holder's: cwd, root, exe, fd
	Path       string `json:"path,omitempty"`
	Server     int    `json:"server,omitempty"` // pid of a mount's FUSE server
	Detail     string `json:"detail,omitempty"`
	Suggestion string `json:"suggestion,omitempty"`
	Bytes      int64  `json:"bytes,omitempty"` // that would be free; -1: not known
	Left       bool   `json:"left"`            // something that nobody needs
	// Holders are processes of which one keeps what is left in use.
	Holders []int `json:"holders,omitempty"`

	text string
}

func (a *app) doctor(ctx context.Context, args []string) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	d, err := v.Store().Diagnose(ctx)
	if err != nil {
		return err
	}
	rows, left := rowsOf(d), len(d.Left)
	if len(args) > 0 {
		if rows, err = a.usesOf(ctx, v, d, args[0]); err != nil {
			return err
		}
	}
	err = show(a, rows, table[doctorRow]{
		plain: true,
		row:   func(r doctorRow) []string { return []string{printable(r.text)} },
		name:  func(r doctorRow) string { return printable(r.Object) },
	})
	if err != nil || len(args) > 0 {
		return err
	}
	if !a.quiet {
		a.note("doctor: %s, %s at work, %s left", counted(len(d.Uses), "mount", "mounts"), counted(len(d.Working), "process", "processes"), counted(left, "thing", "things"))
	}
	if left > 0 {
		return exitStatus(exitError)
	}
	return nil
}

// usesOf is the mounts of one snapshot, or the one at a place.
func (a *app) usesOf(ctx context.Context, v *snapshot.View, d snapshot.Diagnosis, name string) ([]doctorRow, error) {
	target, err := filepath.Abs(name)
	if err != nil {
		return nil, err
	}
	is := func(u snapshot.Use) bool { return u.Target == target }
	if !slices.ContainsFunc(d.Uses, is) {
		info, err := a.resolve(ctx, v, name)
		if errdefs.IsNotFound(err) && strings.Contains(name, "/") {
			return nil, fmt.Errorf("no layer of this store is mounted there: %w", errdefs.ErrNotFound)
		}
		if err != nil {
			return nil, err
		}
		is = func(u snapshot.Use) bool { return u.View == v.Name() && u.Key == info.Name }
	}
	rows := []doctorRow{}
	for _, u := range d.Uses {
		if is(u) {
			rows = append(rows, useRows(u)...)
		}
	}
	return rows, nil
}

func rowsOf(d snapshot.Diagnosis) (rows []doctorRow) {
	rows = []doctorRow{}
	for _, u := range d.Uses {
		rows = append(rows, useRows(u)...)
	}
	for _, w := range d.Working {
		rows = append(rows, doctorRow{What: "work", Object: w, text: "at work: " + w})
	}
	for _, l := range d.Left {
		said := l.Finding
		if l.Bytes != 0 {
			said.Detail += " (" + humanBytes(l.Bytes) + ")"
		}
		var pids []int
		for _, h := range l.Holders {
			pids = append(pids, h.PID)
		}
		rows = append(rows, doctorRow{
			What: string(l.Problem), Object: l.Object, Detail: l.Detail, Suggestion: l.Suggestion, Bytes: l.Bytes, Left: true, Holders: pids,
			text: "left: " + said.String(),
		})
	}
	return rows
}

// useRows are a mount and who is in it.
func useRows(u snapshot.Use) []doctorRow {
	name := u.Key
	switch {
	case name == "":
		name = fmt.Sprintf("layer %s of %s, removed", u.ID, u.Driver)
	case u.View != viewName:
		name = u.View + "/" + name
	}
	text := fmt.Sprintf("%s: mounted %s at %s by %s", name, mode(u.ReadOnly), u.Target, u.Driver)
	if u.PID != 0 {
		text += fmt.Sprintf(", in the mount namespace of %d (%s)", u.PID, u.Comm)
	}
	if u.Server != 0 {
		text += fmt.Sprintf(", served by %d", u.Server)
	}
	rows := []doctorRow{{
		What: "mount", Object: name, Target: u.Target, Mode: mode(u.ReadOnly), Driver: u.Driver, Namespace: u.Namespace, PID: u.PID, Comm: u.Comm, Server: u.Server, text: text,
	}}
	for _, h := range u.Holders {
		rows = append(rows, doctorRow{
			What: "process", Object: name, Target: u.Target, Driver: u.Driver, Namespace: u.Namespace, PID: h.PID, Comm: h.Comm, How: h.What, Path: h.Path,
			text: "  " + h.String(),
		})
	}
	return rows
}
