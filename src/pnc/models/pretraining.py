"""Training a network from scratch on labelled images: deterministic, resumable, cached."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnc.data.image_set import ImageSet, images_as_float, relabel
from pnc.foundation.argument_checks import MAX_THREADS, came
from pnc.foundation.errors import FileFormatError, InputError
from pnc.foundation.file_writing import check_place, path_text
from pnc.foundation.specs import split_spec
from pnc.foundation.tensor_files import canonical_json, read_tensors, write_tensors
from pnc.models.model_specs import LoadedModel, build_model, load_model, save_model
from pnc.models.reference_networks import Normalize
from pnc.models.weight_files import load_tensors

_WARMUP_SHARE = 0.15


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; `recipe_for` gives one that suits a reference network.

    The defaults suit a ResNet-20 in ten epochs: accuracy .88 on five classes of CIFAR-10 (JPEG), compared with .86 for
    batches of 128, 4 pixels of padding and a warm-up over 30% of the steps.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step; the last, smaller batch of an epoch is left out if there is a full one.
        optimizer: "sgd" (Nesterov momentum .9) or "adamw".
        lr: Peak of the one-cycle schedule: a linear rise over 15% of the steps, then a cosine down to 0.
        weight_decay: For weight matrices and filters; not for biases, norms and tokens.
        label_smoothing: In [0, 1).
        crop_padding: Black pixels around an image for random crops; 0 for no crop.
        flip: Mirror half of the images; not for digits and the like.
        precision: Of the forward pass in training; "bfloat16" (autocast) is faster on processors that support it.
        seed: Of the weights, the order and the augmentation.
        device: Where to train.
        threads: Of torch on the CPU in training; None keeps torch's setting.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop_padding: int = 2
    flip: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 10**6),
            ("batch_size", 2, 10**6),  # BatchNorm needs two
            ("lr", 1e-9, 1e3),
            ("weight_decay", 0, 1e3),
            ("label_smoothing", 0, 0.999),
            ("crop_padding", 0, 1000),
            ("seed", 0, 2**63 - 1),
            ("threads", 1, MAX_THREADS),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name}: expected a number from {low:g} to {high:g}; got {came(value)}")
        if self.optimizer not in ("sgd", "adamw"):
            raise InputError(f"optimizer: expected 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision: expected 'float32' or 'bfloat16', got {self.precision!r}")

    def facts(self) -> dict[str, Any]:
        """Return what determines the weights, as JSON values: all but `device` and `threads`, which affect rounding."""
        return {name: value for name, value in asdict(self).items() if name not in ("device", "threads")}


@dataclass(frozen=True)
class EpochReport:
    """A finished epoch: its number from 1, their total, seconds (training and test), mean loss, test accuracy."""

    epoch: int
    epochs: int
    seconds: float
    train_loss: float
    test_accuracy: float


def pretrain(
    spec: str,
    train: ImageSet,
    test: ImageSet,
    recipe: Recipe,
    out: str | Path,
    progress: Callable[[EpochReport], None] | None = None,
    overwrite: bool = False,
) -> LoadedModel:
    """Train the network of a spec on all classes of `train`; write it to a file that `load_model` reads.

    On one device and number of threads, the same arguments give the same file, byte for byte. The state after every
    epoch is written to `out` + ".partial.safetensors"; a stopped run continues from there and ends with the same
    weights. A finished file of the same arguments is loaded instead of trained again. Torch's global random state and
    number of threads do not change.

    Args:
        spec: ``zoo:...`` or ``py:...``, as for `load_model`.
        train: Training images; its classes become the network's outputs.
        test: Images to measure the accuracy on, of the same classes and shape.
        recipe: How to train.
        out: File to write, .safetensors.
        progress: Called after every epoch.
        overwrite: Replace a file of other arguments.

    Returns:
        The network as read back from `out`; its facts hold "recipe", "test_accuracy", and "history", with
        "train_loss" and "test_accuracy" of each epoch.

    Raises:
        InputError: `test` does not match `train`; the device is missing; the loss became infinite; `out` is not a
            .safetensors path, cannot be written to, or holds a network of other arguments.
    """
    out = Path(out)
    test = _matching_test_set(train, test)
    _check_place(out, recipe.device)
    identity = _identity(spec, train, test, recipe)
    partial = out.with_name(out.name + ".partial.safetensors")
    if not _is_outdated(out, identity, overwrite):
        return _load_finished(spec, out)
    run = _start(spec, train, recipe)
    if not _is_outdated(partial, identity, overwrite):
        _resume(run, partial)
    _save_partial(run, partial, identity)  # before the first epoch, so that an unwritable path fails now
    with _thread_number(recipe.threads):
        for epoch in range(len(run.history), recipe.epochs):
            started = time.perf_counter()
            loss = _train_epoch(run, train, recipe, epoch)
            accuracy = _accuracy(run.model.module, test, recipe)
            run.history.append({"train_loss": loss, "test_accuracy": accuracy})
            _save_partial(run, partial, identity)
            if progress is not None:
                progress(EpochReport(epoch + 1, recipe.epochs, time.perf_counter() - started, loss, accuracy))
    facts = {
        "identity": identity,
        "recipe": recipe.facts(),
        "history": run.history,
        "test_accuracy": run.history[-1]["test_accuracy"],
    }
    save_model(run.model, out, facts)
    partial.unlink()
    return _load_finished(spec, out)


def recipe_for(spec: str) -> Recipe:
    """Return the recipe for a network: SGD for convolutional ones, AdamW for the transformer."""
    _, name, _ = split_spec(spec, "model")
    if name.startswith("vit"):
        return Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.05)
    return Recipe()


@dataclass(frozen=True)
class _Run:
    """Training in progress; `history` grows by one entry per finished epoch."""

    model: LoadedModel
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]]


def _start(spec: str, train: ImageSet, recipe: Recipe) -> _Run:
    model = build_model(spec, train.classes, train.input_shape, recipe.seed)
    _set_normalization(model.module, train.images)
    # Saves a quarter of the time of convolutions on the CPU (ResNet-20, batch 128, 1 thread: .37 s per step, not .49).
    model.module.to(recipe.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
    return _Run(model, _optimizer(model.module, recipe), [])


def _load_finished(spec: str, out: Path) -> LoadedModel:
    return load_model(spec, weights=out)


def _is_outdated(path: Path, identity: str, overwrite: bool) -> bool:
    """Return whether `path` must be written: it is missing, or of other arguments and may be overwritten."""
    if not path.exists():
        return True
    try:
        same = read_tensors(path)[1].get("identity") == identity
    except FileFormatError:
        same = False
    if not same and not overwrite:
        raise InputError(
            f"out: {path} was made with another network, data or recipe; choose another path, or overwrite it"
        )
    return not same


def _check_place(out: Path, device: str) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"out: expected a path that ends in .safetensors, got {path_text(out)}")
    check_place(out, "out")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise InputError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}; choose cpu") from error


def _matching_test_set(train: ImageSet, test: ImageSet) -> ImageSet:
    empty = [name for name, count in train.counts().items() if not count]
    if empty:
        raise InputError(f"train: no image of {', '.join(empty[:5])}; use class_subset to train on the other classes")
    test = relabel(test, train.classes)
    if test.input_shape != train.input_shape:
        raise InputError(
            f"test: images of shape {test.input_shape}, but {train.input_shape} in train; load both with one size"
        )
    if torch.equal(test.images, train.images):
        raise InputError("test: these are the training images; give a separate split, or the accuracy means nothing")
    return test


def _identity(spec: str, train: ImageSet, test: ImageSet, recipe: Recipe) -> str:
    """Return a hash (hex) of everything that determines the weights and the accuracy in the file."""
    settings = {"model": spec, "classes": train.classes, "recipe": recipe.facts()}
    digest = hashlib.sha256(canonical_json(settings).encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _set_normalization(module: nn.Module, images: Tensor) -> None:
    """Set mean and standard deviation of the network's `Normalize`, if it has one, to those of the images."""
    sums, squares = [], []
    for chunk in torch.split(images, 1000):
        pixels = images_as_float(chunk).double()
        sums.append(pixels.sum(dim=(0, 2, 3)))
        squares.append(pixels.square().sum(dim=(0, 2, 3)))
    n_pixels = images.numel() // images.shape[1]
    mean, square = torch.stack(sums).sum(0) / n_pixels, torch.stack(squares).sum(0) / n_pixels
    std = (square - mean.square()).clamp_min(1e-4).sqrt()
    for part in module.modules():
        if isinstance(part, Normalize):
            part.mean.copy_(mean[:, None, None])
            part.std.copy_(std[:, None, None])


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    weights = [p for name, p in module.named_parameters() if name.endswith("weight") and p.ndim > 1]
    chosen = set(weights)
    others = [p for p in module.parameters() if p not in chosen]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)


