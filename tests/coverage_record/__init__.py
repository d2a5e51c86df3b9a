"""The recorder of `bi_torch/mode/coverage.json`: which aten operations give a row the same bits alone and in a batch."""
