"""A small network gets classes of a public ImageNet model, each seeing the images at its own size.

    pip install ".[bench]"
    python examples/tiny_imagenet.py parquet:PATH

The target is a ResNet-20 for 32x32 pixels that knows 50 classes of Tiny-ImageNet, in results/networks; the source is
EfficientNet-Lite0 with its ImageNet weights: 1000 classes. PATH is a folder with train.parquet and test.parquet in the
layout of Hugging Face `datasets`. `pnc bench tiny-imagenet` compares the same clone with rivals.
"""

import sys
from pathlib import Path

import pnc
from pnc.bench.public_network import public_network

TARGET = Path(__file__).parents[1] / "results" / "networks" / "tiny_imagenet_target.safetensors"


def main(data: str, file: Path = TARGET, n_new: int = 10) -> None:
    """Wrap both networks so that they take the same images, clone, compare."""
    train, test = pnc.load_data(data, "train"), pnc.load_data(data, "test")

    # The images are 64x64. `Preprocessed` puts what a network needs in front of it: here resizing to 32x32 ...
    small = pnc.load_model(str(file))
    target = pnc.Preprocessed(small.module, small.input_shape)

    # ... and there resizing to 128x128 and the normalization that the source was trained with.
    source = public_network(train.input_shape, 128)

    # The source has 1000 classes: choose ten of those that the target lacks. The names must agree, so that images of
    # the data are images of the source's classes.
    new = [name for name in train.classes if name in source.classes and name not in small.classes][:n_new]
    support = pnc.draw_support(train, new, small.classes, n_new=20, n_base=5)
    names = {"source_classes": source.classes, "base_classes": small.classes}
    clone = pnc.clone(source.module, target, support, classes=new, flip=True, effort="seconds", **names)
    print(clone)

    # The file has what was fitted; the ImageNet weights stay in the source.
    weights = sum(tensor.numel() * tensor.element_size() for tensor in source.module.state_dict().values())
    size = pnc.save(clone, "tiny_imagenet.safetensors")
    print(f"file: {size:,} bytes, {size / weights:.1%} of the source's weights")
    print(pnc.evaluate(pnc.attach(target, clone), test))


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
