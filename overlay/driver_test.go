package overlay_test

import (
	"testing"

	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/overlay"
)

var config = drivertest.Config{
	Factory:          overlay.Factory(),
	Must:             []string{"Diff", "Apply", "Rebase", "IDMap", "UsageBytes", "UsageInodes", "Reflink:btrfs,xfs"},
	MustUnprivileged: []string{"Diff", "Apply", "Rebase", "UsageBytes", "UsageInodes"},
}

func TestMain(m *testing.M)        { drivertest.Main(m) }
func TestDriver(t *testing.T)      { drivertest.Run(t, config) }
func BenchmarkDriver(b *testing.B) { drivertest.Bench(b, config) }
