package metadata

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
)

// tool runs one of thin-provisioning-tools on metadata, which is the oracle here.
func tool(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(testenv.Program(t, name, "thin-provisioning-tools"), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, stderr.Bytes())
	}
	return out
}

// forTools returns the name by which the tools can open a file: they insist on O_DIRECT, which tmpfs has since Linux 6.6.
func forTools(t testing.TB, file string) (name string, done func()) {
	t.Helper()
	d, err := os.OpenFile(file, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err == nil {
		d.Close()
		return file, func() {}
	}
	l, err := sys.AttachLoop(file, sys.LoopOptions{Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	return l.Name(), func() { l.Close() }
}

// restore makes metadata of what thin_dump would say of it.
func restore(t testing.TB, xml string, size int64) []byte {
	t.Helper()
	dir := testenv.Scratch(t)
	in, out := filepath.Join(dir, "xml"), filepath.Join(dir, "metadata")
	if err := errors.Join(os.WriteFile(in, []byte(xml), 0o600), os.WriteFile(out, nil, 0o600), os.Truncate(out, size)); err != nil {
		t.Fatal(err)
	}
	name, done := forTools(t, out)
	tool(t, "thin_restore", "-q", "-i", in, "-o", name)
	done()
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// model is a pool as a test wants it: virtual block to data block and time.
type model map[ID]map[uint64][2]uint64

func (m model) xml() string {
	var s strings.Builder
	s.WriteString("<superblock uuid=\"\" time=\"9\" transaction=\"77\" data_block_size=\"128\" nr_data_blocks=\"1048576\">\n")
	for _, id := range sorted(m) {
		fmt.Fprintf(&s, "<device dev_id=\"%d\" mapped_blocks=\"%d\" transaction=\"%d\" creation_time=\"3\" snap_time=\"4\">\n", id, len(m[id]), id)
		for _, v := range sorted(m[id]) {
			fmt.Fprintf(&s, "<single_mapping origin_block=\"%d\" data_block=\"%d\" time=\"%d\"/>\n", v, m[id][v][0], m[id][v][1])
		}
		s.WriteString("</device>\n")
	}
	return s.String() + "</superblock>\n"
}

func sorted[K ~uint32 | ~uint64, V any](m map[K]V) []K {
	var ks []K
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}

// delta is the naive comparison.
func (m model) delta(left, right ID) []string {
	all := map[uint64]bool{}
	for v := range m[left] {
		all[v] = true
	}
	for v := range m[right] {
		all[v] = true
	}
	var out []string
	for _, v := range sorted(all) {
		l, inLeft := m[left][v]
		r, inRight := m[right][v]
		switch {
		case !inRight:
			out = append(out, fmt.Sprint(v, " ", LeftOnly))
		case !inLeft:
			out = append(out, fmt.Sprint(v, " ", RightOnly))
		case l[0] != r[0]:
			out = append(out, fmt.Sprint(v, " ", Differ))
		}
	}
	return out
}

func ours(t testing.TB, p *Pool, left, right ID) []string {
	t.Helper()
	var out []string
	last := Range{}
	for r, err := range p.Delta(left, right) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Length == 0 || last.Length > 0 && (r.Begin < last.Begin+last.Length || r.Begin == last.Begin+last.Length && r.Kind == last.Kind) {
			t.Fatalf("%+v after %+v", r, last)
		}
		last = r
		for i := range r.Length {
			out = append(out, fmt.Sprint(r.Begin+i, " ", r.Kind))
		}
	}
	return out
}

// theirs is what thin_delta says.
func theirs(t testing.TB, file string, left, right ID, args ...string) []string {
	t.Helper()
	text := tool(t, "thin_delta", append(args, "--snap1", fmt.Sprint(left), "--snap2", fmt.Sprint(right), file)...)
	var out []string
	kinds := map[string]Kind{"left_only": LeftOnly, "right_only": RightOnly, "different": Differ}
	for d := xml.NewDecoder(bytes.NewReader(text)); ; {
		tok, err := d.Token()
		if err != nil {
			break
		}
		e, ok := tok.(xml.StartElement)
		if !ok || kinds[e.Name.Local] == 0 {
			continue
		}
		var begin, length uint64
		for _, a := range e.Attr {
			switch a.Name.Local {
			case "begin":
				fmt.Sscan(a.Value, &begin)
			case "length":
				fmt.Sscan(a.Value, &length)
			}
		}
		for i := range length {
			out = append(out, fmt.Sprint(begin+i, " ", kinds[e.Name.Local]))
		}
	}
	return out
}

func same(t testing.TB, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s: got\n%v\nwant\n%v", what, got, want)
	}
}

// agree compares all that is said of the devices with the model, and of some pairs
// with thin_delta.
func agree(t *testing.T, r *rand.Rand, b []byte, p *Pool, m model, args ...string) {
	t.Helper()
	ids := sorted(m)
	for _, id := range ids {
		got := map[uint64][2]uint64{}
		for run, err := range p.Mappings(id) {
			if err != nil {
				t.Fatal(err)
			}
			for i := range run.Length {
				got[run.Virtual+i] = [2]uint64{run.Data + i, uint64(run.Time)}
			}
		}
		same(t, fmt.Sprint("mappings of ", id), got, m[id])
	}
	name := filepath.Join(testenv.Scratch(t), "metadata")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	file, done := forTools(t, name)
	defer done()
	for range 5 {
		left, right := ids[r.IntN(len(ids))], ids[r.IntN(len(ids))]
		want := m.delta(left, right)
		what := fmt.Sprintf("delta of %d and %d", left, right)
		same(t, what, ours(t, p, left, right), want)
		same(t, what+" by thin_delta", theirs(t, file, left, right, args...), want)
		own, err := p.Exclusive(right, left)
		if err != nil {
			t.Fatal(err)
		}
		n := slices.DeleteFunc(want, func(s string) bool { return strings.HasSuffix(s, LeftOnly.String()) })
		same(t, "exclusive", int(own), len(n))
	}
}

// random draws mappings in runs, some far apart.
func random(r *rand.Rand) map[uint64][2]uint64 {
	m := map[uint64][2]uint64{}
	v := uint64(0)
	for range r.IntN(60) {
		v += r.Uint64N(1 << r.IntN(20))
		d, time := r.Uint64N(dataBlocks-200), r.Uint64N(4)
		for range 1 + r.Uint64N(100) {
			m[v] = [2]uint64{d, time}
			v++
			d++
		}
	}
	return m
}

func TestWhatThinRestoreMakesIsReadAsThinDeltaReadsIt(t *testing.T) {
	testenv.AnyKernel(t)
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 1))
		m := model{}
		for range 2 + r.IntN(6) {
			m[ID(r.Uint32N(uint32(MaxID)))] = random(r)
		}
		for id := range m { // one that is much like another
			c := map[uint64][2]uint64{}
			for v, d := range m[id] {
				if r.IntN(20) > 0 {
					c[v] = d
				}
				if r.IntN(20) == 0 {
					c[v+uint64(r.IntN(3))] = [2]uint64{r.Uint64N(dataBlocks), 5}
				}
			}
			m[(id+1)&MaxID] = c
			break
		}
		b := restore(t, m.xml(), 4<<20)
		p, err := Open(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		sb := p.Superblock()
		same(t, "superblock", []any{sb.Transaction, sb.Time, sb.DataBlockSize, sb.DataSpace.Blocks, sb.MetadataSpace.Blocks, sb.HeldRoot, sb.NeedsCheck},
			[]any{uint64(77), uint32(9), uint32(128), uint64(dataBlocks), uint64(1024), uint64(0), false})
		var want, got []Device
		for _, id := range sorted(m) {
			want = append(want, Device{ID: id, Mapped: uint64(len(m[id])), Transaction: uint64(id), Created: 3, Snapshotted: 4})
		}
		for d, err := range p.Devices() {
			if err != nil {
				t.Fatal(err)
			}
			one, err := p.Device(d.ID)
			if err != nil || one != d {
				t.Fatalf("device %+v, %v; in the list %+v", one, err, d)
			}
			got = append(got, d)
		}
		same(t, "devices", got, want)
		agree(t, r, b, p, m)
		sound(t, "check", b, m)
	}
}

