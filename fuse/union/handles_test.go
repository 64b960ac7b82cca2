package union

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// tableTest is a table of handles, and who ever had which number and generation.
type tableTest struct {
	t     *testing.T
	dir   *sys.Fd
	path  string
	table *handleTable
	of    map[testHandle]uint64
	have  map[uint64]testHandle // what is in the table, as far as nothing was lost
}

// newTableTest makes a table in a directory of its own.
func newTableTest(t *testing.T) *tableTest {
	t.Helper()
	path := t.TempDir()
	dir, err := sys.OpenDir(path)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	x := &tableTest{t: t, dir: dir, path: filepath.Join(path, handlesName), of: map[testHandle]uint64{}, have: map[uint64]testHandle{}}
	x.open()
	return x
}

func object(n uint64) *fileID {
	id := &fileID{inUpper: n%2 == 0}
	id.handle.Type, id.handle.Len = 1, 8
	binary.LittleEndian.PutUint64(id.handle.Data[:], n+1)
	return id
}

func (x *tableTest) open() {
	x.t.Helper()
	var err error
	x.table, err = openHandles(x.dir, [16]byte{1}, false, func(id *fileID) bool {
		_, ok := x.have[binary.LittleEndian.Uint64(id.handle.Data[:])-1]
		return ok
	})
	must(x.t, err)
}

func (x *tableTest) number(n uint64) {
	x.t.Helper()
	number, generation, err := x.table.number(object(n))
	must(x.t, err)
	h := testHandle{number, generation}
	if was, ok := x.of[h]; ok && was != n {
		x.t.Fatalf("%v is of %d, and was of %d", h, n, was)
	}
	if was, ok := x.have[n]; ok && was != h {
		x.t.Fatalf("%d has %v, and had %v", n, h, was)
	}
	x.of[h], x.have[n] = n, h
}

// check: every pair of number and generation leads to what it was given for, or
// nowhere.
func (x *tableTest) check() {
	x.t.Helper()
	for h, n := range x.of {
		var id fileID
		generation, err := x.table.object(h.id, &id)
		_, there := x.have[n]
		switch {
		case err != nil && err != syscall.ESTALE:
			x.t.Fatal(err)
		case err == nil && generation == h.generation && id != *object(n):
			x.t.Fatalf("%v of %d leads to another object", h, n)
		case there && x.have[n] == h && (err != nil || generation != h.generation):
			x.t.Fatalf("%v of %d leads nowhere: %v", h, n, err)
		}
	}
}

// powerCut takes some of the records back to what they were at an earlier time; what
// was flushed, the header is, stays.
func (x *tableTest) powerCut(earlier []byte, r *rand.Rand) {
	must(x.t, x.table.close())
	b, err := os.ReadFile(x.path)
	must(x.t, err)
	for i := firstPlace * recordSize; i+recordSize <= len(b); i += recordSize {
		if r.IntN(3) == 0 {
			clear(b[i : i+recordSize])
			if i+recordSize <= len(earlier) {
				copy(b[i:i+recordSize], earlier[i:])
			}
		}
	}
	if r.IntN(2) == 0 {
		b = b[:max(recordSize, len(b)-r.IntN(recordSize*4))]
	}
	must(x.t, os.WriteFile(x.path, b, 0o600))
	clear(x.have)
}

// TestHandleTable: numbers come and go, the table is closed and opened, and the power
// is cut; no number with its generation is ever of two objects.
func TestHandleTable(t *testing.T) {
	x := newTableTest(t)
	r := rand.New(rand.NewPCG(1, 2))
	var earlier []byte
	var err error
	last := uint64(0)
	for i := range 60_000 {
		switch k := r.IntN(1000); {
		case k == 0:
			must(t, x.table.close())
			x.open()
		case k == 1:
			earlier, err = os.ReadFile(x.path)
			must(t, err)
		case k == 2:
			x.powerCut(earlier, r)
			x.open()
		case k < 500:
			last++
			x.number(last)
		case k < 600:
			x.number(1 + r.Uint64N(last+1))
		default:
			for n, h := range x.have {
				x.table.drop(h.id)
				delete(x.have, n)
				break
			}
		}
		if i%3000 == 0 {
			x.check()
		}
	}
	x.check()
	st, err := os.Stat(x.path)
	must(t, err)
	t.Logf("%d objects, %d handles, %d bytes, incarnation %d", last, len(x.of), st.Size(), x.table.incarnation)
	must(t, x.table.close())
}

