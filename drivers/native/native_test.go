package native_test

import (
	"testing"

	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/drivers/native"
)

var config = drivertest.Config{
	Factory:          native.Factory(),
	Must:             []string{"Diff", "Apply", "IDMap", "UsageBytes", "UsageInodes", "Copies", "Reflink:xfs,btrfs"},
	MustUnprivileged: []string{"Diff", "Apply", "UsageBytes", "UsageInodes", "Reflink:xfs,btrfs"},
}

func TestMain(m *testing.M)        { drivertest.Main(m) }
func TestDriver(t *testing.T)      { drivertest.Run(t, config) }
func BenchmarkDriver(b *testing.B) { drivertest.Bench(b, config) }
