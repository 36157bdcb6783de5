"""CIFAR-10: a ResNet-20 that knows airplane to deer gets dog to truck from another one.

    python examples/cifar10.py parquet:PATH

PATH is a folder with train.parquet and test.parquet in the layout of Hugging Face `datasets`; `hf:cifar10` works where
the hub can be reached. Both networks are in results/networks. `pnc bench cifar10` compares the same clone with rivals.
"""

import sys
from pathlib import Path

import pnc

NETWORKS = Path(__file__).parents[1] / "results" / "networks"


def main(data: str, folder: Path = NETWORKS, name: str = "cifar10") -> None:
    """Clone, look, save, compare."""
    # Both networks are files of `pnc pretrain`, which know the names of their classes.
    target = pnc.load_model(str(folder / f"{name}_target.safetensors"))
    source = pnc.load_model(str(folder / f"{name}_source.safetensors"))
    train, test = pnc.load_data(data, "train"), pnc.load_data(data, "test")

    # What the clone is made from: 100 images of each new class, 20 of each old one, and their mirror images.
    support = pnc.draw_support(train, source.classes, target.classes, n_new=100, n_base=20)
    names = {"source_classes": source.classes, "base_classes": target.classes}

    # Closed form alone: half a minute. Without effort= a smaller part is cut out and tuned, in a few minutes.
    clone = pnc.clone(source.module, target.module, support, flip=True, effort="seconds", **names)
    print(clone)
    print(f"file: {pnc.save(clone, 'cifar10.safetensors'):,} bytes")

    # Ten classes now; the first five logits are the target's own, bit for bit.
    net = pnc.attach(target, clone)
    print(pnc.evaluate(net, test))
    print(net.verify())

    # Old classes lose images to new ones. Lowering all new logits trades one for the other.
    net.base_priority = 1.0
    lowered = pnc.evaluate(net, test)
    print(f"with priority 1 nat: old {lowered.base_accuracy:.3f}, new {lowered.new_accuracy:.3f}")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