// history writes, discards and takes snapshots at random.
func history(r *rand.Rand, im *image, m model, steps int) {
	for i := range steps {
		ids := sorted(m)
		switch id := ID(0); {
		case len(ids) == 0 || len(ids) < 9 && r.IntN(200) == 0:
			id = ID(len(ids) + 1)
			if len(ids) == 0 || r.IntN(4) == 0 {
				im.create(id)
				m[id] = map[uint64][2]uint64{}
				continue
			}
			origin := ids[r.IntN(len(ids))]
			im.snapshot(id, origin)
			m[id] = map[uint64][2]uint64{}
			for v, d := range m[origin] {
				m[id][v] = d
			}
		default:
			id = ids[r.IntN(len(ids))]
			if len(ids) > 1 && r.IntN(3) > 0 {
				id = ids[len(ids)-1]
			}
			v := r.Uint64N(1 << (1 + r.IntN(12)))
			if r.IntN(3) == 0 {
				im.unset(id, v)
				delete(m[id], v)
				continue
			}
			im.set(id, v, uint64(i))
			m[id][v] = [2]uint64{uint64(i), 1}
		}
	}
	im.commit()
}

func TestTreesThatShareNodesAreReadAsThinDeltaReadsThem(t *testing.T) {
	testenv.AnyKernel(t)
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 2))
		im := newImage(t, 4096, []int{6, 9, 24, 252}[seed%4])
		m := model{}
		history(r, im, m, 3000)
		p, err := Open(im)
		if err != nil {
			t.Fatal(err)
		}
		agree(t, r, im.b, p, m)
	}
}

