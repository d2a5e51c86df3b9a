"""Row operations for PyTorch: reductions, softmax, normalisations, activations, embeddings and optimizer steps.

The public functions stand in `reduce`, `softmax`, `norm`, `pointwise`, `embedding` and `optimizer`. `library` registers the
ops, `cpu` and `cuda` run their programs.
"""
