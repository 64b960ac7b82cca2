package testimage

import (
	"encoding/json"
	"path"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Docker says how a docker-archive is laid out.
type Docker struct {
	Tags []string
	// Links has each layer as a symlink ID/layer.tar -> ../DIFFID.tar, as docker
	// and skopeo write layers that repeat.
	Links bool
	// Compression of the layers in the archive.
	Compression string
	// Legacy is the form from before docker 1.10: no manifest.json.
	Legacy bool
}

// DockerTar returns an image as a docker-archive. The manifest comes last, as
// docker writes it.
func (i Image) DockerTar(t testing.TB, o Docker) []byte {
	t.Helper()
	if o.Legacy {
		return i.legacyTar(t, o)
	}
	var l Layer
	var names []string
	for n, b := range i.Tars {
		file := i.Config.RootFS.DiffIDs[n].Encoded() + ".tar"
		name := file
		if o.Links {
			name = path.Join(digest.FromString(file).Encoded(), "layer.tar")
			l = append(l, Symlink(name, "../"+file))
		}
		names = append(names, name)
		l = append(l, File(file, string(Compress(t, b, o.Compression))))
	}
	config := marshal(t, i.Config)
	file := digest.FromBytes(config).Encoded() + ".json"
	l = append(l, File(file, string(config)))
	m := []map[string]any{{"Config": file, "RepoTags": o.Tags, "Layers": names}}
	return append(l, File("manifest.json", string(marshal(t, m)))).Tar(t)
}

func (i Image) legacyTar(t testing.TB, o Docker) []byte {
	var l Layer
	parent := ""
	for n, b := range i.Tars {
		id := digest.FromString(parent + i.Config.RootFS.DiffIDs[n].String()).Encoded()
		doc := map[string]any{"id": id, "created": Epoch, "os": i.Config.OS, "architecture": i.Config.Architecture, "config": i.Config.Config}
		if parent != "" {
			doc["parent"] = parent
		}
		l = append(l, Dir(id), File(id+"/VERSION", "1.0"), File(id+"/json", string(marshal(t, doc))),
			File(id+"/layer.tar", string(Compress(t, b, o.Compression))))
		parent = id
	}
	repos := map[string]map[string]string{}
	for _, tag := range o.Tags {
		repo, version := cutTag(tag)
		repos[repo] = map[string]string{version: parent}
	}
	return append(l, File("repositories", string(marshal(t, repos)))).Tar(t)
}

func cutTag(s string) (repo, tag string) {
	for i := len(s) - 1; i >= 0; i-- {
		if s[i] == ':' {
			return s[:i], s[i+1:]
		}
	}
	return s, "latest"
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
