package mount

import (
	"fmt"
	"testing"

	cmount "github.com/containerd/containerd/v2/core/mount"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/testenv"
)

// Mounting and unmounting a writable overlay, ours beside containerd's. Ours
// includes the check that no other mount has the upper.
//
//	go test -run '^$' -bench Overlay ./mount
func BenchmarkOverlay(b *testing.B) {
	for _, n := range []int{1, 10, 50, 120, 500} {
		testenv.Root(b)
		// No file system of its own: containerd's code may leave the process's main
		// thread with its working directory among the lowers.
		fs := testenv.Scratch(b)
		target := dirs(b, fs, "m")[0]
		ms := []Mount{stack(b, fs, n)}
		b.Run(fmt.Sprintf("layerctl/lowers=%d", n), func(b *testing.B) {
			for b.Loop() {
				if err := All(b.Context(), ms, target); err != nil {
					b.Fatal(err)
				}
				if err := Unmount(target, UnmountOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("containerd/lowers=%d", n), func(b *testing.B) {
			for b.Loop() {
				if err := cmount.All(ms, target); err != nil {
					b.Fatal(err)
				}
				if err := cmount.Unmount(target, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A read-only bind, and a detached overlay that is dropped again.
func BenchmarkBind(b *testing.B) {
	fs := testenv.FS(b, "ext4")
	d := dirs(b, fs, "src", "m")
	ms := []Mount{{Type: "bind", Source: d[0], Options: []string{"rbind", "ro"}}}
	b.Run("layerctl", func(b *testing.B) {
		for b.Loop() {
			if err := All(b.Context(), ms, d[1]); err != nil {
				b.Fatal(err)
			}
			if err := Unmount(d[1], UnmountOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("containerd", func(b *testing.B) {
		for b.Loop() {
			if err := cmount.All(ms, d[1]); err != nil {
				b.Fatal(err)
			}
			if err := cmount.Unmount(d[1], 0); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("layerctl-detached", func(b *testing.B) {
		for b.Loop() {
			tree, err := Detached(b.Context(), ms)
			if err != nil {
				b.Fatal(err)
			}
			tree.Close()
		}
	})
}

func BenchmarkParseMountinfo(b *testing.B) {
	fs := testenv.FS(b, "tmpfs")
	mounted(b, dirs(b, fs, "m")[0], stack(b, fs, 500))
	for b.Loop() {
		if _, err := List(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpperInUse(b *testing.B) {
	testenv.Root(b)
	d := dirs(b, testenv.Scratch(b), "u", "w")
	for b.Loop() {
		if a, _, err := UpperInUse(d[0], d[1]); a != kprobe.No || err != nil {
			b.Fatal(a, err)
		}
	}
}
