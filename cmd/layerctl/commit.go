package main

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/snapshot"
)

func (a *app) commitCommand() *cobra.Command {
	var labels map[string]string
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "commit NAME NEW", Short: "Freeze a writable snapshot as a committed one",
		Long: `Freeze the writable snapshot NAME as the committed snapshot NEW and print that.
NAME is gone afterwards. It must not be mounted.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeNames(1, snapshots.KindActive),
		RunE: func(cmd *cobra.Command, args []string) error {
			return verbError(a.commit(cmd.Context(), args[0], args[1], labels), "commit", args[0])
		},
	})
	c.Flags().StringToStringVar(&labels, "label", nil, "labels of the new snapshot")
	return c
}

func (a *app) commit(ctx context.Context, key, name string, labels map[string]string) error {
	v, err := a.openView(ctx)
	if err != nil {
		return err
	}
	info, err := a.resolve(ctx, v, key)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive {
		return hintf(fmt.Errorf("%s is a %s snapshot, not a writable one: %w", info.Name, kindWord(info.Kind), errdefs.ErrFailedPrecondition),
			"`layerctl mount --rw %s` makes a writable one on it", info.Name)
	}
	if err := free(ctx, v, name); err != nil {
		return err
	}
	if err := notMounted(ctx, v, info.Name); err != nil {
		return err
	}
	a.sayVolatile()
	start := time.Now()
	if err := v.CommitWith(ctx, name, info.Name, snapshot.CommitOptions{Labels: labels, Volatile: a.volatile}); err != nil {
		return err
	}
	a.sayMade(ctx, v, name, start, &leftOut{})
	return nil
}

// notMounted refuses a snapshot that is mounted where we can see it: what is
// written to it after a commit would reach the committed layer.
func notMounted(ctx context.Context, v *snapshot.View, key string) error {
	all, err := v.Store().Mounted(ctx)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.View == v.Name() && m.Key == key {
			return hintf(fmt.Errorf("%s is mounted at %s: %w", key, m.Target, errdefs.ErrFailedPrecondition), "`layerctl umount %s` first", key)
		}
	}
	return nil
}
