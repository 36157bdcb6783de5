"""Recording and cutting networks of torchvision, timm and transformers: one per family, each with its own trap."""

import importlib
import warnings

import pytest
import torch

from pnc.foundation.network_state import differences, take_snapshot
from pnc.foundation.tensor_bits import same_bits
from pnc.graph.candidate_cuts import candidate_cuts
from pnc.graph.classifier import find_head
from pnc.graph.cut_points import LOGITS, extract
from pnc.graph.recording import record

NETWORKS = {
    "torchvision:swin": "shifted windows, maps with the channels last",
    "torchvision:vit": "torch.nn.MultiheadAttention inside",
    "torchvision:squeezenet1_1": "a convolution for a head, ReLU after it",
    "torchvision:shufflenet_v2_x0_5": "channels shuffled by views",
    "timm:levit_128s": "biases cached in eval mode; two heads behind BatchNorm",
    "timm:deit_tiny_distilled_patch16_224": "two heads on two tokens",
    "timm:efficientvim_m1": "heads on every stage",
    "timm:xcit_nano_12_p16_224": "position encoding computed in forward, class token added late",
    "timm:mobilevit_xxs": "maps folded into the batch",
    "timm:hrnet_w18_small": "branches at several scales, few cuts",
    "transformers:Swinv2": "dataclass outputs, windows, cosine attention",
    "transformers:LevitForImageClassificationWithTeacher": "two heads",
    "transformers:Dinov2": "class token and mean of the others as features",
    "transformers:ConvNextV2": "global response normalization",
}


def build(name, torchvision):
    library, name = name.split(":")
    size = 64
    if name == "swin":
        from torchvision.models import SwinTransformer

        network = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)
    elif name == "vit":
        from torchvision.models import VisionTransformer

        network = VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)
    elif library == "torchvision":
        network = torchvision.models.get_model(name, weights=None, num_classes=5)
    elif library == "timm":
        options = {"img_size": size} if name.startswith(("levit", "deit", "xcit")) else {}
        network = importlib.import_module("timm").create_model(name, num_classes=5, **options)
    else:
        network = transformers_network(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights that start as zero would hide errors
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network, torch.randn(5, 3, size, size, generator=generator)


def transformers_network(name):
    transformers = importlib.import_module("transformers")
    stages = {"hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]}
    options = {
        "Swinv2": {"image_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "LevitForImageClassificationWithTeacher": {
            **stages,
            **{"image_size": 64, "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]},
        },
        "Dinov2": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        "ConvNextV2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    }[name]
    family = name.split("For")[0]
    config = getattr(transformers, f"{family}Config")(num_labels=5, **options)
    return getattr(transformers, name if "For" in name else f"{family}ForImageClassification")(config)


@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_a_library_is_exact_and_untouched(name, torchvision):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn when they are imported
        torch.manual_seed(0)
        network, x = build(name, torchvision)
    before = take_snapshot(network)
    recording = record(network, x[:2])
    assert not differences(network, before)
    head, cuts = find_head(recording), candidate_cuts(recording, limit=6)
    assert head.n_features > 0
    assert len(cuts) > 1
    network.eval()
    with torch.no_grad():
        logits = network(x.clone())
        logits = getattr(logits, "logits", logits)
        assert same_bits(recording.module(x.clone()), logits)
        *taps, whole = extract(recording, None, [*cuts, LOGITS])(x)
        assert same_bits(whole, logits)
        for cut, tap in zip(cuts, taps, strict=True):
            assert same_bits(extract(recording, cut, [LOGITS])(tap), logits), cut.name
