"""Row operations for JAX: reductions, softmax, normalisations, activations, embeddings and optimizer steps.

The public functions stand in `reduce`, `softmax`, `norm`, `pointwise`, `embedding` and `optimizer`. `op` makes functions with
gradients of programs, `primitive` binds them to JAX, `cpu` and `mosaic` run them.
"""
