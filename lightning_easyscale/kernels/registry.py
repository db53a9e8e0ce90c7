"""Which operation is computed how under the `portable` policy: the vetted list.

Operations are named as in torch's schemas, without overload: ``aten::mm``. Two tables:

* `EXACT`: torch's own kernels, which have the same bits everywhere because each element is moved, compared or computed
  with one correctly rounded operation;
* `REPLACED`: implementations of the format.

In-place and ``out=`` forms of both are covered by their functional form (`mode.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import (
    arithmetic,
    attention,
    convolution,
    elementwise,
    linear,
    losses,
    normalization,
    pooling,
    random,
    reductions,
    scatter,
)

_VIEWS = """
    alias as_strided detach diagonal expand lift lift_fresh permute select slice split split_with_sizes squeeze t
    transpose unbind unfold unsafe_split unsafe_split_with_sizes unsqueeze view _reshape_alias _unsafe_view
"""
_MOVES = """
    bucketize cat clone constant_pad_nd copy diag_embed diagonal_backward diagonal_scatter embedding empty empty_like
    empty_permuted empty_strided eye fill flip full full_like gather im2col index index_copy index_fill index_select
    masked_fill masked_scatter masked_select narrow_copy new_empty new_empty_strided new_full new_ones new_zeros nonzero
    ones ones_like pixel_shuffle pixel_unshuffle record_stream reflection_pad1d reflection_pad2d repeat
    replication_pad1d replication_pad2d resize roll rot90 scalar_tensor scatter searchsorted select_backward
    select_scatter set slice_backward slice_scatter stack take tril tril_indices triu triu_indices unique_consecutive
    unique_dim upsample_nearest1d upsample_nearest2d zero zeros zeros_like _local_scalar_dense _pin_memory _to_copy
    _unique2
"""
_COMPARISONS = """
    all amax amin aminmax any argmax argmin bitwise_and bitwise_not bitwise_or bitwise_xor clamp clamp_max clamp_min
    cummax cummin eq equal fmax fmin ge gt hardtanh is_same_size isin isinf isnan isneginf isposinf le logical_and
    logical_not logical_or logical_xor lt max max_pool2d_with_indices maximum min minimum ne nextafter relu sign signbit
    where _cummax_helper _cummin_helper
"""
# One correctly rounded operation per element.
_ROUNDED_ONCE = """
    abs ceil copysign floor frac leaky_relu leaky_relu_backward mul nan_to_num neg round trunc _foreach_abs
    _foreach_clamp_max _foreach_clamp_min _foreach_copy _foreach_maximum _foreach_minimum _foreach_mul _foreach_neg
    _foreach_zero
    _amp_foreach_non_finite_check_and_unscale _amp_update_scale
"""


def _names(*lists: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for names in lists for name in names.split())


EXACT = _names(_VIEWS, _MOVES, _COMPARISONS, _ROUNDED_ONCE)
"""Operations that keep torch's own kernels."""

