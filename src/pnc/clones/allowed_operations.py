"""The operations and layers of PyTorch that a clone file may name: no others are looked up.

All of them compute tensors from tensors. None reads or writes files, runs code that it is given, starts a process, or
draws random numbers in evaluation mode.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pnc.channels.compaction import filled
from pnc.channels.size_arguments import part_mean, part_norm

_TORCH = """
abs acos add addcdiv addcmul addmm amax amin arange argmax argmin asin atan atan2 baddbmm batch_norm bmm broadcast_to
cat ceil celu chunk clamp clamp_max clamp_min clone column_stack concat concatenate conv1d conv2d conv3d
conv_transpose1d conv_transpose2d cos cosh cumsum diagonal div divide dot dropout einsum empty_like eq erf exp expm1
eye flatten flip floor floor_divide fmod full full_like gather ge group_norm gt hstack index_fill index_select
layer_norm le linspace log log1p log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max
maximum mean meshgrid min minimum mm movedim moveaxis mul multiply narrow ne neg norm ones ones_like outer permute
pixel_shuffle pixel_unshuffle pow prelu prod reciprocal relu relu_ remainder repeat_interleave reshape roll round
rsqrt rsub scalar_tensor select selu sigmoid sign sin sinh softmax split split_with_sizes sqrt square squeeze stack
std sub subtract sum swapaxes swapdims tan tanh tensor_split tile topk transpose tril triu true_divide unbind
unflatten unsqueeze var var_mean vstack where zeros zeros_like adaptive_avg_pool1d avg_pool1d max_pool1d max_pool2d
instance_norm rms_norm channel_shuffle bilinear
"""
_FUNCTIONAL = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu conv1d conv2d
dropout dropout1d dropout2d elu gelu glu grid_sample group_norm hardsigmoid hardswish hardtanh instance_norm
interpolate layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid lp_pool2d max_pool2d mish
normalize pad pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid silu
softmax softmin softplus softsign tanh unfold fold upsample
"""
_METHODS = """
abs add add_ addcmul amax amin argmax argmin bfloat16 bmm broadcast_to chunk clamp clamp_ clamp_max clamp_min clone
contiguous copy_ cos cumsum detach diagonal dim div div_ double eq exp exp_ expand expand_as fill_ flatten flip float
floor gather ge gt half index_copy index_fill index_select int le log log_softmax logsumexp long lt masked_fill
masked_fill_ matmul max maximum mean min minimum moveaxis movedim mul mul_ narrow ne neg new_empty new_full new_ones
new_zeros norm numel permute pow prod reciprocal relu relu_ repeat repeat_interleave reshape reshape_as roll round
rsqrt select sigmoid sigmoid_ sign sin size softmax split sqrt square squeeze std sub sub_ sum swapaxes swapdims t
tanh tile to transpose tril triu type_as unbind unflatten unfold unsqueeze var view view_as where zero_ __add__
__and__ __eq__ __floordiv__ __ge__ __getitem__ __gt__ __iadd__ __imul__ __invert__ __isub__ __itruediv__ __le__ __lt__
__matmul__ __mod__ __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rdiv__ __rmatmul__ __rmul__ __rpow__ __rsub__
__rtruediv__ __setitem__ __sub__ __truediv__
"""
_OPERATORS = "add floordiv getitem matmul mod mul neg pow sub truediv"
_LAYERS = """
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool2d AlphaDropout AvgPool1d AvgPool2d BatchNorm1d BatchNorm2d
BatchNorm3d CELU ChannelShuffle ConstantPad2d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d Dropout Dropout1d
Dropout2d ELU Embedding Flatten Fold GELU GLU GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh Identity
InstanceNorm1d InstanceNorm2d LPPool2d LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d
MaxPool2d Mish MultiheadAttention PReLU PixelShuffle PixelUnshuffle RMSNorm ReLU ReLU6 ReflectionPad2d
ReplicationPad2d SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad2d
"""


def _functions() -> dict[str, Callable[..., Any]]:
    """Functions by their names in files; the same function under two names has the first."""
    found: dict[str, Callable[..., Any]] = {}
    for prefix, module, names in (
        ("torch", torch, _TORCH),
        ("torch.nn.functional", F, _FUNCTIONAL),
        ("operator", operator, _OPERATORS),
    ):
        found |= {f"{prefix}.{name}": getattr(module, name) for name in names.split() if hasattr(module, name)}
    own = {"pnc.filled": filled, "pnc.part_mean": part_mean, "pnc.part_norm": part_norm}
    return {**found, "torch.linalg.vector_norm": torch.linalg.vector_norm, "getattr": getattr, **own}


FUNCTIONS: Mapping[str, Callable[..., Any]] = _functions()
"""Functions by their names in files."""

METHODS = frozenset(_METHODS.split())
"""Methods of tensors."""

ATTRIBUTES = frozenset({"shape", "T", "mT", "H", "mH", "real", "ndim", "dtype", "device"})
"""Attributes of tensors, which the function `getattr` may read."""

LAYERS: Mapping[str, type[nn.Module]] = {
    name: getattr(nn, name) for name in _LAYERS.split() if isinstance(getattr(nn, name, None), type)
}
"""Layers of `torch.nn` by name."""

DTYPES = {
    str(one).removeprefix("torch."): one
    for one in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Dtypes by name."""

MEMORY_FORMATS = {
    str(one).removeprefix("torch."): one
    for one in (torch.contiguous_format, torch.preserve_format, torch.channels_last)
}
"""Memory formats by name."""

_NAMES = {id(function): name for name, function in reversed(list(FUNCTIONS.items()))}
_IS_PRESENT = {"bias": ("bias", "in_proj_bias"), "add_bias_kv": ("bias_k",)}
"""Arguments of constructors that say whether a layer has a tensor, with the names of such tensors."""
_IGNORED = ("device", "dtype", "_weight")


def function_name(function: Any) -> str | None:
    """The name in files of a function; None if files may not name it."""
    return _NAMES.get(id(function))


def layer_arguments(layer: nn.Module) -> dict[str, Any] | None:
    """The arguments that a layer of `LAYERS` was constructed with, as its attributes tell; None for any other layer.

    Arguments that have their default value are left out, and those that no attribute tells.
    """
    made = LAYERS.get(type(layer).__name__)
    if type(layer) is not made:
        return None
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(made).parameters.items():
        tensors = [one for one in _IS_PRESENT.get(name, ()) if one in layer._parameters]
        if tensors:
            found[name] = layer._parameters[tensors[0]] is not None
        elif name not in _IGNORED and hasattr(layer, name):
            found[name] = getattr(layer, name)
        if name in found and _is_same(found[name], parameter.default):
            del found[name]
    return found


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer keeps besides tensors and submodules: two layers of a class with equal settings work alike."""
    kept = {name: value for name, value in vars(layer).items() if not name.startswith("_") or name in _PRIVATE}
    return {name: value for name, value in kept.items() if name != "training"}


_PRIVATE = ("_reversed_padding_repeated_twice", "_qkv_same_embed_dim")
