"""Which rule an operation follows: one table for functions and methods, one for modules.

An operation without a rule receives its input in full size and keeps all its outputs (`channel_layouts.opaque`).
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import fx, nn

from pnc.channels import layer_rules as layers
from pnc.channels import module_probes
from pnc.channels import tensor_rules as tensors
from pnc.channels.channel_layouts import Result, Tracker, opaque
from pnc.graph.nodes import describe, family, info

Rule = Callable[[Tracker, fx.Node], Result]


def apply_rule(t: Tracker, node: fx.Node) -> Result:
    """Layout of a node's result."""
    if node.op == "call_module" and node.target in t.shared:
        return layers.refuse(t, node, f"{node.target} is used more than once or shares its weights")
    if node.op == "call_module" and has_hooks(t.modules[str(node.target)]):
        return layers.refuse(t, node, f"{node.target} has hooks, which may change its output")
    rule = _rule(t, node)
    if rule in _WEIGHTED and node.op != "call_module" and _made_of_channels(t, node):
        return opaque(t, node, f"the weights of {describe(node)} are computed from removable channels")
    return rule(t, node)


def _made_of_channels(t: Tracker, node: fx.Node) -> bool:
    """Whether an operand of a layer's functional form, other than its input, holds channels or a computed number."""
    weights = [operand for operand in node.all_input_nodes if operand is not node.args[0]]
    return any(t.of(weight).dims or not info(weight).is_tensor for weight in weights)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def opens_channels(t: Tracker, node: fx.Node) -> bool:
    """Whether a node opens new channels, whatever it reads."""
    return _rule(t, node) in (layers.convolution, layers.linear, layers.foreign_convolution)


def _rule(t: Tracker, node: fx.Node) -> Rule:
    """From the tables; for a module, the rule of the nearest base class whose forward it uses."""
    if node.op != "call_module":
        return FUNCTION_RULES.get(family(node), opaque)
    return _module_rule(t.modules[str(node.target)])


def _module_rule(module: nn.Module) -> Rule:
    for base in type(module).__mro__:
        if base in MODULE_RULES and type(module).forward is base.forward:
            return MODULE_RULES[base]
    return layers.foreign_convolution if isinstance(module, layers.CONVOLUTIONS) else layers.foreign_leaf


def is_understood(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a leaf module has a rule, or passes an experiment on an input of `shape`."""
    rule = _module_rule(module)
    if rule is layers.foreign_convolution:
        assert isinstance(module, layers.CONVOLUTIONS)
        return all(module_probes.sliceable_conv(module, shape))
    if rule is not layers.foreign_leaf or module_probes.is_elementwise(module, len(shape)):
        return True
    return any(module_probes.per_channel(module, shape, dim) for dim in {1, len(shape) - 1})


_WEIGHTED = (layers.convolution, layers.linear, layers.channel_norm, layers.group_norm, layers.layer_norm)

_ELEMENTWISE = """
    relu relu6 gelu silu hardswish hardsigmoid hardtanh sigmoid tanh leaky_relu elu selu celu mish softplus softsign
    logsigmoid threshold dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout clamp clamp_min clamp_max
    clip float double half bfloat16 neg negative abs exp log sqrt rsqrt reciprocal square sin cos erf pow
    nan_to_num detach clone contiguous
"""
_MOVEMENTS = """
    reshape view flatten unflatten permute transpose movedim t .T .mT unsqueeze expand repeat
    repeat_interleave split chunk
"""

_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Tanh, nn.Sigmoid),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink),
)

FUNCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), tensors.elementwise),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), layers.convolution),
    **dict.fromkeys(("to", "type", "type_as"), tensors.conversion),
    "linear": layers.linear,
    "batch_norm": layers.channel_norm,
    "group_norm": layers.group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layers.layer_norm),
    "softmax": layers.softmax,
    "normalize": layers.normalize,
    **dict.fromkeys(("add", "sub", "maximum", "minimum"), tensors.total),
    "mul": tensors.product,
    "div": tensors.quotient,
    "addcmul": tensors.sum_of_product,
    **{f"{kind}_pool{n}d": partial(tensors.spatial, n_dims=n) for kind in ("max", "avg", "lp") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": partial(tensors.spatial, n_dims=n) for kind in ("max", "avg") for n in (1, 2, 3)},
    "interpolate": tensors.spatial,
    **dict.fromkeys(("sum", "mean"), partial(tensors.reduction, over_channels=True)),
    **dict.fromkeys(("norm", "linalg_vector_norm"), tensors.vector_norm),
    **dict.fromkeys(("amax", "amin"), partial(tensors.reduction, over_channels=False)),
    **dict.fromkeys(("matmul", "bmm"), tensors.matmul),
    "einsum": tensors.einsum,
    "scaled_dot_product_attention": tensors.attention,
    **dict.fromkeys(_MOVEMENTS.split(), tensors.movement),
    **dict.fromkeys(("reshape_as", "view_as", "expand_as"), tensors.shaped_like),
    "getitem": tensors.indexing,
    **dict.fromkeys(("unbind", "select"), partial(tensors.keep_size, position=1, name="dim", default=0)),
    "flip": partial(tensors.keep_size, position=1, name="dims", default=None),
    "roll": partial(tensors.keep_size, position=2, name="dims", default=None),
    "squeeze": partial(tensors.keep_size, position=1, name="dim", default=None),
    "cat": tensors.concatenate,
    "glu": tensors.gated_halves,
    "stack": tensors.stacking,
    "pad": tensors.padding,
}

MODULE_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(layers.CONVOLUTIONS, layers.convolution),
    nn.Linear: layers.linear,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), layers.channel_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), layers.channel_norm),
    nn.GroupNorm: layers.group_norm,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), layers.layer_norm),
    nn.Softmax: layers.softmax,
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d), partial(tensors.spatial, n_dims=1)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d), partial(tensors.spatial, n_dims=2)),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), partial(tensors.spatial, n_dims=2)),
    **dict.fromkeys((nn.Upsample, nn.ZeroPad2d), tensors.spatial),
    nn.Flatten: tensors.movement,
    nn.GLU: tensors.gated_halves,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), tensors.conversion),
    **dict.fromkeys(_ACTIVATIONS, layers.activation),
}
"""Rules of `torch.nn` layers; modules of other libraries are tested by experiment."""
