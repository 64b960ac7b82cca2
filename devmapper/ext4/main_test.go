package ext4

import (
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