_REPLACED: dict[str, Callable[..., Any]] = {
    "mm": linear.mm,
    "bmm": linear.bmm,
    "mv": linear.mv,
    "dot": linear.dot,
    "addmm": linear.addmm,
    "addmv": linear.addmv,
    "baddbmm": linear.baddbmm,
    "convolution": convolution.convolution,
    "convolution_overrideable": convolution.convolution,
    "convolution_backward": convolution.convolution_backward,
    "sum": reductions.tree_sum,
    "prod": reductions.product,
    "mean": reductions.mean,
    "var": reductions.var,
    "var_mean": reductions.var_mean,
    "std": reductions.std,
    "linalg_vector_norm": reductions.vector_norm,
    "norm": reductions.norm,
    "logsumexp": reductions.logsumexp,
    "_softmax": reductions.softmax,
    "_safe_softmax": reductions.safe_softmax,
    "_softmax_backward_data": reductions.softmax_backward,
    "_log_softmax": reductions.log_softmax,
    "_log_softmax_backward_data": reductions.log_softmax_backward,
    "_scaled_dot_product_efficient_attention": attention.forward,
    "_scaled_dot_product_efficient_attention_backward": attention.backward,
    "native_layer_norm": normalization.layer_norm,
    "native_layer_norm_backward": normalization.layer_norm_backward,
    "native_batch_norm": normalization.batch_norm,
    "_native_batch_norm_legit": normalization.batch_norm_legit,
    "native_batch_norm_backward": normalization.batch_norm_backward,
    "native_group_norm": normalization.group_norm,
    "native_group_norm_backward": normalization.group_norm_backward,
    "max_pool2d_with_indices_backward": pooling.max_pool2d_backward,
    "avg_pool2d": pooling.avg_pool2d,
    "avg_pool2d_backward": pooling.avg_pool2d_backward,
    "_adaptive_avg_pool2d": pooling.adaptive_avg_pool2d,
    "_adaptive_avg_pool2d_backward": pooling.adaptive_avg_pool2d_backward,
    "upsample_bilinear2d": pooling.upsample_bilinear2d,
    "upsample_bilinear2d_backward": pooling.upsample_bilinear2d_backward,
    "upsample_nearest2d_backward": pooling.upsample_nearest2d_backward,
    "embedding_dense_backward": scatter.embedding_backward,
    "index_add": scatter.index_add,
    "scatter_add": scatter.scatter_add,
    "index_put": scatter.index_put,
    "_index_put_impl": scatter.index_put,
    "nll_loss_forward": losses.nll_loss,
    "nll_loss_backward": losses.nll_loss_backward,
    "nll_loss2d_forward": losses.nll_loss,
    "nll_loss2d_backward": losses.nll_loss_backward,
    "mse_loss": losses.mse_loss,
    "mse_loss_backward": losses.mse_loss_backward,
    "smooth_l1_loss": losses.smooth_l1_loss,
    "smooth_l1_loss_backward": losses.smooth_l1_loss_backward,
    "binary_cross_entropy_with_logits": losses.bce_with_logits,
    "add": arithmetic.add,
    "add_": arithmetic.add_,
    "sub": arithmetic.sub,
    "rsub": arithmetic.rsub,
    "div": arithmetic.divide,
    "floor_divide": arithmetic.floor_divide,
    "fmod": arithmetic.fmod,
    "remainder": arithmetic.remainder,
    "sqrt": arithmetic.square_root,
    "reciprocal": arithmetic.reciprocal,
    "hardtanh_backward": elementwise.hardtanh_backward,
    "threshold": elementwise.threshold,
    "threshold_backward": elementwise.threshold_backward,
    "addcmul": elementwise.addcmul,
    "addcdiv": elementwise.addcdiv,
    "lerp": elementwise.lerp,
    "pow": elementwise.power,
    "rsqrt": elementwise.rsqrt,
    "sigmoid": elementwise.sigmoid,
    "sigmoid_backward": elementwise.sigmoid_backward,
    "tanh_backward": elementwise.tanh_backward,
    "silu": elementwise.silu,
    "silu_backward": elementwise.silu_backward,
    "gelu": elementwise.gelu,
    "gelu_backward": elementwise.gelu_backward,
    "softplus": elementwise.softplus,
    "softplus_backward": elementwise.softplus_backward,
    "log_sigmoid_forward": elementwise.log_sigmoid,
    "log_sigmoid_backward": elementwise.log_sigmoid_backward,
    "arange": elementwise.arange,
    "linspace": elementwise.linspace,
    "sort": scatter.sort,
    "topk": scatter.topk,
    "native_dropout": random.dropout,
    "native_dropout_backward": random.dropout_backward,
    "uniform_": random.uniform_,
    "normal_": random.normal_,
    "normal": random.normal,
    "bernoulli": random.bernoulli,
    "bernoulli_": random.bernoulli_,
    "rand": random.made("uniform"),
    "rand_like": random.made("uniform"),
    "randn": random.made("normal"),
    "randn_like": random.made("normal"),
    "random_": random.random_,
    "randint": random.on_cpu(torch.randint),
    "randint_like": random.on_cpu(torch.randint_like),
    "randperm": random.on_cpu(torch.randperm),
    "multinomial": random.on_cpu(torch.multinomial),
}
_REPLACED |= {name: elementwise.elementary(name) for name in ("exp", "expm1", "log", "log1p", "tanh", "erf")}

COMMUNICATION = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "profiler"})
"""Namespaces of operations that communicate or observe; what a collective adds, it adds in an order of its own."""

REPLACED = {f"aten::{name}": function for name, function in _REPLACED.items()}
"""Operations that the format computes, and how."""

RANDOM = _names(
    "uniform_ normal_ normal bernoulli bernoulli_ rand rand_like randn randn_like",
    "random_ randint randint_like randperm multinomial native_dropout _scaled_dot_product_efficient_attention",
)
"""Operations of `REPLACED` that draw random numbers."""
