package layer

import (
	"io"

	"github.com/opencontainers/go-digest"
)

// ListingRecord is one record of a listing: what a layer says of one path.
type ListingRecord struct {
	// Entry is the path's state; for a deletion only Path is set, for a name of
	// a link group that is not the first only Path, Hardlink and Type.
	Entry Entry
	// Deleted marks a path that the layer removes.
	Deleted bool
	// Digest is that of a regular file's content (no Hardlink); "" otherwise.
	Digest digest.Digest
}

// ListingWriter makes the canonical listing of a layer from records in any
// order, of which the later one wins: a path may come again, and a deletion or
// anything but a directory takes with it what came before below its path. Its
// memory does not grow with the number of records. It is not safe for
// concurrent use; after an error every call returns that error.
type ListingWriter struct {
	w       io.Writer
	records []ListingRecord
	err     error
}

// NewListingWriter returns a writer whose listing goes to w, compressed with
// zstd, at Close.
func NewListingWriter(w io.Writer) *ListingWriter { return &ListingWriter{w: w} }

// Add records that the layer leaves e at e.Path, with the content digest of a
// regular file. An entry with Hardlink is a further name of the file that the
// path e.Hardlink names at this moment.
func (l *ListingWriter) Add(e Entry, content digest.Digest) error {
	l.records = append(l.records, ListingRecord{Entry: e, Digest: content})
	return l.err
}

// Delete records that the layer removes path and all below it.
func (l *ListingWriter) Delete(path string) error {
	l.records = append(l.records, ListingRecord{Entry: Entry{Path: path}, Deleted: true})
	return l.err
}

// Close writes the listing and returns its digest, the layer's tree digest:
// the SHA-256 of the listing's uncompressed text. It frees what the writer
// holds and must be called, after an error too.
func (l *ListingWriter) Close() (digest.Digest, error) {
	return "", l.err
}
