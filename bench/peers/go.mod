module github.com/layerctl/layerctl/bench/peers

go 1.26

replace github.com/layerctl/layerctl => ../..
