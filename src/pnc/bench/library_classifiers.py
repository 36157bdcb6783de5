"""Classifiers of three libraries as test cases: random weights that hide no error, small images, four classes."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pnc.foundation.errors import InputError
from pnc.models.library_networks import load_library

N_CLASSES = 4
BATCH = 3
SIZE = 64

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "ResNet": ("*:resnet*", "*:wide_resnet*", "*:resnext*", "timm:seresnet*", "timm:ecaresnet*", "timm:skres*",
               "timm:legacy_seresn*", "transformers:ResNet"),
    "MobileNet": ("*:mobilenet*", "transformers:MobileNet*"),
    "EfficientNet": ("*:efficientnet_[!c]*", "*:efficientnetv2*", "timm:tf_efficientnet*", "transformers:EfficientNet"),
    "DenseNet": ("*:densenet*",),
    "RegNet": ("*:regnet*", "transformers:RegNet"),
    "ConvNeXt": ("*:convnext*", "transformers:ConvNext*"),
    "ViT": ("*:vit_*", "transformers:ViT*"),
    "DeiT": ("timm:deit*", "transformers:DeiT*"),
    "Swin": ("*:swin*", "transformers:Swin*"),
}  # fmt: skip
"""Name patterns of well-known families; efficientnet_cc is left out, because it mixes its filters for each image."""

SHARES: Mapping[str, float] = {
    **dict.fromkeys(("ResNet",), 0.40),
    **dict.fromkeys(("MobileNet", "EfficientNet", "DenseNet", "RegNet", "ConvNeXt"), 0.55),
    **dict.fromkeys(("ViT", "DeiT", "Swin"), 0.75),
}
"""Largest share of a part's parameters that may remain when half of its channels are removed."""

_SMALL = {"image_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_PLAIN = {**_SMALL, "intermediate_size": 128, "patch_size": 16}
_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
_WINDOWS = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_LEVIT = {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2],
          "key_dim": [16, 16, 16]}  # fmt: skip
_PERCEIVER = {"num_latents": 16, "d_latents": 64, "num_blocks": 1, "num_self_attends_per_block": 2,
              "num_self_attention_heads": 4, "num_cross_attention_heads": 1}  # fmt: skip
_VISION = {"vision_config": _PLAIN}

TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "BEiT": ("Beit", _PLAIN),
    "BiT": ("Bit", {**_STAGES, "embedding_size": 16, "num_groups": 8}),
    "CLIP": ("CLIP", _VISION),
    "ConvNext": ("ConvNext", _STAGES),
    "ConvNextV2": ("ConvNextV2", _STAGES),
    "CvT": ("Cvt", {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "Data2VecVision": ("Data2VecVision", _PLAIN),
    "DeiT": ("DeiT", _PLAIN),
    "DeiTWithTeacher": ("DeiTForImageClassificationWithTeacher", _PLAIN),
    "Dinov2": ("Dinov2", {**_SMALL, "patch_size": 16}),
    "Dinov2WithRegisters": ("Dinov2WithRegisters", {**_SMALL, "patch_size": 16}),
    "DonutSwin": ("DonutSwin", _WINDOWS),
    "EfficientNet": ("EfficientNet", {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}),
    "FocalNet": ("FocalNet", {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 2, 1],
                              "hidden_sizes": [16, 32, 64, 128]}),
    "HGNetV2": ("HGNetV2", {}),
    "Hiera": ("Hiera", {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}),
    "IJepa": ("IJepa", _PLAIN),
    "LeViT": ("Levit", _LEVIT),
    "LeViTWithTeacher": ("LevitForImageClassificationWithTeacher", _LEVIT),
    "MetaClip2": ("MetaClip2", _VISION),
    "MobileNetV1": ("MobileNetV1", {"depth_multiplier": 0.25}),
    "MobileNetV2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "MobileViT": ("MobileViT", {"image_size": 64, "hidden_sizes": [32, 48, 64],
                                "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 96]}),
    "MobileViTV2": ("MobileViTV2", {"image_size": 64, "width_multiplier": 0.5}),
    "PPLCNet": ("PPLCNet", {}),
    "PVT": ("Pvt", {**_STAGES, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]}),
    "PVTv2": ("PvtV2", {**_STAGES, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]}),
    "PerceiverConv": ("PerceiverForImageClassificationConvProcessing", _PERCEIVER),
    "PerceiverFourier": ("PerceiverForImageClassificationFourier", _PERCEIVER),
    "PerceiverLearned": ("PerceiverForImageClassificationLearned", {**_PERCEIVER, "image_size": 64}),
    "PoolFormer": ("PoolFormer", _STAGES),
    "RegNet": ("RegNet", {**_STAGES, "embedding_size": 16, "groups_width": 8}),
    "ResNet": ("ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2],
                          "layer_type": "basic"}),
    "SegFormer": ("Segformer", {**_STAGES, "num_attention_heads": [1, 2, 3, 4]}),
    "SigLIP": ("Siglip", _VISION),
    "SwiftFormer": ("SwiftFormer", {"image_size": 64}),
    "Swin": ("Swin", _WINDOWS),
    "Swinv2": ("Swinv2", _WINDOWS),
    "TextNet": ("TextNet", {}),
    "ViT": ("ViT", _PLAIN),
    "ViTMSN": ("ViTMSN", _PLAIN),
}  # fmt: skip
"""Classifiers of transformers by our own names: a class or its prefix, and a small configuration."""

