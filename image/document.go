package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// Limits bound what an image may ask for. The zero value of each field means
// the default named beside it; -1 means no limit. A refusal names the object
// and wraps ErrResourceExhausted.
type Limits struct {
	Document  int64 // bytes of one JSON document: 4 MiB, as registries have it
	Manifests int   // descriptors of all indexes of one image together: 1,000
	Depth     int   // indexes inside indexes: 4
	Layers    int   // layers of one image: 1,000
	Entries   int   // entries of one archive: 100,000
	Size      int64 // uncompressed bytes of one archive: 1 TiB
	Window    int64 // memory for zstd of a compressed archive: as layer.Limits has it
}

func (l Limits) withDefaults() Limits {
	set(&l.Document, 4<<20)
	set(&l.Manifests, 1000)
	set(&l.Depth, 4)
	set(&l.Layers, 1000)
	set(&l.Entries, 100_000)
	set(&l.Size, 1<<40)
	return l
}

// archive are the limits of what is decompressed here.
func (l Limits) archive() layer.Limits { return layer.Limits{Window: l.Window} }

func set[T int | int64](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

// over reports whether n is more than limit, which -1 never is.
func over[T int | int64](n, limit T) bool { return limit >= 0 && n > limit }

// readDocument reads and verifies the JSON document that desc names.
func readDocument(ctx context.Context, p content.Provider, desc ocispec.Descriptor, lim Limits) ([]byte, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	if over(desc.Size, lim.Document) {
		return nil, fmt.Errorf("%s: a JSON document of %d bytes, more than %d: %w", desc.Digest, desc.Size, lim.Document, errdefs.ErrResourceExhausted)
	}
	ra, err := p.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if err := checkSize(desc, ra.Size()); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.NewSectionReader(ra, 0, ra.Size()))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(b); got != desc.Digest {
		return nil, wrongDigest(desc.Digest, got)
	}
	return b, nil
}

func checkSize(desc ocispec.Descriptor, size int64) error {
	if size == desc.Size {
		return nil
	}
	return fmt.Errorf("%s: %d bytes where its descriptor says %d: %w", desc.Digest, size, desc.Size, errdefs.ErrDataLoss)
}

func wrongDigest(want, got digest.Digest) error {
	return fmt.Errorf("%s: the bytes have digest %s: %w", want, got, errdefs.ErrDataLoss)
}

