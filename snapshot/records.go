package snapshot

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/layerctl/layerctl/drivers"
)

// The buckets of db.bolt. Numbers in keys are eight bytes, big end first, so
// that their order is the numbers'. See ARCHITECTURE.md, "Records".
var (
	bucketMeta     = []byte("meta")     // "next" -> ID, "driver" -> name
	bucketViews    = []byte("views")    // view -> bucket: key -> name record
	bucketLayers   = []byte("layers")   // ID -> layer record
	bucketNames    = []byte("names")    // ID, view, 0, key -> "": who names a layer
	bucketParents  = []byte("parents")  // ID -> parent ID
	bucketChildren = []byte("children") // parent ID, ID -> ""
	bucketDebts    = []byte("debts")    // ID -> debt: bytes to be removed
	bucketIntents  = []byte("intents")  // ID -> intent: a Commit in progress
	bucketLeases   = []byte("leases")   // first ID -> lease
	bucketPending  = []byte("pending")  // ID -> "": committed, listing to be computed
	bucketMoves    = []byte("moves")    // ID -> move: the copy of a layer by another driver

	metaNext   = []byte("next")
	metaDriver = []byte("driver")
)

// name is a record of a view: what a key says.
type name struct {
	ID      drivers.ID        `json:"id"`
	Kind    snapshots.Kind    `json:"-"`
	K       uint8             `json:"kind"` // Kind as a number
	Parent  string            `json:"parent,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created int64             `json:"created"` // nanoseconds since 1970
	Updated int64             `json:"updated"`
}

// layerRecord is the state of one layer, whoever names it.
type layerRecord struct {
	Driver    string        `json:"driver"`
	Committed bool          `json:"committed,omitempty"`
	ReadOnly  bool          `json:"read_only,omitempty"` // made as a view
	Volatile  bool          `json:"volatile,omitempty"`  // committed without flushing
	Exposed   bool          `json:"exposed,omitempty"`   // mounts were handed out while writable
	Bytes     int64         `json:"bytes,omitempty"`     // drivers.Usage of a committed layer
	Inodes    int64         `json:"inodes,omitempty"`
	Created   int64         `json:"created"`
	Digest    digest.Digest `json:"digest,omitempty"`  // tree digest, of listings/ID
	Applied   bool          `json:"applied,omitempty"` // Digest is of the one Apply onto a layer not yet committed
	Quota     int64         `json:"quota,omitempty"`   // that it was made with; until it is committed
}

// debt is a layer without a name, whose bytes are to be removed.
type debt struct {
	Since  int64  `json:"since"`
	Reason string `json:"reason"` // for people: "removed", "migrated"
}

// intent is a Commit in progress.
type intent struct {
	View     string            `json:"view"`
	Key      string            `json:"key"`
	Name     string            `json:"name"`
	Parent   string            `json:"parent,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Volatile bool              `json:"volatile,omitempty"`
	Owner    owner             `json:"owner"`
}

// lease is a block of IDs [first, End) that a process may use.
type lease struct {
	End   drivers.ID `json:"end"`
	Owner owner      `json:"owner"`
}

// owner says for people who did something; whether he lives, his locks say.
type owner struct {
	PID   int       `json:"pid"`
	Comm  string    `json:"comm"`
	Boot  string    `json:"boot"` // /proc/sys/kernel/random/boot_id
	Since time.Time `json:"since"`
}

func (o owner) String() string { return fmt.Sprintf("process %d (%s)", o.PID, o.Comm) }

func (n *name) info(key string) snapshots.Info {
	return snapshots.Info{
		Kind: n.Kind, Name: key, Parent: n.Parent, Labels: n.Labels,
		Created: time.Unix(0, n.Created).UTC(), Updated: time.Unix(0, n.Updated).UTC(),
	}
}

// txn is a transaction in terms of records.
type txn struct {
	tx    *bolt.Tx
	dirty bool // something was written
}