// TestHandleTableGrowsNoFurther: files that come and go take no more room than there
// are of them at a time, and what is gone without a word is found at the next start.
func TestHandleTableGrowsNoFurther(t *testing.T) {
	x := newTableTest(t)
	for i := range uint64(20 * fewFreed) {
		x.number(i)
		x.table.drop(x.have[i].id)
		delete(x.have, i)
	}
	if x.table.next > 3*fewFreed {
		t.Errorf("%d places for one file at a time", x.table.next)
	}
	for i := range uint64(2 * fewHandles) {
		x.number(i)
	}
	must(t, x.table.close())
	for i := range uint64(2*fewHandles - 10) {
		delete(x.have, i)
	}
	x.open()
	if n := len(x.table.places); n != 10 {
		t.Errorf("%d are left of 10", n)
	}
	x.check()
	must(t, x.table.close())
	var err error
	x.table, err = openHandles(x.dir, [16]byte{2}, false, nil) // of other layers
	must(t, err)
	x.have = map[uint64]testHandle{}
	x.check()
	x.number(5)
	must(t, x.table.close())
}

// TestRecallWhileFilesGo: files come and go, so that inode numbers are used again at
// once, while handles of them are opened: none leads to another file.
func TestRecallWhileFilesGo(t *testing.T) {
	testenv.Root(t)
	c := layersFor(t, testenv.FS(t, "ext4"), 1, Config{Index: true, NFSExport: true}, func(l []string) { put(t, l[0], "d/low", "x") })
	u := openUnion(t, c)
	var mu sync.Mutex
	var given []testHandle
	content := map[testHandle]string{}
	end := make(chan struct{})
	var makers, openers sync.WaitGroup
	for g := range 2 {
		makers.Go(func() {
			for i := range 400 {
				p := "d/f" + strconv.Itoa(g)
				must(t, u.create(p, p+" "+strconv.Itoa(i)))
				var h testHandle
				must(t, u.walk(p, func(n *Node) error { h = testHandle{n.ID(), n.Generation()}; return nil }))
				mu.Lock()
				given, content[h] = append(given, h), p+" "+strconv.Itoa(i)
				mu.Unlock()
				switch i % 3 {
				case 0:
					must(t, u.rename(p, p+"x", 0))
				case 1:
					must(t, u.unlink(p))
				default:
					must(t, u.create(p+"y"+strconv.Itoa(i), ""))
					must(t, u.rename(p+"y"+strconv.Itoa(i), p, 0))
					must(t, u.unlink(p))
				}
			}
		})
	}
	for g := range 2 {
		openers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 1))
			for {
				select {
				case <-end:
					return
				default:
				}
				mu.Lock()
				var h testHandle
				if n := len(given); n > 0 {
					h = given[n-1-r.IntN(min(n, 4))]
				}
				want := content[h]
				mu.Unlock()
				u.opensAs(h, want)
			}
		})
	}
	makers.Wait()
	close(end)
	openers.Wait()
	u.close()
}

// opensAs opens a file by its handle, which must be stale or of the file that has
// the content.
func (u *unionSide) opensAs(h testHandle, want string) {
	e, err := u.fs.Recall(h.id)
	if err != nil {
		return
	}
	defer u.fs.Forget(h.id, 1)
	if e.Node.Generation() != h.generation {
		return
	}
	f, err := u.fs.Open(Caller{}, e.Node, syscall.O_RDONLY)
	if err != nil {
		return
	}
	defer f.Close()
	b := make([]byte, 100)
	n, err := f.ReadAt(b, 0)
	if err != nil || string(b[:n]) != want {
		u.t.Errorf("the handle of %q leads to %q, %v", want, b[:n], err)
	}
}
