package fuse_test

import (
	"testing"

	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/fuse"
	"github.com/layerctl/layerctl/internal/testenv"
)

var config = drivertest.Config{
	Factory:          fuse.Factory(),
	Must:             []string{"Diff", "Apply", "Rebase", "IDMap", "UsageBytes", "UsageInodes", "Reflink:btrfs,xfs"},
	MustUnprivileged: []string{"Diff", "Apply", "Rebase", "UsageBytes", "UsageInodes"},
}

func TestMain(m *testing.M)        { drivertest.Main(m, testenv.FUSEServer) }
func TestDriver(t *testing.T)      { drivertest.Run(t, config) }
func BenchmarkDriver(b *testing.B) { drivertest.Bench(b, config) }
