package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/layerctl/layerctl/internal/sys"
)

// annotationLayers, with the value "dropped", marks an entry of index.json whose
// layer blobs were dropped on purpose (DropLayers): Check misses nothing there.
const annotationLayers = "io.github.layerctl.layers"

// Image is one entry of the store's index.json.
type Image struct {
	// Name is the org.opencontainers.image.ref.name annotation; "" for an image
	// that came without a name, which is reached by its digest.
	Name string
	// Target is the image's manifest, or its index when it has several platforms.
	// Target.Digest is the image's identity.
	Target ocispec.Descriptor
	// LayersDropped: the layer blobs were dropped; the layers are only in the
	// snapshots that they were unpacked to.
	LayersDropped bool
}

func (i Image) String() string {
	if i.Name != "" {
		return i.Name
	}
	return i.Target.Digest.String()
}

// Store keeps images. It holds no lock between calls, and any number of
// processes may use one folder. It is safe for concurrent use.
type Store struct {
	layout *layout
	dir    string // immutable

	// writer is opened when first needed: a store that is only read may be on a
	// read-only file system.
	writer  func() (content.Store, error)
	written atomic.Bool // writer was called
}

// Open opens the store in dir and makes it if it is not there (its parent must
// be). It writes nothing to a store that exists.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("image: open %s: %w", dir, err)
	}
	l, err := openLayout(dir)
	if err != nil && isAbsent(dir) {
		if err = createStore(dir); err == nil {
			l, err = openLayout(dir)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("image: open %s: %w", dir, err)
	}
	s := &Store{layout: l, dir: dir}
	s.writer = sync.OnceValues(func() (content.Store, error) {
		s.written.Store(true)
		return openContent(dir)
	})
	return s, nil
}

// quiet serializes openContent.
var quiet sync.Mutex

// openContent opens containerd's content store. It probes for fsverity and warns
// on standard error wherever a file system has none, which is nearly everywhere:
// for that moment only errors are logged.
func openContent(dir string) (content.Store, error) {
	quiet.Lock()
	defer quiet.Unlock()
	logger := log.L.Logger
	level := logger.GetLevel()
	logger.SetLevel(log.ErrorLevel)
	defer logger.SetLevel(level)
	return local.NewStore(dir)
}

// isAbsent reports whether dir is no image layout yet: it is not there, or empty
// but for what an interrupted createStore left.
func isAbsent(dir string) bool {
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	ours := []string{ocispec.ImageBlobsDir, ocispec.ImageIndexFile, "." + ocispec.ImageIndexFile + ".tmp", "." + ocispec.ImageLayoutFile + ".tmp"}
	return err == nil && !slices.ContainsFunc(names, func(e os.DirEntry) bool { return !slices.Contains(ours, e.Name()) })
}

func createStore(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	l, err := lock(context.Background(), dir, sys.LockExclusive)
	if err != nil {
		return err
	}
	defer l.Close()
	if !isAbsent(dir) {
		return nil // another process was first
	}
	if err := initLayout(dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// Close releases what the store holds open. Idempotent.
func (s *Store) Close() error {
	if s.written.Load() {
		// containerd's probe of fsverity leaves an open file to the finalizer.
		runtime.GC()
	}
	return s.layout.Close()
}

// Dir returns the store's folder, an OCI image layout.
func (s *Store) Dir() string { return s.dir }

// Provider returns read access to the blobs, for other users of containerd's
// content interfaces.
func (s *Store) Provider() content.Provider { return s.layout }

// List returns the images by name, nameless ones last.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	idx, err := s.layout.index(kept)
	if err != nil {
		return nil, fmt.Errorf("image: list: %w", err)
	}
	return imagesOf(idx.Manifests), ctx.Err()
}

// imagesOf are the images of an index, by name, nameless ones last.
func imagesOf(entries []ocispec.Descriptor) []Image {
	list := make([]Image, 0, len(entries))
	for _, d := range entries {
		list = append(list, entryImage(d))
	}
	slices.SortFunc(list, func(a, b Image) int {
		if (a.Name == "") != (b.Name == "") {
			return cmp.Compare(b.Name, a.Name)
		}
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Target.Digest, b.Target.Digest))
	})
	return list
}

// kept bounds what is in the store already: Load had its limits then, and
// index.json may grow with the number of images.
var kept = Limits{Document: -1, Manifests: -1, Depth: -1, Layers: -1, Entries: -1, Size: -1}

// entryImage and indexEntry turn an entry of index.json into an Image and back.
func entryImage(d ocispec.Descriptor) Image {
	i := Image{Name: d.Annotations[ocispec.AnnotationRefName], Target: d, LayersDropped: d.Annotations[annotationLayers] == "dropped"}
	i.Target.Annotations = without(d.Annotations, ocispec.AnnotationRefName, images.AnnotationImageName, annotationLayers)
	return i
}

func indexEntry(i Image) ocispec.Descriptor {
	d := i.Target
	d.Annotations = without(d.Annotations)
	add := func(k, v string) {
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[k] = v
	}
	if i.Name != "" {
		add(ocispec.AnnotationRefName, i.Name)
	}
	if i.LayersDropped {
		add(annotationLayers, "dropped")
	}
	return d
}

