package layer

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/internal/treegen"
)

var epoch = time.Unix(1_500_000_000, 0)

// Each kind of file system has its own inode numbers, link counts of
// directories, time stamps and xattr limits.
func TestRoundTripFileSystems(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := testenv.FS(t, kind)
			for seed := range uint64(12) {
				gen := treegen.New(rand.New(rand.NewPCG(seed, 1)), treegen.Config{Root: true, Sockets: true})
				base, more := gen.Ops(120), gen.Ops(60)
				if err := checkRoundTrip(t, dir, base, more); err != nil {
					t.Fatalf("seed %d: %s", seed, failure(t, dir, base, more, err))
				}
			}
		})
	}
}
