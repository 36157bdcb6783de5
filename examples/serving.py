"""A running service gets new classes and loses them again while it answers; half a minute.

With Fashion-MNIST, the target knows five clothes and gets sandals and bags, one clone each:
`python examples/serving.py --data parquet:FOLDER` or `--data hf:NAME`. Without `--data`, scikit-learn's digits.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
from PIL import Image
from torch import Tensor

import pnc

NETWORKS = Path(__file__).parents[1] / "results" / "networks"
TOKEN = "only-for-this-example"
BATCH = 32
"""Images in one request."""


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


def labels_of(client: pnc.Client, files: Sequence[bytes]) -> list[str]:
    """The most probable class of each image, among those of the target and all clones."""
    batches = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
    return [one.label for batch in batches for one in client.predict(batch, top=1)]


def base_answers(client: pnc.Client, files: Sequence[bytes]) -> list[Mapping[str, float]]:
    """Probabilities of the target's own classes, whatever is attached."""
    return [one.probabilities for one in client.predict(files[:BATCH], clones=[])]


@contextmanager
def asked_meanwhile(address: str, files: Sequence[bytes]) -> Iterator[None]:
    """Ask the service without a pause; any answer that fails is an error."""
    begun, done = Event(), Event()

    def ask() -> int:
        n_answers = 0
        try:
            with pnc.Client(address) as client:
                while n_answers == 0 or not done.is_set():
                    n_answers += len(client.predict(files[:BATCH]))
                    begun.set()
        finally:
            begun.set()
        return n_answers

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        begun.wait()
        try:
            yield
        finally:
            done.set()
    print(f"  meanwhile it answered for {asking.result()} images")


def main(words: Sequence[str] | None = None) -> None:
    """Run the story."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", help="digits, or Fashion-MNIST as parquet:FOLDER or hf:NAME")
    parser.add_argument("--classes", help="classes that the service gets, one clone each; Sandal,Bag or 7,8")
    parser.add_argument("--images", type=int, default=200, help="test images of old and of new classes")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    networks, classes = ("digits", "7,8") if asked.data == "digits" else ("fashion_mnist", "Sandal,Bag")
    new = (asked.classes or classes).split(",")
    paths = [NETWORKS / f"{networks}_{role}.safetensors" for role in ("target", "source")]
    target, source = map(pnc.load_model, map(str, paths))
    train, test = pnc.load_data(asked.data, "train"), pnc.load_data(asked.data, "test")
    labels = [test.classes[label] for label in test.labels.tolist()]
    pixels = test.images / 255 if test.images.dtype == torch.uint8 else test.images
    old_rows = [row for row, name in enumerate(labels) if name in target.classes][: asked.images]
    new_rows = [row for row, name in enumerate(labels) if name in new][: asked.images]
    old_files, new_files = ([png(pixels[row]) for row in rows] for rows in (old_rows, new_rows))

    def show(client: pnc.Client) -> list[Mapping[str, float]]:
        for what, rows, files in (("old", old_rows, old_files), ("new", new_rows, new_files)):
            found = labels_of(client, files)
            share = sum(labels[row] == name for row, name in zip(rows, found, strict=True)) / len(rows)
            print(f"  {what} classes: {share:.1%} of {len(rows)} images")
        first = client.predict(new_files[0])[0]
        print(f"  an image of {labels[new_rows[0]]}: {first.text()}; answered by {first.clone or 'the target'}")
        return base_answers(client, old_files)

    clones = {}
    for name in new:
        support = pnc.draw_support(train, [name], target.classes, 20, 5, torch.Generator().manual_seed(0))
        clones[name] = pnc.clone(
            source.module,
            target.module,
            support,
            classes=[name],
            source_classes=source.classes,
            base_classes=target.classes,
            effort="seconds",
        )
    with tempfile.TemporaryDirectory() as folder:
        with served(*paths, Path(folder)) as address, pnc.Client(address, TOKEN) as client:
            print("The target alone")
            before = show(client)
            print(f"Clones for {' and '.join(new)} are attached")
            with asked_meanwhile(address, old_files):
                for name, made in clones.items():
                    client.attach(name, made)
            answers = [show(client)]
        with served(*paths, Path(folder)) as address, pnc.Client(address, TOKEN) as client:
            print(f"After a restart it still has {', '.join(client.clones())}; they are detached")
            with asked_meanwhile(address, old_files):
                for name in new:
                    client.detach(name)
            answers.append(show(client))
    if any(one != before for one in answers):
        raise SystemExit("the target's own answers changed")
    print("The target's own answers were the same throughout, bit for bit")


if __name__ == "__main__":
    main()
