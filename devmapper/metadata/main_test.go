package metadata

import (
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
