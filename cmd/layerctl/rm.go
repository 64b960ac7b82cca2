package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/snapshot"
)

func (a *app) rmCommand() *cobra.Command {
	var force bool
	c := inNamespaces(nsDrop, &cobra.Command{
		Use: "rm NAME...", Short: "Remove snapshots and images",
		Long: `Remove snapshots, or images by a name of theirs. What others are built on stays,
and they are named; with --force they are removed as well, and what is mounted is
unmounted first. An image's name goes, and with the last name of the image the
snapshots of its layers that nothing else is built on. Each name is printed.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeNames(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rm(cmd.Context(), args, force)
		},
	})
	c.Flags().BoolVarP(&force, "force", "f", false, "also remove what is built on it, and unmount")
	return c
}

func (a *app) rm(ctx context.Context, args []string, force bool) error {
	v, err := a.openSwept(ctx)
	if err != nil {
		return verbError(err, "rm")
	}
	var errs []error
	for _, arg := range args {
		errs = append(errs, verbError(a.removeNamed(ctx, v, arg, force), "rm", arg))
	}
	return errors.Join(append(errs, verbError(v.Cleanup(ctx), "rm"))...)
}

// removeNamed removes a snapshot by its key, else an image, else a snapshot by
// the beginning of its digest. What is not there is no error with force.
func (a *app) removeNamed(ctx context.Context, v *snapshot.View, arg string, force bool) error {
	if _, err := v.Stat(ctx, arg); !errdefs.IsNotFound(err) {
		return firstError(err, func() error { return a.removeSnapshot(ctx, v, arg, force) })
	}
	if done, err := a.removeImage(ctx, v, arg); done || err != nil {
		return err
	}
	key, err := keyByPrefix(ctx, v, arg)
	if errdefs.IsNotFound(err) && force {
		return nil
	}
	return firstError(err, func() error { return a.removeSnapshot(ctx, v, key, force) })
}

func firstError(err error, next func() error) error {
	if err != nil {
		return err
	}
	return next()
}

// removeSnapshot removes a key; with force, first what is built on it.
func (a *app) removeSnapshot(ctx context.Context, v *snapshot.View, key string, force bool) error {
	above, err := v.Dependants(ctx, key)
	if err != nil {
		return err
	}
	if len(above) > 0 && !force {
		return hintf(fmt.Errorf("built on it: %s: %w", strings.Join(above, ", "), errdefs.ErrFailedPrecondition),
			"remove those first, or use --force")
	}
	for _, k := range above {
		if err := a.removeSnapshot(ctx, v, k, true); err != nil {
			return err
		}
	}
	if err := a.unmountKey(ctx, v, key, force); err != nil {
		return err
	}
	if err := v.Remove(ctx, key); err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.out, key)
	return err
}

// unmountKey unmounts a snapshot that goes, or refuses where it is mounted.
func (a *app) unmountKey(ctx context.Context, v *snapshot.View, key string, force bool) error {
	all, err := v.Store().Mounted(ctx)
	if err != nil {
		return err
	}
	var its []snapshot.Mounted
	for _, m := range all {
		if m.View == v.Name() && m.Key == key {
			its = append(its, m)
		}
	}
	if len(its) > 0 && !force {
		return hintf(fmt.Errorf("%s is mounted at %s: %w", key, its[0].Target, errdefs.ErrFailedPrecondition),
			"`layerctl umount %s` first, or use --force", key)
	}
	return a.unmountAll(its, force)
}

// removeImage removes an image's name, or all of a digest; and, when none is
// left of it, the snapshots of its layers that nothing is built on.
func (a *app) removeImage(ctx context.Context, v *snapshot.View, ref string) (done bool, err error) {
	if !a.haveImages() {
		return false, nil
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return false, err
	}
	img, err := resolveImage(ctx, s, ref)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	m, merr := s.Manifest(ctx, img, "")
	if !strings.HasPrefix(img.Target.Digest.Encoded(), strings.TrimPrefix(ref, "sha256:")) {
		ref = img.Name // by name only that goes, by digest every name of it
	}
	gone, err := s.Remove(ctx, ref)
	if drivers.IsFull(err) { // the list without the image is a new file
		if spent, merr := v.Store().MakeRoom(ctx); spent && merr == nil {
			gone, err = s.Remove(ctx, ref)
		}
	}
	if err != nil {
		return false, err
	}
	for _, g := range gone {
		fmt.Fprintln(a.out, imageLabel(g))
	}
	if merr == nil {
		err = dropLayers(ctx, v, s, m)
	}
	if err == nil {
		_, err = s.GC(ctx, v)
	}
	return true, err
}

// imageLabel is an image's name, or its digest if it has none.
func imageLabel(i image.Image) string {
	if i.Name != "" {
		return i.Name
	}
	return i.Target.Digest.String()
}

// dropLayers removes the snapshots of an image's layers from the top down, as
// far as nothing else needs them.
func dropLayers(ctx context.Context, v *snapshot.View, s *image.Store, m *image.Manifest) error {
	needed, err := neededKeys(ctx, s)
	if err != nil {
		return err
	}
	mounted, err := v.Store().Mounted(ctx)
	if err != nil {
		return err
	}
	for _, mt := range mounted {
		needed[mt.Key] = true
	}
	for i := len(m.Layers) - 1; i >= 0; i-- {
		key := m.Layers[i].ChainID.String()
		info, err := v.Stat(ctx, key)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil || needed[key] || info.Kind != snapshots.KindCommitted {
			return err
		}
		if err := v.Remove(ctx, key); err != nil {
			if errdefs.IsFailedPrecondition(err) {
				return nil // something is built on it
			}
			return err
		}
	}
	return nil
}

// neededKeys are the keys of the layers of every image that is listed.
func neededKeys(ctx context.Context, s *image.Store) (map[string]bool, error) {
	imgs, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	keys := map[string]bool{}
	for _, i := range imgs {
		m, err := s.Manifest(ctx, i, "")
		if err != nil {
			continue // of another platform: nothing of it is unpacked here
		}
		for _, l := range m.Layers {
			keys[l.ChainID.String()] = true
		}
	}
	return keys, nil
}