func idKey(ids ...drivers.ID) []byte {
	b := make([]byte, 0, 8*len(ids))
	for _, id := range ids {
		b = binary.BigEndian.AppendUint64(b, uint64(id))
	}
	return b
}

func keyID(b []byte) drivers.ID {
	if len(b) < 8 {
		return 0
	}
	return drivers.ID(binary.BigEndian.Uint64(b))
}

func namesKey(id drivers.ID, view, key string) []byte {
	return append(append(append(idKey(id), view...), 0), key...)
}

func (t *txn) get(bucket, key []byte) []byte {
	b := t.tx.Bucket(bucket)
	if b == nil {
		return nil
	}
	return b.Get(key)
}

func (t *txn) put(bucket, key, value []byte) error {
	t.dirty = true
	b, err := t.tx.CreateBucketIfNotExists(bucket)
	if err != nil {
		return dbError("write", err)
	}
	return dbError("write", b.Put(key, value))
}

func (t *txn) delete(bucket, key []byte) error {
	b := t.tx.Bucket(bucket)
	if b == nil || b.Get(key) == nil {
		return nil
	}
	t.dirty = true
	return dbError("write", b.Delete(key))
}

// decodeID decodes a record of a bucket whose keys begin with an ID, which err names.
func decodeID(b, bucket, key []byte, v any) (bool, error) {
	return decode(b, fmt.Sprintf("%s %s", bytes.TrimSuffix(bucket, []byte("s")), keyID(key)), v)
}

// decode decodes a record of what into v and reports whether it is there.
func decode(b []byte, what string, v any) (bool, error) {
	if b == nil {
		return false, nil
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("record of %s: %w: %w", what, errdefs.ErrDataLoss, err)
	}
	return true, nil
}

func (t *txn) putJSON(bucket, key []byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("record in %s: %w", bucket, err)
	}
	return t.put(bucket, key, b)
}

// each calls fn for every entry of a bucket, in order of the keys. fn must not
// change the bucket and must copy what it keeps.
func (t *txn) each(bucket []byte, fn func(k, v []byte) error) error {
	b := t.tx.Bucket(bucket)
	if b == nil {
		return nil
	}
	return b.ForEach(fn)
}

// eachPrefix is each for the keys that begin with prefix.
func (t *txn) eachPrefix(bucket, prefix []byte, fn func(k, v []byte) error) error {
	b := t.tx.Bucket(bucket)
	if b == nil {
		return nil
	}
	c := b.Cursor()
	for k, v := c.Seek(prefix); k != nil && len(k) >= len(prefix) && string(k[:len(prefix)]) == string(prefix); k, v = c.Next() {
		if err := fn(k, v); err != nil {
			return err
		}
	}
	return nil
}

// view returns the bucket of a view, nil if it never held a record.
func (t *txn) view(view string) *bolt.Bucket {
	b := t.tx.Bucket(bucketViews)
	if b == nil {
		return nil
	}
	return b.Bucket([]byte(view))
}

// name reads a record of a view; nil if there is none.
func (t *txn) name(view, key string) (*name, error) {
	b := t.view(view)
	if b == nil {
		return nil, nil
	}
	return decodeName(view, key, b.Get([]byte(key)))
}

func decodeName(view, key string, b []byte) (*name, error) {
	n := &name{}
	ok, err := decode(b, fmt.Sprintf("%s/%q", view, key), n)
	if !ok {
		return nil, err
	}
	n.Kind = snapshots.Kind(n.K)
	return n, nil
}

// putName writes a record of a view and, for a new one, who names its layer.
func (t *txn) putName(view, key string, n *name) error {
	t.dirty = true
	n.K = uint8(n.Kind)
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("record of %q: %w", key, err)
	}
	views, err := t.tx.CreateBucketIfNotExists(bucketViews)
	if err != nil {
		return dbError("write", err)
	}
	v, err := views.CreateBucketIfNotExists([]byte(view))
	if err != nil {
		return dbError("write", err)
	}
	if err := v.Put([]byte(key), b); err != nil {
		return dbError("write", err)
	}
	return t.put(bucketNames, namesKey(n.ID, view, key), []byte{})
}

