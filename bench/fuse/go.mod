module github.com/layerctl/layerctl/bench/fuse

go 1.26.6
