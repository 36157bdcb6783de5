import pytest
import torch

from digits import pair
from pnc.bench.public_network import resized
from pnc.cli import bench_options
from pnc.cli.arguments import ModelOptions
from pnc.cli.bench_options import PairOptions
from pnc.data.image_set import ImageSet
from pnc.foundation.errors import InputError


def test_a_network_takes_images_of_another_size():
    source = pair().source
    assert resized(source, source.input_shape) is source
    larger = resized(source, (1, 12, 12))
    assert larger.input_shape == (1, 12, 12) and larger.classes == source.classes
    images = torch.rand(2, 1, 12, 12)
    small = torch.nn.functional.interpolate(images, (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(larger.module(images), source.module(small), atol=1e-5)


def test_beside_the_public_network_a_target_takes_the_same_images(monkeypatch):
    nets = pair()
    data = ImageSet(torch.rand(20, 1, 12, 12), torch.arange(20) % 10, tuple("0123456789"))
    monkeypatch.setattr(bench_options, "load_data", lambda spec, split: data)
    sizes = []
    monkeypatch.setattr(
        bench_options, "public_network", lambda shape, size: sizes.append(size) or resized(nets.source, shape)
    )
    monkeypatch.setattr(bench_options, "load_network", lambda options, input_shape: nets.target)
    monkeypatch.setattr(bench_options, "check_trained", lambda *options: None)
    PairOptions("efficientnet-lite0?size=96", "target.safetensors", "digits", "2/1", False).load()
    setting = PairOptions("efficientnet-lite0", "target.safetensors", "digits", "2/1", False).load()
    assert sizes == [96, 128]
    assert setting.source.input_shape == setting.target.input_shape == (1, 12, 12)
    assert setting.batch_size == 16


@pytest.mark.parametrize(
    "spec", ["efficientnet-lite0?size=big", "efficientnet-lite0?size=8", "efficientnet-lite0?width=2"]
)
def test_another_form_of_the_public_network_is_refused(spec):
    with pytest.raises(InputError, match="source: expected efficientnet-lite0, or efficientnet-lite0.size=N"):
        PairOptions(spec, "target.safetensors", "digits", "2/1", False)._network(
            ModelOptions("source", spec, None, None, "cpu"), (1, 8, 8)
        )
