"""A running service gets new classes and loses them again, without a restart: half a minute on digits.

`python examples/serving.py` takes scikit-learn's digits. With Fashion-MNIST as parquet files, three clothes more:
`python examples/serving.py --data parquet:FOLDER --networks fashion_mnist --classes "Sandal,Bag"`
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import pnc

NETWORKS = Path(__file__).parents[1] / "results" / "networks"
TOKEN = "only-for-this-example"


@contextmanager
def served(target: Path, source: Path, state: Path) -> Iterator[str]:
    """Run `pnc serve` in a process of its own; gives its address."""
    words = ["serve", "--target", str(target), "--source", str(source), "--state", str(state), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pnc", *words, "--threads", "1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PNC_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        print(line.strip())
        yield line.split()[0].rstrip(":")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def png(image: Tensor) -> bytes:
    """An image (1, H, W) in [0, 1] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def accuracy(client: pnc.Client, images: Tensor, names: Sequence[str]) -> float:
    """Share of images that the service answers with their name."""
    found: list[str] = []
    for batch in images.split(32):
        found += [one.label for one in client.predict([png(image) for image in batch], top=1)]
    return sum(one == name for one, name in zip(found, names, strict=True)) / len(names)


def main(words: Sequence[str] | None = None) -> None:
    """Run the story."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits")
    parser.add_argument("--networks", default="digits", help="digits or fashion_mnist, of results/networks")
    parser.add_argument("--classes", default="7,8", help="classes that the service gets, one clone each")
    parser.add_argument("--images", type=int, default=200, help="test images of old and of new classes")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    paths = [NETWORKS / f"{asked.networks}_{role}.safetensors" for role in ("target", "source")]
    target, source = map(pnc.load_model, map(str, paths))
    train, test = pnc.load_data(asked.data, "train"), pnc.load_data(asked.data, "test")
    new = asked.classes.split(",")
    labels = [test.classes[label] for label in test.labels.tolist()]
    pixels = test.images / 255 if test.images.dtype == torch.uint8 else test.images
    old_rows = [row for row, name in enumerate(labels) if name in target.classes][: asked.images]
    new_rows = [row for row, name in enumerate(labels) if name in new][: asked.images]

    def show(client: pnc.Client) -> None:
        for what, rows in (("old", old_rows), ("new", new_rows)):
            share = accuracy(client, pixels[rows], [labels[row] for row in rows])
            print(f"  {what} classes: {share:.1%} of {len(rows)} images")
        first = client.predict(png(pixels[new_rows[0]]))[0]
        print(f"  an image of {labels[new_rows[0]]}: {first.text()}; answered by {first.clone or 'the target'}")

    with tempfile.TemporaryDirectory() as folder:
        with served(*paths, Path(folder)) as address, pnc.Client(address, TOKEN) as client:
            print("The target alone")
            show(client)
            for name in new:
                support = pnc.draw_support(train, [name], target.classes, 20, 5, torch.Generator().manual_seed(0))
                made = pnc.clone(
                    source.module,
                    target.module,
                    support,
                    classes=[name],
                    source_classes=source.classes,
                    base_classes=target.classes,
                    effort="seconds",
                )
                client.attach(name, made)
            print(f"With clones for {' and '.join(new)}, attached while it runs")
            show(client)
        with served(*paths, Path(folder)) as address, pnc.Client(address, TOKEN) as client:
            print(f"After a restart it still has {', '.join(client.clones())}")
            for name in new:
                client.detach(name)
            print("Detached: the target alone again")
            show(client)


if __name__ == "__main__":
    main()
