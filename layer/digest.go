package layer

import (
	"context"
	"crypto/sha256"
	_ "crypto/sha512" // an algorithm of go-digest
	"fmt"
	"io"
	"mime"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// contentHash takes the digest of what r has, and its size, until the context ends: a
// sparse file of a terabyte is read for minutes.
func contentHash(ctx context.Context, r io.Reader, buf []byte) (digest.Digest, int64, error) {
	h := sha256.New()
	for size := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return "", size, err
		}
		n, err := r.Read(buf)
		h.Write(buf[:n])
		size += int64(n)
		if err == io.EOF {
			return digest.NewDigest(digest.SHA256, h), size, nil
		}
		if err != nil {
			return "", size, err
		}
	}
}

// ChainID names the tree that the layers with these DiffIDs make, lowest first
// (image-spec, config.md, "Layer ChainID"). That of no layers is "".
func ChainID(diffIDs []digest.Digest) digest.Digest {
	if len(diffIDs) == 0 {
		return ""
	}
	chains := ChainIDs(diffIDs)
	return chains[len(chains)-1]
}

// ChainIDs returns the ChainID of each prefix of diffIDs, the shortest first.
func ChainIDs(diffIDs []digest.Digest) []digest.Digest {
	chains := make([]digest.Digest, len(diffIDs))
	for i, d := range diffIDs {
		if i > 0 {
			d = digest.FromString(chains[i-1].String() + " " + d.String())
		}
		chains[i] = d
	}
	return chains
}

// MediaType is the OCI media type of a layer blob compressed so.
func MediaType(c Compression) string {
	switch c {
	case Gzip:
		return ocispec.MediaTypeImageLayerGzip
	case Zstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// layerTypes are the media types of layers, OCI's and Docker's. The
// non-distributable ones are deprecated and mean only where a blob may be pushed.
var layerTypes = map[string]Compression{
	ocispec.MediaTypeImageLayer:                                    None,
	ocispec.MediaTypeImageLayerGzip:                                Gzip,
	ocispec.MediaTypeImageLayerZstd:                                Zstd,
	"application/vnd.oci.image.layer.nondistributable.v1.tar":      None,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Gzip,
	"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": Zstd,
	"application/vnd.docker.image.rootfs.diff.tar":                 None,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":            Gzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":            Zstd,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":         None,
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    Gzip,
}

// ParseMediaType tells how a layer of the media type is compressed; parameters
// are ignored. A type that is no layer's wraps ErrNotImplemented and is named.
func ParseMediaType(mediaType string) (Compression, error) {
	base, _, err := mime.ParseMediaType(mediaType)
	if err != nil {
		base = mediaType
	}
	c, ok := layerTypes[base]
	if !ok {
		return "", fmt.Errorf("layer: media type %q is not that of a layer: %w", mediaType, errdefs.ErrNotImplemented)
	}
	return c, nil
}
