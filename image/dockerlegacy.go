package image

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/layer"
)

// legacyLayer is what ID/json of an archive from before docker 1.10 says: layers
// name their parents, and an image is its top layer.
type legacyLayer struct {
	Parent  string     `json:"parent"`
	Created *time.Time `json:"created"`
	Author  string     `json:"author"`
	Comment string     `json:"comment"`
	Command struct {
		Cmd []string
	} `json:"container_config"`

	id  string
	raw []byte
}

// addLegacy reads an archive that has `repositories` and no manifest.json.
func (d *dockerArchive) addLegacy(ctx context.Context) error {
	b, err := d.document(dockerRepositories)
	if err != nil {
		return err
	}
	var repos map[string]map[string]string // repository, tag, layer
	if err := unmarshal(b, &repos); err != nil {
		return fmt.Errorf("%s: %w", dockerRepositories, err)
	}
	for _, repo := range slices.Sorted(maps.Keys(repos)) {
		for _, tag := range slices.Sorted(maps.Keys(repos[repo])) {
			if over(len(d.index.Manifests)+1, d.lim.Manifests) {
				return fmt.Errorf("%s: more than %d names of images: %w", dockerRepositories, d.lim.Manifests, errdefs.ErrResourceExhausted)
			}
			name := repo + ":" + tag
			if err := d.addLegacyImage(ctx, name, repos[repo][tag]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func (d *dockerArchive) addLegacyImage(ctx context.Context, name, id string) error {
	chain, err := d.legacyChain(id)
	if err != nil {
		return err
	}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	for _, l := range chain {
		file := l.id + "/" + dockerLegacyLayer
		diffID, err := d.legacyDiffID(ctx, file)
		if err != nil {
			return err
		}
		desc, err := d.layer(ctx, file, diffID)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		layers, diffIDs = append(layers, desc), append(diffIDs, diffID)
	}
	config, err := legacyConfig(chain, diffIDs)
	if err != nil {
		return err
	}
	return d.addManifest(config, layers, []string{name})
}

// legacyChain follows the parents of a layer and returns the chain, base first.
func (d *dockerArchive) legacyChain(id string) ([]legacyLayer, error) {
	var chain []legacyLayer
	for id != "" {
		if slices.ContainsFunc(chain, func(l legacyLayer) bool { return l.id == id }) {
			return nil, fmt.Errorf("layer %q is its own ancestor: %w", id, errdefs.ErrInvalidArgument)
		}
		if over(len(chain)+1, d.lim.Layers) {
			return nil, fmt.Errorf("more than %d layers: %w", d.lim.Layers, errdefs.ErrResourceExhausted)
		}
		b, err := d.document(id + "/" + dockerLegacyJSON)
		if err != nil {
			return nil, err
		}
		l := legacyLayer{id: id, raw: b}
		if err := unmarshal(b, &l); err != nil {
			return nil, fmt.Errorf("%s/%s: %w", id, dockerLegacyJSON, err)
		}
		chain = append(chain, l)
		id = l.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// legacyDiffID hashes a layer's uncompressed bytes: nothing else says what they
// should be.
func (d *dockerArchive) legacyDiffID(ctx context.Context, file string) (digest.Digest, error) {
	name, e, err := d.resolve(file)
	if err != nil {
		return "", err
	}
	return once(d.diffs, name, func() (digest.Digest, error) { return d.diffID(ctx, file, e) })
}

func (d *dockerArchive) diffID(ctx context.Context, file string, e entry) (digest.Digest, error) {
	ra, err := d.open(e)
	if err != nil {
		return "", err
	}
	defer ra.Close()
	r, _, err := layer.Decompress(ctxReader{ctx, content.NewReader(ra)}, d.lim.archive())
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	defer r.Close()
	var in io.Reader = &progressReader{r, func(n int64) { d.unpacked += n }}
	if d.lim.Size >= 0 {
		in = io.LimitReader(in, d.lim.Size-d.unpacked+1)
	}
	diffID, err := digest.FromReader(in)
	if err == nil && over(d.unpacked, d.lim.Size) {
		err = fmt.Errorf("layers of more than %d bytes in all: %w", d.lim.Size, errdefs.ErrResourceExhausted)
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return diffID, nil
}

// legacyConfig makes an image configuration of the top layer's json: what both
// have in common, the DiffIDs, and a line of history for each layer.
func legacyConfig(chain []legacyLayer, diffIDs []digest.Digest) ([]byte, error) {
	var top map[string]json.RawMessage
	if err := unmarshal(chain[len(chain)-1].raw, &top); err != nil {
		return nil, err
	}
	doc := map[string]any{}
	for _, k := range []string{"created", "author", "architecture", "variant", "os", "os.version", "config"} {
		if v, ok := top[k]; ok {
			doc[k] = v
		}
	}
	var history []ocispec.History
	for _, l := range chain {
		h := ocispec.History{Created: l.Created, Author: l.Author, Comment: l.Comment}
		if c := l.Command.Cmd; len(c) > 0 {
			h.CreatedBy = fmt.Sprint(c)
		}
		history = append(history, h)
	}
	doc["rootfs"] = ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}
	doc["history"] = history
	return marshal(doc)
}
