package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/image"
	"github.com/layerctl/layerctl/snapshot"
)

// minPrefix is how many hex digits of a digest stand for it at least.
const minPrefix = 4

// resolve finds the snapshot that the user means by a name: a key, an image's
// reference (its top layer), or the beginning of a digest that is a key.
func (a *app) resolve(ctx context.Context, v *snapshot.View, name string) (snapshots.Info, error) {
	info, err := v.Stat(ctx, name)
	if !errdefs.IsNotFound(err) {
		return info, err
	}
	key, err := a.imageKey(ctx, name)
	if errdefs.IsNotFound(err) {
		key, err = keyByPrefix(ctx, v, name)
	}
	if err != nil {
		return info, err
	}
	info, err = v.Stat(ctx, key)
	if errdefs.IsNotFound(err) {
		return info, hintf(fmt.Errorf("image %s is not unpacked: %w", name, errdefs.ErrNotFound), "`layerctl load` it again")
	}
	return info, err
}

// imageKey returns the key of an image's top layer.
func (a *app) imageKey(ctx context.Context, ref string) (string, error) {
	if !a.haveImages() {
		return "", fmt.Errorf("no images: %w", errdefs.ErrNotFound)
	}
	s, err := a.openImages(ctx)
	if err != nil {
		return "", err
	}
	img, err := resolveImage(ctx, s, ref)
	if err != nil {
		return "", err
	}
	m, err := s.Manifest(ctx, img, "")
	if err != nil {
		return "", err
	}
	return m.ChainID().String(), nil
}

// resolveImage finds an image as image.Store.Resolve does, or by the end of its
// name: "app" is "localhost/app:latest", as long as it is no other's.
func resolveImage(ctx context.Context, s *image.Store, ref string) (image.Image, error) {
	img, err := s.Resolve(ctx, ref)
	if !errdefs.IsNotFound(err) {
		return img, err
	}
	all, lerr := s.List(ctx)
	if lerr != nil {
		return img, lerr
	}
	var found []image.Image
	for _, i := range all {
		if strings.HasSuffix(i.Name, "/"+ref) || strings.HasSuffix(i.Name, "/"+ref+":latest") {
			found = append(found, i)
		}
	}
	switch len(found) {
	case 0:
		return img, err
	case 1:
		return found[0], nil
	}
	return img, hintf(fmt.Errorf("%s is %s and %s: %w", ref, found[0].Name, found[1].Name, errdefs.ErrInvalidArgument), "give more of the name")
}

// keyByPrefix returns the one key that is a digest beginning with prefix, with
// or without its algorithm.
func keyByPrefix(ctx context.Context, v *snapshot.View, prefix string) (string, error) {
	hex := strings.TrimPrefix(prefix, "sha256:")
	none := hintf(fmt.Errorf("no snapshot or image of that name: %w", errdefs.ErrNotFound), "`layerctl ls` and `layerctl images` list them")
	if len(hex) < minPrefix || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", none
	}
	var found []string
	err := v.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if strings.HasPrefix(i.Name, "sha256:"+hex) {
			found = append(found, i.Name)
		}
		return nil
	})
	switch {
	case err != nil:
		return "", err
	case len(found) == 0:
		return "", none
	case len(found) > 1:
		return "", hintf(fmt.Errorf("fits %s: %w", strings.Join(found, ", "), errdefs.ErrInvalidArgument), "give more of the digest")
	}
	return found[0], nil
}

// checkName refuses a new name that lists could not show on a line of their own.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("a name is empty: %w", errdefs.ErrInvalidArgument)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return fmt.Errorf("the name %q holds a control character or is not UTF-8: %w", name, errdefs.ErrInvalidArgument)
	case len(name) > maxName:
		return fmt.Errorf("the name has %d bytes, more than %d: %w", len(name), maxName, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxName is the most bytes of a new name, as of a file's.
const maxName = 255

// free refuses a new name that cannot be one, or is taken.
func free(ctx context.Context, v *snapshot.View, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	_, err := v.Stat(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = hintf(fmt.Errorf("the name is taken: %w", errdefs.ErrAlreadyExists), "choose another, or `layerctl rm %s` first", name)
	}
	return err
}

// madeName makes a name for something of base that the user gave no name.
func madeName(base string) string { return base + "-" + strings.ToLower(rand.Text()[:6]) }

// plainName is a name to make others of, for a snapshot that the user called
// said: the key itself, but for a layer of an image the last part of the image's
// name, or twelve digits of the digest.
func plainName(key, said string) string {
	hex, ok := strings.CutPrefix(key, "sha256:")
	if !ok || len(hex) != 64 {
		return key
	}
	if strings.Trim(strings.TrimPrefix(said, "sha256:"), "0123456789abcdef") == "" {
		return hex[:12]
	}
	said, _, _ = strings.Cut(said[strings.LastIndexByte(said, '/')+1:], "@")
	said, _, _ = strings.Cut(said, ":")
	return said
}

// shortName shortens a digest to twelve digits, as engines print it.
func shortName(name string) string {
	if hex, ok := strings.CutPrefix(name, "sha256:"); ok && len(hex) == 64 {
		return "sha256:" + hex[:12]
	}
	return name
}

// completeNames completes the names of snapshots of the given kinds and, where
// committed ones fit, of images. It changes nothing and needs no namespace.
func (a *app) completeNames(most int, kinds ...snapshots.Kind) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveDefault
		}
		names, _ := a.names(cmd.Context(), kinds)
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) names(ctx context.Context, kinds []snapshots.Kind) (names []string, err error) {
	if err := a.setRoot(); err != nil {
		return nil, err
	}
	s, err := layerctl.Open(ctx, a.root, layerctl.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	v, err := s.View(viewName, "")
	if err != nil {
		return nil, err
	}
	err = v.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if len(kinds) == 0 || slices.Contains(kinds, i.Kind) {
			names = append(names, i.Name)
		}
		return nil
	})
	if len(kinds) == 0 || slices.Contains(kinds, snapshots.KindCommitted) {
		names = append(names, a.imageNames(ctx)...)
	}
	return names, err
}

// imageNames lists the images' names, none where there is trouble.
func (a *app) imageNames(ctx context.Context) []string {
	if !a.haveImages() {
		return nil
	}
	s, err := image.Open(filepath.Join(a.root, "images"))
	if err != nil {
		return nil
	}
	defer s.Close()
	imgs, _ := s.List(ctx)
	var names []string
	for _, i := range imgs {
		if i.Name != "" {
			names = append(names, i.Name)
		}
	}
	return names
}

func (a *app) completeImages(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || a.setRoot() != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.imageNames(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeDrivers(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, f := range layerctl.Drivers().Factories() {
		names = append(names, f.Name+"\t"+f.Summary)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// haveImages reports whether the store has an image part.
func (a *app) haveImages() bool {
	_, err := os.Stat(filepath.Join(a.root, "images", "index.json"))
	return err == nil
}

// storeExists reports whether there is a store at the root.
func (a *app) storeExists() bool {
	_, err := os.Stat(filepath.Join(a.root, "store.json"))
	return err == nil
}

// storeThere reports whether a list has anything to read: where there is nothing
// at all the list is empty, and what is no store is for opening it to refuse.
func (a *app) storeThere() bool { return a.needStore() == nil }

// inNamespaces marks a verb as one that an ordinary user runs in namespaces.
func inNamespaces(how string, c *cobra.Command) *cobra.Command {
	c.Annotations = map[string]string{nsKey: how}
	return c
}
