package native

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
)

// What a layer is; drivers/doc.go has the life cycle.
const (
	writable  = "writable"
	view      = "view"
	committed = "committed"
)

const stateFile = "state"

// state is the marker of a layer, in the file l/ID/state. A layer whose marker
// cannot be read (a power cut took what was never flushed) is ErrDataLoss to all
// but Remove and IDs.
type state struct {
	Kind    string         `json:"kind"`
	Parents []string       `json:"parents,omitempty"` // as Create was told, nearest first
	IDMap   *drivers.IDMap `json:"idmap,omitempty"`
}

func newState(r drivers.Ref, o drivers.CreateOptions) state {
	s := state{Kind: writable, Parents: idStrings(r.Parents)}
	if o.ReadOnly {
		s.Kind = view
	}
	if !o.IDMap.IsZero() {
		s.IDMap = &o.IDMap
	}
	return s
}

func idStrings(ids []drivers.ID) []string {
	var ss []string
	for _, id := range ids {
		ss = append(ss, id.String())
	}
	return ss
}

// sameParents refuses a commit onto other parents than the copy was made of.
func (s *state) sameParents(ids []drivers.ID) error {
	if got := idStrings(ids); !slices.Equal(got, s.Parents) {
		return fmt.Errorf("made on %v, committed on %v: a copy has its parents for good: %w", s.Parents, got, errdefs.ErrInvalidArgument)
	}
	return nil
}

// readState reads the marker of the layer directory l.
func readState(l *sys.Fd) (state, error) {
	f, err := l.Openat(stateFile, sys.O_RDONLY, 0)
	if errors.Is(err, syscall.ENOENT) {
		return state{}, fmt.Errorf("no %s file: %w: %w", stateFile, errdefs.ErrDataLoss, err)
	}
	if err != nil {
		return state{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return state{}, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, fmt.Errorf("%s file: %w: %w", stateFile, errdefs.ErrDataLoss, err)
	}
	return s, nil
}

// writeState replaces the marker in one step. durable: the new marker, and with
// it the rename, has reached the disk when it returns.
func writeState(l *sys.Fd, s state, durable bool) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	const next = stateFile + ".new"
	f, err := l.Openat(next, sys.O_WRONLY|sys.O_CREAT|sys.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	if durable { // a name must never outlive its content
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := l.Rename(next, l, stateFile, 0); err != nil {
		return err
	}
	if durable {
		return l.Sync()
	}
	return nil
}
