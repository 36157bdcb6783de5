import torch

from digits import pair
from pnc.bench.public_network import resized
from pnc.cli import bench_options
from pnc.cli.bench_options import PairOptions
from pnc.data.image_set import ImageSet


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
    monkeypatch.setattr(bench_options, "public_network", lambda shape: resized(nets.source, shape))
    monkeypatch.setattr(bench_options, "load_network", lambda options, input_shape: nets.target)
    monkeypatch.setattr(bench_options, "check_trained", lambda *options: None)
    setting = PairOptions("efficientnet-lite0", "target.safetensors", "digits", "2/1", False).load()
    assert setting.source.input_shape == setting.target.input_shape == (1, 12, 12)
    assert setting.batch_size == 16
