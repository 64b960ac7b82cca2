package thin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
)

// The names in a pool's directory.
const (
	recordFile   = "pool.json"
	dataFile     = "data"
	metadataFile = "metadata"
	lockFile     = "lock"
	usersFile    = "users"
)

const format = 1

// record is pool.json.
type record struct {
	Format   int    `json:"format"`
	Data     string `json:"data,omitempty"` // a device; "": the file
	Metadata string `json:"metadata,omitempty"`
	Block    int64  `json:"block"` // bytes
	Full     Policy `json:"full"`
	// New: the pool has never been active; what its files hold is nobody's.
	New bool `json:"new,omitempty"`
	// DataBytes and MetadataBytes are what new files get.
	DataBytes     int64 `json:"data_bytes,omitempty"`
	MetadataBytes int64 `json:"metadata_bytes,omitempty"`
}

func (r *record) onFiles() bool { return r.Data == "" }

// readRecord returns nil if there is none.
func readRecord(dir *sys.Fd) (*record, error) {
	var r record
	err := ReadJSON(dir, recordFile, &r)
	if errors.Is(err, syscall.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if r.Format != format {
		return nil, fmt.Errorf("%s is of format %d, this program knows %d: %w", recordFile, r.Format, format, errdefs.ErrNotImplemented)
	}
	return &r, nil
}

// ReadJSON reads a record that WriteJSON wrote; ErrDataLoss if it cannot be
// understood.
func ReadJSON(dir *sys.Fd, name string, v any) error {
	f, err := dir.Openat(name, sys.O_RDONLY|sys.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w: %w", name, errdefs.ErrDataLoss, err)
	}
	return nil
}

// WriteJSON replaces a record in one step; it is on the disk when it returns. A
// crash may leave ".NAME" beside it.
func WriteJSON(dir *sys.Fd, name string, v any) error {
	err := ReplaceJSON(dir, name, v)
	if err == nil {
		err = dir.Sync()
	}
	return err
}

// ReplaceJSON is WriteJSON without the flush of the directory: a cut may undo it, and
// never leaves a name without its content.
func ReplaceJSON(dir *sys.Fd, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	next := "." + name
	f, err := dir.Openat(next, sys.O_WRONLY|sys.O_CREAT|sys.O_TRUNC|sys.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil { // a name must never outlive its content
		err = f.Sync()
	}
	f.Close()
	if err == nil {
		err = dir.Rename(next, dir, name, 0)
	}
	if err != nil {
		_ = dir.Unlink(next, 0)
	}
	return err
}