TORCHVISION = """
alexnet densenet121 efficientnet_b0 efficientnet_b1 googlenet inception_v3@299 mnasnet0_5 mnasnet0_75 mobilenet_v2
mobilenet_v3_large mobilenet_v3_small@224 regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf resnet18@224
resnet34 resnet50 shufflenet_v2_x0_5 shufflenet_v2_x1_0@224 squeezenet1_0 squeezenet1_1@224 swin_t@224 vgg11 vgg11_bn
vit_b_32@224
"""
"""Names in torchvision, followed by @ and the image size if it is not `SIZE`."""

TIMM = """
convnext_atto convnextv2_atto cpubone_b1_dwnorm cpubone_nano cs3darknet_focus_s cs3darknet_s csatv2 cspnext_s
cspnext_tiny densenet121 densenetblur121d dla46_c dla46x_c dpn48b dpn68 ecaresnet26t edgenext_x_small
edgenext_xx_small efficientnet_lite0 efficientvim_m1 efficientvim_m2_dist efficientvit_b0 efficientvit_b1
ese_vovnet19b_dw ese_vovnet19b_slim fasternet_t0 fasternet_t1 fastvit_sa12 fastvit_t8 ghostnet_050@224 ghostnetv2_100
hardcorenas_a@224 hardcorenas_b hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_v3@96
lcnet_035 lcnet_050@224 lcnetv2_base lcnetv2_small legacy_seresnet18 legacy_seresnext26_32x4d lowformer_b0
lowformer_b1 mambaout_femto mambaout_kobe mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small@224
nf_regnet_b0 poolformer_s12 poolformerv2_s12 pvt_v2_b0 pvt_v2_b1 regnetx_002 regnety_002 repghostnet_050
repghostnet_080 res2net50_26w_4s resnest14d resnest26d resnet18 resnet26d resnetv2_18 resnetv2_50 resnext50_32x4d
rexnet_100 rexnet_150 shvit_s1 shvit_s2 skresnet18 skresnet34 starnet_s1 starnet_s2 test_convnext test_convnext2
test_convnext3 test_efficientnet test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout
test_nfnet test_resnet tf_efficientnetv2_b0 tiny_vit_11m_224 tiny_vit_5m_224 tinynet_e
"""
"""Names in timm of networks that take images of any size."""

TIMM_SIZED = """
botnet26t_256 cait_xxs24_224 coat_lite_tiny coat_tiny coatnet_nano_rw_224 coatnext_nano_rw_224 convit_tiny
deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 efficientformerv2_s0 efficientformerv2_s1 efficientvit_m0
efficientvit_m2 eva02_tiny_patch14_224 flexivit_small gcvit_xtiny gcvit_xxtiny gmlp_ti16_224 lambda_resnet26rpt_256
levit_128s@224 levit_conv_128s maxvit_rmlp_pico_rw_256@256 maxxvit_rmlp_nano_rw_256 mobileone_s0 mobilevit_xxs
mobilevitv2_050 nest_tiny pit_s_distilled_224 pit_ti_224@224 regnetz_b16 repvgg_a0 repvit_m1 resmlp_12_224
swiftformer_s swiftformer_xs test_byobnet test_coatnet test_maxvit test_vit test_vit2 test_vit3 test_vit4
test_vit_relpos twins_pcpvt_small visformer_tiny vit_pe_core_tiny_patch16_384 vit_relpos_small_patch16_224
vit_small_patch32_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224@224 vit_tiny_r_s16_p8_224
vit_wee_patch16_reg1_gap_256@256 vitamin_small_224 xcit_nano_12_p16_224@224 xcit_tiny_12_p8_224
"""
"""Names of timm that are built for a size of images."""