func TestTheMetadataSnapshotStaysAsItWas(t *testing.T) {
	testenv.AnyKernel(t)
	r := rand.New(rand.NewPCG(1, 3))
	im := newImage(t, 4096, 6)
	m := model{}
	history(r, im, m, 3000)
	p, err := Open(im)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Snapshot(); !errdefs.IsNotFound(err) {
		t.Fatalf("without a snapshot: %v", err)
	}
	im.hold()
	now := model{}
	for id := range m {
		now[id] = map[uint64][2]uint64{}
		for v, d := range m[id] {
			now[id][v] = d
		}
	}
	history(r, im, now, 1000)
	if p, err = Open(im); err != nil {
		t.Fatal(err)
	}
	agree(t, r, im.b, p, now)
	s, err := p.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	same(t, "root", s.Superblock().Block, p.Superblock().HeldRoot)
	agree(t, r, im.b, s, m, "-m")
}

// TestDeltaReadsWhatChanged: of two devices of fifty thousand blocks that differ
// at ten, few nodes are read.
func TestDeltaReadsWhatChanged(t *testing.T) {
	testenv.AnyKernel(t)
	im := newImage(t, 4096, 252)
	im.create(1)
	for v := range uint64(50_000) {
		im.set(1, v, v)
	}
	im.snapshot(2, 1)
	want := []string{}
	for i := range uint64(10) {
		im.set(2, i*4_999, 500_000+i)
		want = append(want, fmt.Sprint(i*4_999, " ", Differ))
	}
	im.commit()
	p, err := Open(im)
	if err != nil {
		t.Fatal(err)
	}
	im.reads = 0
	same(t, "delta", ours(t, p, 1, 2), want)
	if im.reads > 2*(10+4+1)+10 { // three levels: ten leaves changed, below four nodes, below the root
		t.Errorf("%d blocks of %d were read for 10 changes", im.reads, im.next)
	}
	im.reads = 0
	same(t, "delta with itself", ours(t, p, 1, 1), []string(nil))
	if im.reads > 2 {
		t.Errorf("%d blocks were read to see that a device is itself", im.reads)
	}
}

func TestDeltaMayBeLeft(t *testing.T) {
	im := newImage(t, 1024, 3)
	im.create(1)
	im.create(2)
	for v := range uint64(100) {
		im.set(1, 2*v, v)
	}
	im.commit()
	p, err := Open(im)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for r, err := range p.Delta(1, 2) {
		if err != nil || r != (Range{LeftOnly, uint64(2 * n), 1}) {
			t.Fatalf("%+v, %v", r, err)
		}
		if n++; n == 5 {
			break
		}
	}
	for range p.Mappings(1) {
		break
	}
	for range p.Devices() {
		break
	}
}
