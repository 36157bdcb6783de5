"""Two networks of one backbone: a fine-tuned copy of a public network gains classes from the public network itself.

EfficientNet-Lite0 with its ImageNet weights is the source. The target is a copy whose last third was fine-tuned to 50
classes of Tiny-ImageNet. The clone starts where both begin to differ, so the layers that they share run once.

    pip install ".[bench]"
    python examples/one_backbone.py --data parquet:PATH

PATH is a folder with train.parquet and test.parquet of Tiny-ImageNet in the image layout of Hugging Face `datasets`.
The target is fine-tuned once, in a few minutes on one core, and kept in `--runs`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pnc
from pnc.bench.backbone_networks import WAYS, pair
from pnc.bench.public_network import SMALL_BATCH, public_network


def main(words: Sequence[str] | None = None) -> None:
    """Fine-tune the target unless that was done, make a clone in closed form, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Tiny-ImageNet: parquet:PATH or hf:NAME")
    parser.add_argument("--tuned", choices=list(WAYS), default="last third", help="what of the target was fine-tuned")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder where the target is kept")
    options = parser.parse_args(words)

    images = pnc.load_data(options.data, "train"), pnc.load_data(options.data, "test")
    setting = replace(
        pair(public_network(images[0].input_shape), images, options.tuned, options.runs), n_new=20, n_base=5
    )
    source, target = setting.source, setting.target
    new = [name for name in setting.train.classes if name not in target.classes]
    clone = pnc.clone(
        source.module,
        target.module,
        setting.draw(new, seed=0),
        classes=new,
        source_classes=source.classes,
        base_classes=target.classes,
        effort="seconds",
        batch_size=SMALL_BATCH,
    )
    pnc.save(clone, options.runs / "new-classes.safetensors")  # the source's weights stay in the source
    print(clone)
    net = pnc.attach(target, pnc.load(options.runs / "new-classes.safetensors", source=source.module))
    print(pnc.evaluate(net, setting.test, batch_size=SMALL_BATCH))
    print(net.verify())


if __name__ == "__main__":
    main()
