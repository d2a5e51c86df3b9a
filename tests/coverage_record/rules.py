"""From evidence to a class: what tests decide, and what is decided by hand, with the reason.

Tests alone cannot clear an operation that sums: a kernel may choose another order for a size that nobody tried. So an
operation is left alone only if it computes every element by itself and passed the tests, or moves values without changing
them. Everything else is uncovered unless the mode replaces it. The lists below say where that rule is too strict, or where
the tests cannot reach.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch

from bi_torch.mode import overrides
from bi_torch.mode.coverage import Kind
from tests.coverage_record.batches import Evidence
from tests.coverage_record.operations import DEVICES, Operation, functional_of, has_kernel

Key = tuple[str, bool]  # an operation, and whether the calls meet its condition
Verdict = tuple[Kind, str, str | None]  # class, reason, condition

REPLACED = "replaced by the mode"


@dataclass(frozen=True)
class Rule:
    """A decision by hand about the operations whose names match."""

    names: str
    kind: Kind
    reason: str
    devices: tuple[str, ...] = DEVICES

    def matches(self, name: str, device: str) -> bool:
        """Whether it decides about an operation on a device."""
        return device in self.devices and any(fnmatchcase(name, pattern) for pattern in self.names.split())


COMPOSED = "composed of operations that the mode replaces"

# Which calls of an operation depend on the batch, where not all do: a name in `bi_torch.mode.coverage.CONDITIONS`.
CONDITIONAL = {
    name: condition
    for condition, names in {
        "accumulate": "index_put put",
        "adds": "scatter_reduce.two index_reduce",
        "alpha": "add.Tensor sub.Tensor rsub.Tensor",
        "collisions": "scatter_add index_add",
        "rounds": "cumsum cumprod",
        "training": "native_batch_norm _native_batch_norm_legit native_batch_norm_backward",
    }.items()
    for name in names.split()
}

# Losses and their gradients are judged with reduction="none": a mean or sum is the mode's, and scales gradients alike.
LOSSES = frozenset(
    f"{name}{suffix}"
    for name in ("binary_cross_entropy", "huber_loss", "mse_loss", "smooth_l1_loss", "soft_margin_loss")
    for suffix in ("", "_backward")
)

# Operations that the database does not reach, and the one that stands for them: the same kernel behind another signature.
ALIKE = {
    "_aminmax": "sort",
    "_aminmax.dim": "sort",
    "_index_put_impl": "index_put",
    "_native_batch_norm_legit.no_stats": "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional": "_native_batch_norm_legit",
    "_unsafe_index.Tensor": "index.Tensor",
    "_unsafe_index_put": "index_put",
    "adaptive_max_pool2d": "adaptive_max_pool3d",
    "bucketize.Scalar": "bucketize.Tensor",
    "floor_divide.Scalar": "floor_divide",
    "isin.Scalar_Tensor": "isin.Tensor_Tensor",
    "isin.Tensor_Scalar": "isin.Tensor_Tensor",
    "max_pool3d_with_indices": "max_pool2d_with_indices",
    "searchsorted.Scalar": "searchsorted.Tensor",
    "unique_dim": "_unique2",
    "unique_dim_consecutive": "unique_consecutive",
    "unsafe_split_with_sizes": "split_with_sizes",
}

# Decided before any test.
DECIDED = (
    Rule("linspace* logspace* arange* range* scalar_tensor", "exact", "makes a tensor of numbers"),
    Rule(
        "_linalg_check_errors _fused_sdp_choice _functional_* _is_all_true _is_any_true",
        "exact",
        "checks its arguments",
    ),
    Rule(
        "_cudnn_rnn_flatten_weight _pin_memory _spdiags lu_unpack to_mkldnn copy_sparse_to_sparse _new_zeros* *conj_physical*",
        "exact",
        "moves values",
    ),
    Rule("binary_cross_entropy_with_logits dist renorm _trilinear", "covered", COMPOSED),
    Rule("embedding_renorm", "covered", COMPOSED, ("cpu",)),
    Rule(
        "*convolution* *_conv2d* *_conv3d* *conv_dil* *conv_transpose* *conv_depthwise* conv_tbc*",
        "uncovered",
        "the algorithm of a convolution is chosen by the batch size",
    ),
    Rule("*_rnn* *_thnn_* *lstm* *gru*", "uncovered", "products and sums of a recurrent layer, by the batch size"),
    Rule("*attention* *_multi_head* _transformer_encoder_layer_fwd", "uncovered", "products and sums over the keys"),
    Rule("_fft_*", "uncovered", "sums whose order depends on the number of transforms"),
    Rule(
        "_linalg_* linalg_cholesky* linalg_eig* linalg_h* linalg_inv* linalg_l* linalg_matrix* linalg_pinv* linalg_qr "
        "linalg_s* cholesky* _cholesky* geqrf ormqr triangular_solve",
        "uncovered",
        "a batch of matrices is factorised by other algorithms than one",
    ),
    Rule("cumsum cumprod logcumsumexp _logcumsumexp", "uncovered", "running sums are taken in blocks that depend on the shape"),
    Rule("*max_pool*backward* *max_unpool* col2im", "uncovered", "adds values of windows that overlap"),
    Rule("multi_margin_loss* multilabel_margin_loss*", "uncovered", "sums over the classes"),
    Rule("*_embedding_bag*", "uncovered", "sums over the bag"),
    Rule("*_ctc_loss*", "uncovered", "sums over alignments"),
    Rule("*avg_pool*", "uncovered", "sums over windows, in an order that no one promises"),
    Rule(
        "upsample_*linear* upsample_*cubic* _upsample_bi* grid_sampler* *_grid_sampler*",
        "uncovered",
        "weighted sums of neighbours",
    ),
    Rule("_fused_ada* _fused_sgd*", "uncovered", "fused optimizers are not tested"),
    Rule("_cdist* _pdist* _euclidean_dist", "uncovered", "distances are products for large inputs and sums for small ones"),
    Rule("_foreach_powsum*", "uncovered", "sums over tensors, in blocks that depend on their sizes"),
    Rule(
        "native_dropout* _fused_dropout* _masked_scale *rrelu_with_noise*",
        "elementwise",
        "a product of each element with its noise",
    ),
    Rule("_amp_foreach_* _amp_update_scale*", "elementwise", "a product with one scale"),
    Rule("_to_sparse* sparse_* _sparse_coo* _to_dense* _coalesce*", "exact", "moves values"),
    Rule(
        "*_copy *_copy.* *_like *_like.* new_* *empty* zeros* ones* full* eye* set* resize* *_resize* lift* _lazy_clone copy "
        "copy_ _copy_from* fill* zero* _reshape* *_view* _stack _chunk_cat",
        "exact",
        "makes or copies a tensor",
    ),
    Rule("_fused_moving_avg* _convert_* *_pack_* _pack_padded*", "exact", "prepares arguments"),
)

# They combine elements, in one way only: fine where the tests saw no difference.
FIXED = (
    Rule("glu glu_* linalg_cross complex polar", "elementwise", "a fixed expression of a few elements"),
    Rule("scatter_add index_add index_put put", "elementwise", "adds in the order of the indices", ("cpu",)),
)

# For what no call of the database reaches.
UNTESTED = (
    Rule("_foreach_*", "elementwise", "an elementwise function of each tensor; not tested"),
    Rule("special_*.*scalar special_*.[nx]_scalar xlogy.*", "elementwise", "as for two tensors, which was tested"),
    Rule(
        "_native_batch_norm_legit_no_training",
        "elementwise",
        "as native_batch_norm without training, which was tested",
        ("cuda",),
    ),
    Rule(
        "_native_batch_norm_legit_no_training",
        "uncovered",
        "as native_batch_norm, which depends on the batch without training, too",
        ("cpu",),
    ),
)

# By name, operations of which calls that do not meet their condition only move values or compute with integers, where the
# database has no such call.
EXACT_OTHERWISE = frozenset({"cumprod", "cumsum", "index_put", "put"})


@cache
def replaced(device: str) -> frozenset[str]:
    """Names of the overloads that the mode always replaces on a device."""
    return frozenset(overrides.kernels(device, portable=False))


def decided(name: str, device: str) -> Rule | None:
    """The rule that decides about an operation without a test."""
    return _match(DECIDED, name, device)


def verdict(operation: Operation, device: str, found: Mapping[Key, Evidence]) -> Verdict:
    """The class of an operation on a device ("cpu" or "cuda"), from the evidence of all."""
    if operation.name in replaced(device):
        return "covered", REPLACED, None
    stands_for = ALIKE.get(operation.name, operation.name)
    always, conditional = found.get((stands_for, False)), found.get((stands_for, True))
    condition = CONDITIONAL.get(stands_for)
    kind, reason = _judge(operation, device, always)
    if always is None and kind == "uncovered" and stands_for in EXACT_OTHERWISE:
        return "uncovered", _judge(operation, device, conditional)[1], condition
    if condition is None or always is None or always.differs:
        return kind, reason, None
    under = _judge(operation, device, conditional)
    if under[0] == "uncovered":
        return "uncovered", under[1], condition
    return "elementwise", under[1], None


def missing_forms(operation: Operation, device: str) -> Iterable[str]:
    """Forms with a kernel of their own of an operation that the mode replaces, which it does not replace."""
    if operation.name not in replaced(device):
        return []
    return [form for form in operation.forms if form not in replaced(device) and has_kernel(form, device.upper())]


def _judge(operation: Operation, device: str, found: Evidence | None) -> tuple[Kind, str]:
    rule = decided(operation.name, device)
    if rule is not None:
        return rule.kind, rule.reason
    if operation.overload.is_view:
        return "exact", "a view"
    if found is None:
        return _untested(operation, device)
    if torch.Tag.nondeterministic_seeded in operation.overload.tags:
        return "exact", "draws random numbers"
    if not found.floating:
        return "exact", "no floating-point numbers"
    if found.unstable:
        return "uncovered", "other bits in every run"
    if found.differs:
        return "uncovered", f"a row alone differs from the row in a batch ({', '.join(sorted(found.differs))})"
    if not found.computes:
        return "exact", "moves or selects values"
    fixed = _match(FIXED, ALIKE.get(operation.name, operation.name), device)
    if found.compared and (fixed is not None or not found.mixes):
        return "elementwise", fixed.reason if fixed else "tested"
    return "uncovered", "combines elements; no test saw a difference, and nothing rules it out"


def _untested(operation: Operation, device: str) -> tuple[Kind, str]:
    rule = _match(UNTESTED, operation.name, device)
    if rule is not None:
        return rule.kind, rule.reason
    op = operation.overload
    schema = op._schema
    if torch.Tag.nondeterministic_seeded in op.tags:
        return "exact", "draws random numbers"
    if not any("Tensor" in str(value.type) for value in schema.returns):
        return "exact", "returns no tensor"
    if not any("Tensor" in str(argument.type) for argument in schema.arguments):
        return "exact", "makes a tensor of numbers"
    if torch.Tag.pointwise in op.tags and "fake_quantize" not in schema.name:
        return "elementwise", "elementwise by definition; not tested"
    return "uncovered", "not tested"


def _match(rules: Iterable[Rule], name: str, device: str) -> Rule | None:
    functional = functional_of().get(name, name)
    return next((rule for rule in rules if rule.matches(functional, device)), None)
