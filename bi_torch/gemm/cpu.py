def gemm(*a, **k): raise NotImplementedError
