package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/snapshot"
)

type checkOptions struct{ quick, repair bool }

func (a *app) checkCommand() *cobra.Command {
	var o checkOptions
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "check", Short: "Verify records, structure and the bytes of every layer and blob", Args: cobra.NoArgs,
		Long: `Verify the records, the drivers' structure, the bytes of every committed layer
against its tree digest, what drivers keep layers in (a thin pool: its state, its
metadata, by thin_check too where that is installed, and devices left in the
kernel), and the blobs of the images. Each finding is printed. The exit code is 1
if there was one that was not repaired.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return verbError(a.check(cmd.Context(), o), "check") },
	})
	c.Flags().BoolVar(&o.quick, "quick", false, "do not read the bytes")
	c.Flags().BoolVar(&o.repair, "repair", false, "put right what can be without losing anything")
	return c
}

// checkRow is one finding.
type checkRow struct {
	Problem    string `json:"problem"`
	Object     string `json:"object"`
	Detail     string `json:"detail"`
	Repaired   bool   `json:"repaired"`
	Done       string `json:"done,omitempty"`
	Suggestion string `json:"suggestion,omitempty"`

	text string
}

func (a *app) check(ctx context.Context, o checkOptions) error {
	rows, err := a.checkSnapshots(ctx, o)
	if err != nil {
		return err
	}
	more, err := a.checkImages(ctx, o)
	if err != nil {
		return err
	}
	rows = append(rows, more...)
	err = show(a, rows, table[checkRow]{
		plain: true,
		row:   func(r checkRow) []string { return []string{printable(r.text)} },
		name:  func(r checkRow) string { return printable(r.Object) },
	})
	if err != nil {
		return err
	}
	left := 0
	for _, r := range rows {
		if !r.Repaired {
			left++
		}
	}
	if !a.quiet {
		a.note("check: %s, %d repaired", counted(len(rows), "finding", "findings"), len(rows)-left)
	}
	if left > 0 {
		return exitStatus(exitError)
	}
	return nil
}

func (a *app) checkSnapshots(ctx context.Context, o checkOptions) ([]checkRow, error) {
	v, err := a.openSwept(ctx)
	if err != nil {
		return nil, err
	}
	s := v.Store()
	var notes []string
	p := a.startSteps("check")
	defer p.Stop()
	found, err := s.Check(ctx, snapshot.CheckOptions{Quick: o.quick, Repair: o.repair, Progress: func(c snapshot.CheckProgress) {
		p.Step(c.Object, int64(c.Done), int64(c.Total))
	}, Note: func(text string) { notes = append(notes, text) }})
	p.Stop()
	if !a.quiet {
		for _, text := range notes {
			a.note("check: %s", text)
		}
	}
	rows := make([]checkRow, 0, len(found))
	for _, f := range found {
		rows = append(rows, checkRow{string(f.Problem), f.Object, f.Detail, f.Repaired, f.Done, f.Suggestion, f.String()})
	}
	return rows, err
}

func (a *app) checkImages(ctx context.Context, o checkOptions) ([]checkRow, error) {
	if !a.haveImages() {
		return nil, nil
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return nil, err
	}
	found, err := s.Check(ctx, image.CheckOptions{Quick: o.quick, Repair: o.repair})
	var rows []checkRow
	for _, f := range found {
		r := checkRow{Problem: "blob-damaged", Object: f.Blob.String(), Detail: f.Err.Error(), Repaired: f.Repaired, text: f.String()}
		if f.Blob == "" {
			r.Problem, r.Object = "image-damaged", f.Image
		}
		if f.Repaired {
			r.Done = "removed; load the image again"
		}
		rows = append(rows, r)
	}
	return rows, err
}