// without returns a copy of m that lacks keys; nil if nothing is left.
func without(m map[string]string, keys ...string) map[string]string {
	var out map[string]string
	for k, v := range m {
		if slices.Contains(keys, k) {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}

// Resolve finds an image by its name, by its name without ":latest", or by its
// digest or the beginning of it (4 hex digits or more, "sha256:" or not).
// ErrNotFound if there is none; ErrInvalidArgument, naming the candidates, if a
// digest prefix fits several different images.
func (s *Store) Resolve(ctx context.Context, ref string) (Image, error) {
	list, err := s.List(ctx)
	if err != nil {
		return Image{}, err
	}
	img, err := resolve(list, ref)
	if err != nil {
		return Image{}, fmt.Errorf("image: %w", err)
	}
	return img, nil
}

func resolve(list []Image, ref string) (Image, error) {
	for _, name := range []string{ref, ref + ":latest"} {
		if i := slices.IndexFunc(list, func(i Image) bool { return i.Name == name && name != "" }); i >= 0 {
			return list[i], nil
		}
	}
	found := byDigest(list, ref)
	if len(found) == 0 {
		return Image{}, fmt.Errorf("%q: %w", ref, errdefs.ErrNotFound)
	}
	for _, f := range found[1:] {
		if f.Target.Digest != found[0].Target.Digest {
			return Image{}, fmt.Errorf("%q fits several: %s: %w", ref, candidates(found), errdefs.ErrInvalidArgument)
		}
	}
	return found[0], nil
}

func byDigest(list []Image, ref string) []Image {
	hex := strings.TrimPrefix(ref, digest.Canonical.String()+":")
	if len(hex) < 4 || strings.Trim(hex, "0123456789abcdef") != "" {
		return nil
	}
	var found []Image
	for _, i := range list {
		if strings.HasPrefix(i.Target.Digest.Encoded(), hex) {
			found = append(found, i)
		}
	}
	return found
}

func candidates(list []Image) string {
	var names []string
	for _, i := range list {
		name := i.Target.Digest.String()
		if i.Name != "" {
			name = i.Name + " (" + name + ")"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// update changes index.json under its lock: f gets the entries and returns the
// new ones. When it returns nil the change is durable.
func (s *Store) update(ctx context.Context, f func([]ocispec.Descriptor) ([]ocispec.Descriptor, error)) error {
	l, err := lock(ctx, s.dir, sys.LockExclusive)
	if err != nil {
		return err
	}
	defer l.Close()
	idx, err := s.layout.index(kept)
	if err != nil {
		return err
	}
	idx.Manifests, err = f(idx.Manifests)
	if err != nil {
		return err
	}
	return writeIndex(s.dir, idx)
}

// put adds images to index.json; a name that was taken goes over to the new one.
// It returns the entries that were there before.
func (s *Store) put(ctx context.Context, add ...Image) (before []ocispec.Descriptor, err error) {
	err = s.update(ctx, func(all []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		before = slices.Clone(all)
		for _, img := range add {
			all = putEntry(all, img)
		}
		return all, nil
	})
	return before, err
}

// putEntry adds one image. Its layers are dropped under all its names or none.
func putEntry(all []ocispec.Descriptor, img Image) []ocispec.Descriptor {
	all = slices.DeleteFunc(all, func(d ocispec.Descriptor) bool { return replaces(img, d) })
	listed := false
	for i, d := range all {
		if d.Digest == img.Target.Digest {
			same := entryImage(d)
			same.LayersDropped = img.LayersDropped
			all[i], listed = indexEntry(same), true
		}
	}
	if img.Name == "" && listed {
		return all // by whatever name
	}
	return append(all, indexEntry(img))
}

// replaces reports whether the entry d goes when img is added: the same name, or
// no name and the same digest.
func replaces(img Image, d ocispec.Descriptor) bool {
	name := d.Annotations[ocispec.AnnotationRefName]
	if name == "" {
		return d.Digest == img.Target.Digest
	}
	return name == img.Name
}

// checkName refuses what cannot be an image's name: other tools read it too.
func checkName(name string) error {
	bad := func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0xfffd }
	if name == "" || len(name) > 4096 || strings.IndexFunc(name, bad) >= 0 {
		return fmt.Errorf("name %q: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Tag gives the image that ref resolves to one more name; a name that was taken
// moves.
func (s *Store) Tag(ctx context.Context, ref, name string) error {
	if err := checkName(name); err != nil {
		return fmt.Errorf("image: tag: %w", err)
	}
	// Resolved under the lock: else a Remove with GC, or DropLayers, that comes in
	// between would be undone in index.json and not in the blobs.
	err := s.update(ctx, func(all []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		img, err := resolve(imagesOf(all), ref)
		if err != nil {
			return nil, err
		}
		img.Name = name
		return putEntry(all, img), nil
	})
	if err != nil {
		return fmt.Errorf("image: tag %s: %w", name, err)
	}
	return nil
}

// Remove takes one image off the list: the name, if ref is one, else every entry
// of the digest that ref resolves to. Its blobs stay until GC. It returns what
// was removed.
func (s *Store) Remove(ctx context.Context, ref string) ([]Image, error) {
	img, err := s.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	byName := img.Name == ref || img.Name == ref+":latest"
	var removed []Image
	err = s.update(ctx, func(all []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		return slices.DeleteFunc(all, func(d ocispec.Descriptor) bool {
			gone := d.Digest == img.Target.Digest && (!byName || entryImage(d).Name == img.Name)
			if gone {
				removed = append(removed, entryImage(d))
			}
			return gone
		}), nil
	})
	if err != nil {
		return nil, fmt.Errorf("image: remove %s: %w", ref, err)
	}
	return removed, nil
}
