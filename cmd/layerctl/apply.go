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

func (a *app) applyCommand() *cobra.Command {
	var parent string
	c := inNamespaces(nsEnter, &cobra.Command{
		Use: "apply {TAR|-} NAME", Short: "Unpack a layer tar",
		Long: `Unpack an OCI layer tar, plain or compressed with gzip or zstd, with its
whiteouts: onto NAME if that is a writable snapshot, which must not be mounted,
else as the new committed snapshot NAME on --parent. The name is printed. After an
error a writable snapshot may hold part of the layer; a new one is not made.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeSecond(a.completeNames(0, snapshots.KindActive)),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.mayMake = parent == ""
			return verbError(a.apply(cmd.Context(), args[0], args[1], parent), "apply", args[1])
		},
	})
	c.Flags().StringVar(&parent, "parent", "", "the snapshot below a new one")
	_ = c.RegisterFlagCompletionFunc("parent", a.completeNames(0, snapshots.KindCommitted))
	return a.limited(c)
}

// completeSecond completes files first and then as f does.
func completeSecond(f cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 1 {
			return f(cmd, args, s)
		}
		return nil, cobra.ShellCompDirectiveDefault
	}
}

func (a *app) apply(ctx context.Context, src, name, parent string) error {
	if err := needSource(src); err != nil {
		return err
	}
	v, err := a.openSwept(ctx)
	if err != nil {
		return err
	}
	a.sayVolatile()
	left := &leftOut{}
	s, err := a.openTar(src)
	if err != nil {
		return err
	}
	defer s.Close()
	start := time.Now()
	p := a.startProgress("apply", s.total)
	defer p.Stop()
	s.progress = p
	if err := a.applyTo(ctx, v, name, parent, s, left); err != nil {
		return err
	}
	p.Stop()
	a.sayMade(ctx, v, name, start, left)
	return nil
}

// applyTo unpacks onto a writable snapshot, or makes a new committed one.
func (a *app) applyTo(ctx context.Context, v *snapshot.View, name, parent string, s *source, left *leftOut) error {
	info, err := v.Stat(ctx, name)
	switch {
	case errdefs.IsNotFound(err):
		if err := checkName(name); err != nil {
			return err
		}
		if parent != "" {
			if info, err = a.resolve(ctx, v, parent); err != nil {
				return fmt.Errorf("parent %s: %w", parent, err)
			}
			parent = info.Name
		}
		return a.newLayer(ctx, v, name, parent, nil, s, left)
	case err != nil:
		return err
	case info.Kind != snapshots.KindActive:
		return hintf(fmt.Errorf("%s is there, a %s snapshot: %w", name, kindWord(info.Kind), errdefs.ErrAlreadyExists), "choose another name")
	case parent != "":
		return hintf(fmt.Errorf("%s is there and has its parent: %w", name, errdefs.ErrInvalidArgument), "leave out --parent")
	}
	if err := notMounted(ctx, v, name); err != nil {
		return err
	}
	return a.applySource(ctx, v, name, s, left)
}