def _sizes() -> dict[str, int]:
    named = [("torchvision", TORCHVISION), ("timm", TIMM), ("timm", TIMM_SIZED)]
    words = [(library, *word.partition("@")) for library, block in named for word in block.split()]
    sizes = {f"{library}:{name}": int(size or SIZE) for library, name, _, size in words}
    return {**sizes, **dict.fromkeys((f"transformers:{name}" for name in TRANSFORMERS), SIZE)}


CLASSIFIERS: Mapping[str, int] = _sizes()
"""Size of the images of every model."""


def chosen(patterns: str | None) -> tuple[str, ...]:
    """Sorted names out of `CLASSIFIERS`: all, or those that match a pattern such as timm:vit_*.

    Args:
        patterns: Separated by commas; None for all.
    Raises:
        InputError: a pattern matches nothing.
    """
    names: set[str] = set()
    for pattern in ["*"] if patterns is None else patterns.split(","):
        found = fnmatch.filter(CLASSIFIERS, pattern.strip())
        if not found:
            raise InputError(
                f"models: {pattern.strip()!r} is none of the {len(CLASSIFIERS)} models, such as timm:resnet18"
            )
        names.update(found)
    return tuple(sorted(names))


def check_libraries() -> None:
    """Import the libraries; torchvision first, because the others use it.

    Raises:
        InputError: one of them cannot be imported.
    """
    for library in ("torchvision", "timm", "transformers"):
        load_library(library)


def family(model: str) -> str | None:
    """The well-known family of a model, or None."""
    return next((name for name, own in FAMILIES.items() if any(fnmatch.fnmatch(model, p) for p in own)), None)


def build(model: str) -> tuple[nn.Module, Tensor]:
    """Build a model out of `CLASSIFIERS` with `N_CLASSES` outputs and weights from torch's global random state.

    Returns:
        The network in eval mode, `prepared`, and images (`BATCH`, 3, size, size).
    Raises:
        InputError: its library cannot be imported.
    """
    library, _, name = model.partition(":")
    size = CLASSIFIERS[model]
    if library == "torchvision":
        options: dict[str, Any] = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        network = load_library("torchvision.models").get_model(name, weights=None, num_classes=N_CLASSES, **options)
    elif library == "timm":
        sized = {word.partition("@")[0] for word in TIMM_SIZED.split()}
        options = {"img_size": size} if name in sized else {}
        network = load_library("timm").create_model(name, num_classes=N_CLASSES, **options)
    else:
        network = _transformers_network(name)
    images = torch.randn(BATCH, 3, size, size)
    return prepared(network, images), images


def _transformers_network(name: str) -> nn.Module:
    transformers = load_library("transformers")
    class_name, options = TRANSFORMERS[name]
    stem = class_name.partition("ForImage")[0]
    config = getattr(transformers, f"{stem}Config")(num_labels=N_CLASSES, **options)
    whole = class_name if "ForImage" in class_name else f"{class_name}ForImageClassification"
    network: nn.Module = getattr(transformers, whole)(config)
    return network


def prepared(network: nn.Module, images: Tensor) -> nn.Module:
    """Change a fresh network in place so that all of its parts affect the output; return it in eval mode.

    Noise is added to parameters: those that start as zero or one (gates of residual branches, biases, scales) would
    hide errors. BatchNorm statistics are set to those of `images` (B, C, H, W), so that outputs depend on the input.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.1 if parameter.dim() < 2 or parameter.abs().max() < 1e-3 else 0.02
            parameter.add_(torch.randn_like(parameter), alpha=spread)
        norms = [m for m in network.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        momenta = [norm.momentum for norm in norms]
        network.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        if norms:
            network(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return network.eval()
