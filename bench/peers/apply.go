package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl/layer"
)

var applyWorkload = workload{
	name:    "apply",
	about:   "Unpack one uncompressed layer into an empty directory. layerctl and containerd take its SHA-256 on the way, the tars do not.",
	fixture: applyFixture,
	subjects: []subject{
		{name: "layerctl-volatile", before: emptyTarget, run: func(dir string) error { return applyOurs(dir, true) }},
		{name: "layerctl-durable", before: emptyTarget, run: func(dir string) error { return applyOurs(dir, false) }},
		{name: "containerd", before: emptyTarget, run: applyContainerd},
		{name: "gnu-tar", before: emptyTarget, run: func(dir string) error {
			return command("tar", "-C", target(dir), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", layerTar(dir))
		}, missing: absent("tar")},
		{name: "gnu-tar-sync", before: emptyTarget, run: func(dir string) error {
			return errors.Join(command("tar", "-C", target(dir), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", layerTar(dir)),
				command("sync", "-f", target(dir)))
		}, missing: absent("tar")},
		{name: "bsdtar", before: emptyTarget, run: func(dir string) error {
			return command("bsdtar", "-C", target(dir), "--numeric-owner", "-xpf", layerTar(dir))
		}, missing: absent("bsdtar")},
	},
}

func target(dir string) string   { return filepath.Join(dir, "target") }
func layerTar(dir string) string { return filepath.Join(dir, "layer.tar") }

func applyFixture(dir string) error {
	if *tarFile != "" {
		return command("cp", *tarFile, layerTar(dir))
	}
	root, err := goroot()
	if err != nil {
		return err
	}
	return command("tar", "-C", root, "--format=pax", "-cf", layerTar(dir), ".")
}

// emptyTarget also writes back what the run before left dirty, so that nobody
// pays for another.
func emptyTarget(dir string) error {
	if err := os.RemoveAll(target(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(target(dir), 0o755); err != nil {
		return err
	}
	return command("sync", "-f", dir)
}

func applyOurs(dir string, volatile bool) error {
	return withLayer(dir, func(ctx context.Context, r io.Reader) error {
		return layer.Apply(ctx, target(dir), r, layer.ApplyOptions{Volatile: volatile})
	})
}

func applyContainerd(dir string) error {
	return withLayer(dir, func(ctx context.Context, r io.Reader) error {
		_, err := archive.Apply(ctx, target(dir), r)
		return err
	})
}

// withLayer gives f the layer and takes its digest on the way.
func withLayer(dir string, f func(context.Context, io.Reader) error) error {
	in, err := os.Open(layerTar(dir))
	if err != nil {
		return err
	}
	defer in.Close()
	d := digest.SHA256.Digester()
	r := io.TeeReader(bufio.NewReaderSize(in, 1<<20), d.Hash())
	if err := f(context.Background(), r); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r)
	return err
}
