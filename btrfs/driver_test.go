package btrfs_test

import (
	"testing"

	"github.com/layerctl/layerctl/btrfs"
	"github.com/layerctl/layerctl/drivers/drivertest"
)

var config = drivertest.Config{
	Factory:          btrfs.Factory(),
	FS:               []string{"btrfs"},
	Must:             []string{"Diff", "Apply", "IDMap", "UsageBytes", "UsageInodes", "Reflink"},
	MustUnprivileged: []string{"Diff", "Apply", "Reflink"},
}

func TestMain(m *testing.M)        { drivertest.Main(m) }
func TestDriver(t *testing.T)      { drivertest.Run(t, config) }
func BenchmarkDriver(b *testing.B) { drivertest.Bench(b, config) }
