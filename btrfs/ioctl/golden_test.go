package ioctl

import (
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

// want compares an encoded struct with bytes in hex, the zeros at its end left
// out, and its size.
func want(t *testing.T, what string, got []byte, size int, golden string) {
	t.Helper()
	if len(got) != size {
		t.Errorf("%s: %d bytes, want %d", what, len(got), size)
	}
	h := strings.TrimRight(hex.EncodeToString(got), "0")
	if golden = strings.ReplaceAll(golden, " ", ""); h != strings.TrimRight(golden, "0") {
		t.Errorf("%s:\n%s, want\n%s", what, h, golden)
	}
}

// The bytes are those that a C compiler gives for the structs of linux/btrfs.h.
func TestGoldenRequests(t *testing.T) {
	want(t, "vol_args", volArgs("ab"), 4096, "0000000000000000 6162")
	want(t, "vol_args_v2", volArgsV2(7, BTRFS_SUBVOL_RDONLY, "ab"), 4096,
		"0700000000000000 0000000000000000 0200000000000000"+strings.Repeat("00", 32)+"6162")
	want(t, "send_args", sendArgs(5, 0x102, 1), 72,
		"0500000000000000 0000000000000000 0000000000000000 0201000000000000 0100000000000000")
	want(t, "qgroup_limit_args", limitArgs(0x101, QgroupUsage{Referenced: 0x2000, Exclusive: 0x1000}), 48,
		"0101000000000000 0300000000000000 0020000000000000 0010000000000000")
	want(t, "qgroup_limit_args, no limit", limitArgs(0, QgroupUsage{}), 48,
		"0000000000000000 0300000000000000 ffffffffffffffff ffffffffffffffff")
	b := make([]byte, 112+16)
	encodeSearch(b, Query{Tree: 1, Min: Key{2, 3, 4}, Max: Key{5, 6, 7}, MinGeneration: 8})
	want(t, "search_args_v2", b, 128,
		"0100000000000000 0200000000000000 0500000000000000 0400000000000000 0700000000000000 0800000000000000"+
			"ffffffffffffffff 03000000 06000000 ffffffff"+strings.Repeat("00", 36)+"1000000000000000")
}

func TestRequestNumbersHoldTheirSizes(t *testing.T) {
	for name, r := range map[string][2]uint32{
		"SNAP_CREATE_V2": {BTRFS_IOC_SNAP_CREATE_V2, 4096}, "TREE_SEARCH_V2": {BTRFS_IOC_TREE_SEARCH_V2, 112},
		"SEND": {BTRFS_IOC_SEND, 72}, "GET_SUBVOL_INFO": {BTRFS_IOC_GET_SUBVOL_INFO, 504},
		"FS_INFO": {BTRFS_IOC_FS_INFO, 1024}, "QGROUP_LIMIT": {BTRFS_IOC_QGROUP_LIMIT, 48},
		"SUBVOL_SYNC_WAIT": {BTRFS_IOC_SUBVOL_SYNC_WAIT, 16},
	} {
		if r[0]>>16&0x3fff != r[1] || r[0]>>8&0xff != 0x94 {
			t.Errorf("%s is %#x, want %d bytes of magic 0x94", name, r[0], r[1])
		}
	}
}

func TestGoldenAnswers(t *testing.T) {
	b := make([]byte, 504)
	le.PutUint64(b, 257)
	copy(b[8:], "name")
	le.PutUint64(b[264:], 5)
	le.PutUint64(b[272:], 256)
	le.PutUint64(b[280:], 9)
	le.PutUint64(b[288:], 1)
	b[296], b[312] = 1, 2
	le.PutUint64(b[352:], 8)
	got := decodeSubvol(b)
	w := Subvol{ID: 257, Name: "name", Parent: 5, Dir: 256, Generation: 9, ReadOnly: true, Born: 8, UUID: [16]byte{1}, ParentUUID: [16]byte{2}}
	if got != w {
		t.Errorf("%+v, want %+v", got, w)
	}
	x := make([]byte, 53)
	le.PutUint64(x, 7)
	x[20] = 1
	le.PutUint64(x[21:], 4096)
	le.PutUint64(x[29:], 8192)
	le.PutUint64(x[37:], 512)
	if e, err := DecodeExtent(x); err != nil || e != (Extent{Generation: 7, Disk: 4096, DiskBytes: 8192, Offset: 512}) {
		t.Errorf("%+v, %v", e, err)
	}
	x[20] = 0
	if e, err := DecodeExtent(x[:24]); err != nil || !e.Inline || e.DiskBytes != 3 {
		t.Errorf("inline: %+v, %v", e, err)
	}
	ref := append([]byte{2, 0, 0, 0, 0, 0, 0, 0, 1, 0}, "a\x03\x00\x00\x00\x00\x00\x00\x00\x02\x00bc"...)
	names, err := DecodeNames(Item{Key: Key{Type: BTRFS_INODE_REF_KEY, Offset: 256}, Data: ref})
	if err != nil || !reflect.DeepEqual(names, []FileName{{256, "a"}, {256, "bc"}}) {
		t.Errorf("%v, %v", names, err)
	}
	ext := append([]byte{5, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0}, 'z')
	names, err = DecodeNames(Item{Key: Key{Type: BTRFS_INODE_EXTREF_KEY}, Data: ext})
	if err != nil || !reflect.DeepEqual(names, []FileName{{261, "z"}}) {
		t.Errorf("%v, %v", names, err)
	}
}

func TestShortAnswersAreErrors(t *testing.T) {
	_, e1 := DecodeInode(make([]byte, 159))
	_, e2 := DecodeExtent(make([]byte, 20))
	x := make([]byte, 52)
	x[20] = 1
	_, e3 := DecodeExtent(x)
	_, e4 := DecodeNames(Item{Key: Key{Type: BTRFS_INODE_REF_KEY}, Data: []byte{1, 2, 3}})
	_, e5 := DecodeNames(Item{Key: Key{Type: BTRFS_INODE_REF_KEY}, Data: []byte{0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 'a'}})
	_, e6 := eachItem(make([]byte, 31), 1, nil)
	long := make([]byte, 32)
	le.PutUint32(long[28:], 1)
	_, e7 := eachItem(long, 1, nil)
	for i, err := range []error{e1, e2, e3, e4, e5, e6, e7} {
		if !errors.Is(err, syscall.EBADMSG) {
			t.Errorf("%d: %v, want EBADMSG", i+1, err)
		}
	}
}

func TestKeyAfter(t *testing.T) {
	for _, c := range []struct{ k, next Key }{
		{Key{1, 2, 3}, Key{1, 2, 4}},
		{Key{1, 2, ^uint64(0)}, Key{1, 3, 0}},
		{Key{1, 255, ^uint64(0)}, Key{2, 0, 0}},
	} {
		if got, more := after(c.k); !more || got != c.next {
			t.Errorf("after %v: %v, %v; want %v", c.k, got, more, c.next)
		}
	}
	if _, more := after(Key{^uint64(0), 255, ^uint64(0)}); more {
		t.Error("something after the last key")
	}
}
