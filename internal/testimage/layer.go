// Package testimage makes OCI images for tests, out of nothing but a static
// busybox: whole ones of several layers, and broken ones. It shares no code with
// package image, so that the two can be held against each other.
package testimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/layerctl/layerctl/internal/testenv"
)

// Epoch is the time of every file that says no other.
var Epoch = time.Unix(1_735_689_600, 123456789) // 2025-01-01, with nanoseconds

// Layer is the entries of a layer tar, in order.
type Layer []Entry

// Entry is one tar entry. A zero Typeflag is a directory where the name ends in
// "/", else a regular file with Body; zero Mode is 0755 and 0644; zero ModTime is
// Epoch.
type Entry struct {
	tar.Header
	Body string
}

// File, Dir, Symlink, Hardlink, Whiteout, Opaque and Device are the entries that
// tests use most.
func File(name, body string) Entry { return Entry{Header: tar.Header{Name: name}, Body: body} }

// Dir is a directory.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Name: strings.TrimSuffix(name, "/") + "/"}}
}

// Symlink is a symlink to target.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Hardlink is another name of target.
func Hardlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

// Whiteout deletes name.
func Whiteout(name string) Entry {
	dir, base := "", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i+1], name[i+1:]
	}
	return File(dir+".wh."+base, "")
}

// Opaque hides what lower layers have in dir.
func Opaque(dir string) Entry { return File(dir+"/.wh..wh..opq", "") }

// Device is a character device.
func Device(name string, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Devmajor: major, Devminor: minor}}
}

// Tar returns the layer as an uncompressed tar.
func (l Layer) Tar(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range l {
		h := e.header()
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatalf("testimage: %s: %v", e.Name, err)
		}
		if _, err := tw.Write([]byte(e.Body)); err != nil {
			t.Fatalf("testimage: %s: %v", e.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (e Entry) header() tar.Header {
	h := e.Header
	h.Format = tar.FormatPAX
	if h.Typeflag == 0 {
		h.Typeflag = tar.TypeReg
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag = tar.TypeDir
		}
	}
	if h.Mode == 0 {
		h.Mode = 0o644
		if h.Typeflag == tar.TypeDir {
			h.Mode = 0o755
		}
	}
	if h.ModTime.IsZero() {
		h.ModTime = Epoch
	}
	if uid := os.Geteuid(); uid != 0 && h.Uid == 0 && h.Gid == 0 {
		h.Uid, h.Gid = uid, os.Getegid() // what an ordinary user can unpack
	}
	h.Size = int64(len(e.Body))
	return h
}

// compressed keeps what Compress made: tests make the same image many times.
var compressed sync.Map // of [2]string{how, bytes} to []byte

// Compress compresses b as "gzip" or "zstd"; anything else leaves it. The result
// may be shared: do not write to it.
func Compress(t testing.TB, b []byte, how string) []byte {
	t.Helper()
	key := [2]string{how, string(b)}
	if out, ok := compressed.Load(key); ok {
		return out.([]byte)
	}
	out := compress(t, b, how)
	compressed.Store(key, out)
	return out
}

func compress(t testing.TB, b []byte, how string) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how {
	case "gzip":
		w, err = gzip.NewWriterLevel(&out, gzip.BestSpeed)
	case "zstd":
		w, err = zstd.NewWriter(&out)
	default:
		return b
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// Layers returns the layers of the standard image: a busybox system; files of
// every kind; whiteouts, an opaque directory, and types that change. Without
// root, devices and foreign owners are left out.
func Layers(t testing.TB) []Layer {
	t.Helper()
	root := os.Geteuid() == 0
	return []Layer{baseLayer(t), kindsLayer(root), changesLayer(root)}
}

func baseLayer(t testing.TB) Layer {
	b, err := os.ReadFile(testenv.Busybox(t))
	if err != nil {
		t.Fatal(err)
	}
	bb := File("bin/busybox", string(b))
	bb.Mode = 0o755
	l := Layer{Dir("."), Dir("bin"), bb}
	for _, name := range []string{"cat", "cp", "echo", "ls", "mkdir", "rm", "sh", "sleep", "touch"} {
		l = append(l, Symlink("bin/"+name, "busybox"))
	}
	tmp := Dir("tmp")
	tmp.Mode = 0o1777
	return append(l, Dir("dev"), Dir("etc"), File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"), File("etc/old", "old\n"),
		Dir("proc"), Dir("root"), Dir("sys"), tmp,
		Dir("usr"), Dir("usr/share"), Dir("usr/share/doc"), File("usr/share/doc/a", "a\n"), File("usr/share/doc/b", "b\n"),
		File("usr/was-file", "file\n"), Dir("usr/was-dir"), File("usr/was-dir/in", "in\n"))
}

func kindsLayer(root bool) Layer {
	suid := File("srv/setuid", "#!/bin/sh\n")
	suid.Mode = 0o4755
	odd := File("srv/attr", "attr\n")
	odd.PAXRecords = map[string]string{"SCHILY.xattr.user.test": "value", "SCHILY.xattr.user.bytes": "\x00\xff=\n"}
	private := Dir("srv")
	private.Mode = 0o700
	l := Layer{private, odd, File("srv/data", strings.Repeat("data\n", 1000)), Hardlink("srv/hard", "srv/data"), Hardlink("srv/hard2", "srv/data"),
		suid, Symlink("srv/dangling", "../nowhere"), Symlink("srv/abs", "/etc/passwd"),
		File("srv/"+strings.Repeat("n", 255), "long name\n"), File("srv/\xff\xfe not utf-8", "bytes\n"),
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "srv/fifo"}}}
	if !root {
		return l
	}
	own := File("srv/owned", "1234:5678\n")
	own.Uid, own.Gid = 1234, 5678
	capable := File("srv/cap", "cap\n")
	// struct vfs_cap_data, version 2, effective: CAP_NET_RAW permitted.
	capable.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"}
	return append(l, own, capable, Device("srv/null", 1, 3))
}

func changesLayer(root bool) Layer {
	l := Layer{Dir("etc"), Whiteout("etc/old"), File("etc/new", "new\n"),
		Dir("srv"), Whiteout("srv/fifo"),
		Dir("usr"), Dir("usr/share"), Dir("usr/share/doc"), Opaque("usr/share/doc"), File("usr/share/doc/README", "hi\n"),
		Dir("usr/was-file"), File("usr/was-file/now", "dir\n"), File("usr/was-dir", "now a file\n")}
	if root {
		l = append(l, Whiteout("srv/null"))
	}
	return l
}