def one_cycle(step: int, n_steps: int) -> float:
    """Return the share of the peak learning rate at `step` in [0, n_steps): linear rise, then a cosine down to 0."""
    n_warmup = max(1, round(_WARMUP_SHARE * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - n_warmup) / (n_steps - n_warmup)))


def _train_epoch(run: _Run, train: ImageSet, recipe: Recipe, epoch: int) -> float:
    """Train for one epoch and return the mean loss; seed and epoch determine all randomness, so none is stored."""
    module, device = run.model.module.train(), torch.device(recipe.device)
    seed = (recipe.seed * 1_000_003 + epoch + 1) % 2**63
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    batch_size = min(recipe.batch_size, len(train))
    n_steps = len(train) // batch_size
    total = torch.zeros((), device=device)
    with _global_seed(seed, device):
        for step, indices in enumerate(torch.split(order[: n_steps * batch_size], batch_size)):
            images = augment(train.images[indices], recipe.crop_padding, recipe.flip, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                logits = module(_network_input(images, device))
            labels = train.labels[indices].to(device)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            for group in run.optimizer.param_groups:
                group["lr"] = recipe.lr * one_cycle(epoch * n_steps + step, recipe.epochs * n_steps)
            run.optimizer.zero_grad()
            torch.autograd.backward(loss)
            run.optimizer.step()
            total += loss.detach()
    mean_loss = (total / n_steps).item()
    values = (one for one in module.state_dict().values() if one.is_floating_point())
    if not math.isfinite(mean_loss) or not all(bool(one.isfinite().all()) for one in values):
        raise InputError(
            f"lr: the loss or a weight became infinite in epoch {epoch + 1} (mean loss {mean_loss:.3g}) with lr "
            f"{recipe.lr}; choose a lower one"
        )
    return mean_loss


def augment(images: Tensor, crop_padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `crop_padding` pixels each way, filling in black; mirror half of them if `flip`.

    Args:
        images: (B, C, H, W), any dtype.
        crop_padding: 0 or more.
        flip: Whether to mirror.
        generator: Randomness, on the CPU.

    Returns:
        Images of the same shape and dtype.
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * crop_padding + 1, (2, batch), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    if flip:
        mirrored = torch.rand(batch, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, [crop_padding] * 4)
    sample, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _network_input(images: Tensor, device: torch.device) -> Tensor:
    return images_as_float(images.to(device)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _accuracy(module: nn.Module, data: ImageSet, recipe: Recipe) -> float:
    module.eval()
    n_right = 0
    for images, labels in zip(torch.split(data.images, 500), torch.split(data.labels, 500), strict=True):
        predicted = module(_network_input(images, torch.device(recipe.device))).argmax(1)
        n_right += int((predicted.cpu() == labels).sum())
    return n_right / len(data)


def _save_partial(run: _Run, partial: Path, identity: str) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in run.model.module.state_dict().items()}
    for index, values in run.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{index}/{key}": value for key, value in values.items()})
    write_tensors(partial, tensors, {"identity": identity, "history": run.history})


def _resume(run: _Run, partial: Path) -> None:
    tensors, facts = read_tensors(partial)
    history = facts.get("history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise FileFormatError(f"out: the metadata of {partial} is damaged; remove the file to start training again")
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    load_tensors(run.model.module, weights)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "optimizer":
            index, _, key = rest.partition("/")
            if not index.isdecimal() or len(index) > 9:
                raise FileFormatError(f"out: {partial} holds {name[:80]!r}; remove the file to start training again")
            state.setdefault(int(index), {})[key] = tensor
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.history.extend(history)


@contextmanager
def _global_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global randomness (dropout and the like) within the block, and restore its state."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _thread_number(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