// checkDescriptor refuses a descriptor that names no blob: what goes on from
// here builds a path from its digest.
func checkDescriptor(desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 {
		return fmt.Errorf("%s: size %d: %w", desc.Digest, desc.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// isIndex and isManifest sort media types; an empty one is decided by whoever
// knows where the descriptor stood.
func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == images.MediaTypeDockerSchema2ManifestList
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == images.MediaTypeDockerSchema2Manifest
}

func isConfig(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageConfig || mediaType == images.MediaTypeDockerSchema2Config
}

func unknownMediaType(what string, desc ocispec.Descriptor) error {
	return fmt.Errorf("%s %s: media type %q is not one of an image: %w", what, desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
}

// parseIndex reads an image index: OCI's, docker's manifest list, or a layout's
// index.json.
func parseIndex(b []byte, lim Limits) (ocispec.Index, error) {
	var idx ocispec.Index
	if err := parseVersioned(b, &idx, "manifests", "config", "layers", "fsLayers"); err != nil {
		return idx, fmt.Errorf("index: %w", err)
	}
	if idx.MediaType != "" && !isIndex(idx.MediaType) {
		return idx, fmt.Errorf("index: media type %q: %w", idx.MediaType, errdefs.ErrInvalidArgument)
	}
	if over(len(idx.Manifests), lim.Manifests) {
		return idx, fmt.Errorf("index: %d manifests, more than %d: %w", len(idx.Manifests), lim.Manifests, errdefs.ErrResourceExhausted)
	}
	for _, d := range idx.Manifests {
		if err := checkDescriptor(d); err != nil {
			return idx, fmt.Errorf("index: %w", err)
		}
	}
	return idx, nil
}

// parseManifest reads an image manifest, OCI's or docker's schema 2, of an image
// that consists of filesystem layers.
func parseManifest(b []byte, lim Limits) (ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := parseVersioned(b, &m, "layers", "manifests", "fsLayers"); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	if m.MediaType != "" && !isManifest(m.MediaType) {
		return m, fmt.Errorf("manifest: media type %q: %w", m.MediaType, errdefs.ErrInvalidArgument)
	}
	if err := checkDescriptor(m.Config); err != nil {
		return m, fmt.Errorf("manifest: config: %w", err)
	}
	if !isConfig(m.Config.MediaType) {
		return m, unknownMediaType("config", m.Config)
	}
	if over(len(m.Layers), lim.Layers) {
		return m, fmt.Errorf("manifest: %d layers, more than %d: %w", len(m.Layers), lim.Layers, errdefs.ErrResourceExhausted)
	}
	for i, l := range m.Layers {
		if err := checkLayer(l); err != nil {
			return m, fmt.Errorf("manifest: layer %d: %w", i+1, err)
		}
	}
	return m, nil
}

func checkLayer(l ocispec.Descriptor) error {
	if err := checkDescriptor(l); err != nil {
		return err
	}
	if _, err := layer.ParseMediaType(l.MediaType); err != nil {
		return fmt.Errorf("blob %s: %w", l.Digest, err)
	}
	return nil
}

// parseVersioned unmarshals a document of schema version 2 that must have the
// field has and none of hasNot: a document that can be read as two things is
// read differently by two programs (CVE-2021-41190).
func parseVersioned(b []byte, v any, has string, hasNot ...string) error {
	var fields map[string]json.RawMessage
	if err := unmarshal(b, &fields); err != nil {
		return err
	}
	for k := range maps.Keys(fields) {
		if slices.ContainsFunc(hasNot, func(n string) bool { return strings.EqualFold(n, k) }) {
			return fmt.Errorf("has %q and so is ambiguous: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	if string(fields["schemaVersion"]) != "2" {
		return fmt.Errorf("schemaVersion %s, not 2: %w", orNone(fields["schemaVersion"]), errdefs.ErrInvalidArgument)
	}
	if _, ok := fields[has]; !ok {
		return fmt.Errorf("has no %q: %w", has, errdefs.ErrInvalidArgument)
	}
	return unmarshal(b, v)
}

func orNone(b []byte) string {
	if len(b) == 0 {
		return "missing"
	}
	return string(b[:min(len(b), 20)])
}

// maxObjects bounds the objects of one document, before memory is taken for
// them: two bytes of JSON can ask for a hundred.
const maxObjects = 100_000

func unmarshal(b []byte, v any) error {
	if n := bytes.Count(b, []byte("{")); n > maxObjects {
		return fmt.Errorf("JSON: %d objects, more than %d: %w", n, maxObjects, errdefs.ErrResourceExhausted)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("JSON: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// parseConfig reads an image's configuration, which names its layers' DiffIDs.
func parseConfig(b []byte, lim Limits) (ocispec.Image, error) {
	var c ocispec.Image
	if err := unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("config: %w", err)
	}
	if t := c.RootFS.Type; t != "layers" && (t != "" || len(c.RootFS.DiffIDs) > 0) {
		return c, fmt.Errorf("config: rootfs of type %q, not \"layers\": %w", t, errdefs.ErrNotImplemented)
	}
	if over(len(c.RootFS.DiffIDs), lim.Layers) {
		return c, fmt.Errorf("config: %d layers, more than %d: %w", len(c.RootFS.DiffIDs), lim.Layers, errdefs.ErrResourceExhausted)
	}
	for i, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return c, fmt.Errorf("config: DiffID %d %q: %w: %w", i+1, d, err, errdefs.ErrInvalidArgument)
		}
	}
	return c, nil
}

// marshal is JSON as this package writes it: one line, keys in the order of the
// type, sorted for maps; the same value gives the same bytes.
func marshal(v any) ([]byte, error) { return json.Marshal(v) }