func (t *txn) deleteName(view, key string, id drivers.ID) error {
	t.dirty = true
	if err := t.view(view).Delete([]byte(key)); err != nil {
		return dbError("write", err)
	}
	return t.delete(bucketNames, namesKey(id, view, key))
}

// layer reads the record of a layer; nil if there is none.
func (t *txn) layer(id drivers.ID) (*layerRecord, error) {
	l := &layerRecord{}
	ok, err := decodeID(t.get(bucketLayers, idKey(id)), bucketLayers, idKey(id), l)
	if !ok {
		return nil, err
	}
	return l, nil
}

// eachLayer calls fn for every layer, debts among them. It leaves out damaged
// records, which Check finds.
func (t *txn) eachLayer(fn func(id drivers.ID, l *layerRecord) error) error {
	return t.each(bucketLayers, func(k, v []byte) error {
		var l layerRecord
		if ok, err := decodeID(v, bucketLayers, k, &l); err != nil || !ok {
			return nil
		}
		return fn(keyID(k), &l)
	})
}

func (t *txn) isDebt(id drivers.ID) bool { return t.get(bucketDebts, idKey(id)) != nil }

func (t *txn) putLayer(id drivers.ID, l *layerRecord) error {
	return t.putJSON(bucketLayers, idKey(id), l)
}

func (t *txn) setParent(id, parent drivers.ID) error {
	if err := t.put(bucketParents, idKey(id), idKey(parent)); err != nil {
		return err
	}
	return t.put(bucketChildren, idKey(parent, id), []byte{})
}

// deleteLayer forgets a layer whose bytes are gone.
func (t *txn) deleteLayer(id drivers.ID) error {
	if p := t.parent(id); p != 0 {
		if err := t.delete(bucketChildren, idKey(p, id)); err != nil {
			return err
		}
	}
	for _, b := range [][]byte{bucketParents, bucketLayers, bucketDebts, bucketPending, bucketIntents} {
		if err := t.delete(b, idKey(id)); err != nil {
			return err
		}
	}
	return nil
}

func (t *txn) parent(id drivers.ID) drivers.ID { return keyID(t.get(bucketParents, idKey(id))) }

// maxChain bounds the walk along parents, which a damaged database could close
// to a ring.
const maxChain = 1 << 16

// ref returns a layer with the chain below it.
func (t *txn) ref(id drivers.ID) (drivers.Ref, error) {
	r := drivers.Ref{ID: id}
	for p := t.parent(id); p != 0; p = t.parent(p) {
		if len(r.Parents) == maxChain {
			return r, fmt.Errorf("layer %s: more than %d parents: %w", id, maxChain, errdefs.ErrDataLoss)
		}
		r.Parents = append(r.Parents, p)
	}
	return r, nil
}

// children returns the layers directly above id, debts among them.
func (t *txn) children(id drivers.ID) (ids []drivers.ID) {
	_ = t.eachPrefix(bucketChildren, idKey(id), func(k, _ []byte) error {
		if len(k) == 16 {
			ids = append(ids, keyID(k[8:]))
		}
		return nil
	})
	return ids
}

// layerName is one name of a layer.
type layerName struct{ View, Key string }

// namesOf returns who names a layer.
func (t *txn) namesOf(id drivers.ID) (names []layerName) {
	_ = t.eachPrefix(bucketNames, idKey(id), func(k, _ []byte) error {
		if n, ok := parseNamesKey(k); ok {
			names = append(names, n)
		}
		return nil
	})
	return names
}

func parseNamesKey(k []byte) (layerName, bool) {
	for i := 8; i < len(k); i++ {
		if k[i] == 0 {
			return layerName{string(k[8:i]), string(k[i+1:])}, true
		}
	}
	return layerName{}, false
}
