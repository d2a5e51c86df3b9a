"""Functions under shard_map, on all devices that there are: on a CPU, as many as `conftest` asks for."""

import jax
from jax.sharding import PartitionSpec


def mesh_of(kind):
    """A mesh of one axis, of this type."""
    return jax.make_mesh((jax.device_count(),), ("x",), axis_types=(kind,))


def sharded(f, arrays, shared, kind, check_vma, transform=jax.jit):
    """f under shard_map and `transform`, with the first dimension of `arrays` over the devices, and `shared` on each."""
    mesh, spec = mesh_of(kind), PartitionSpec("x")
    arrays = jax.device_put(arrays, jax.NamedSharding(mesh, spec))
    shared = jax.device_put(shared, jax.NamedSharding(mesh, PartitionSpec()))
    on_shards = jax.shard_map(f, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=check_vma)
    return jax.device_get(transform(on_shards)(arrays, shared))
