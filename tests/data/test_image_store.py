"""Images of a support: kept in their dtype, read once, and moved to a temporary file if there are too many."""

import gc
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pnc
from digits import NEW, pair, support
from pnc.data import image_store as store_module
from pnc.data.image_store import Images, ImageStore
from pnc.foundation.errors import InputError


def pixels(n, seed=0, dtype=torch.uint8):
    made = torch.randint(0, 256, (n, 3, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


def as_float(one):
    return one.float() / 255 if one.dtype == torch.uint8 else one.float()


def n_bytes_written(store):
    return 0 if store._file is None else os.fstat(store._file.fileno()).st_size


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("memory", [0, 1, 5000, 2**30])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_whatever_the_memory_images_come_back_as_they_were(memory, dtype):
    store = ImageStore(memory)
    batches = [pixels(n, seed, dtype) for seed, n in enumerate((7, 1, 30, 64, 3))]
    for batch in batches:
        store.add(batch)
    everything = torch.cat([as_float(batch) for batch in batches])
    assert (len(store), store.shape) == (105, (3, 4, 5))
    for rows in (
        torch.arange(105),
        torch.randperm(105),
        torch.tensor([104, 3, 3, 50]),
        torch.tensor([], dtype=torch.long),
    ):
        assert torch.equal(store.read(rows), everything[rows])
    size = 2 if dtype == torch.float16 else 1 if dtype == torch.uint8 else 4
    assert n_bytes_written(store) <= 105 * 60 * size
    assert (n_bytes_written(store) > 0) == (memory < 105 * 60 * size)
    store.close()


def test_images_in_memory_are_not_copied_and_kinds_may_follow_each_other():
    store, whole = ImageStore(0), pixels(9)
    store.add(pixels(3, 1))
    store.keep(whole)
    store.add(pixels(2, 2, torch.float32))
    expected = torch.cat([as_float(one) for one in (pixels(3, 1), whole, pixels(2, 2, torch.float32))])
    assert torch.equal(store.read(torch.arange(14)), expected)
    assert n_bytes_written(store) == 3 * 60 + 2 * 60 * 4
    whole[4] = 7
    assert torch.equal(store.read(torch.tensor([7])), as_float(whole[4:5]))


def test_mirror_images_are_made_when_they_are_asked_for():
    store = ImageStore(10**6)
    store.keep(pixels(4))
    both = Images(store, torch.tensor([0, 2, 0, 3]), torch.tensor([False, True, True, False]))
    plain = as_float(pixels(4))
    assert torch.equal(both[:], torch.stack([plain[0], plain[2].flip(2), plain[0].flip(2), plain[3]]))
    assert torch.equal(both[torch.tensor([False, True, False, True])], both[:][[1, 3]])
    assert torch.equal(both.select(torch.tensor([2, 1]))[:], both[:][[2, 1]])
    assert [len(part) for part in both.split(3)] == [3, 1]
    assert both.n_bytes == 240


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 4, 6, dtype=torch.uint8), r"several shapes, \(3, 4, 5\) and, at index 3, \(3, 4, 6\)"),
        (torch.full((2, 3, 4, 5), float("nan")), "2 of 2 hold NaN or infinity, first at index 3"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.int32), "expected uint8 or floating point, got torch.int32"),
        (torch.zeros(3, 4, 5), "expected a non-empty tensor"),
    ],
)
def test_what_is_no_such_image_is_refused_with_its_place(images, words):
    store = ImageStore(10**6, "photos")
    store.add(pixels(3))
    with pytest.raises(InputError, match=f"photos: .*{words}"):
        store.add(images)


def open_files():
    return {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}


class Once(Dataset):
    """Digits that count how often each is read."""

    def __init__(self, broken_at=None):
        data = support(n_new=24, n_base=6)
        self.images, self.labels, self.classes = (
            (data.images * 255).round().to(torch.uint8),
            data.labels,
            list(data.names),
        )
        self.asked, self.broken_at = [], broken_at

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.broken_at:
            raise OSError("no such photograph")
        self.asked.append(index)
        return self.images[index], int(self.labels[index])


def prepared(data, **settings):
    nets = pair()
    return pnc.prepare_task(nets.source.module, nets.target.module, data, classes=NEW, **nets.names(), **settings)


def cloned(data, path):
    task = prepared(data, flip=True)
    with closing(task):
        found = pnc.scan(task, max_cuts=2)
        pnc.save(pnc.fit(task, found.adapter(found.choose())), path)
    return path.read_bytes()


def test_a_clone_is_the_same_to_the_byte_with_and_without_a_file_and_reads_its_data_once(tmp_path, monkeypatch):
    written = []
    write = ImageStore._write
    monkeypatch.setattr(
        ImageStore, "_write", lambda self, images: (written.append(len(images)), write(self, images))[1]
    )
    before, data = open_files(), Once()
    in_memory = cloned(data, tmp_path / "memory")
    assert sorted(data.asked) == list(range(len(data))) and not written
    monkeypatch.setattr("pnc.method.task.IMAGES_SHARE", 0.0)
    again = Once()
    from_file = cloned(DataLoader(again, batch_size=7), tmp_path / "file")
    assert sorted(again.asked) == list(range(len(again))) and sum(written) == len(again)
    assert from_file == in_memory
    gc.collect()
    assert open_files() <= before


def test_the_file_is_gone_after_an_error_too(monkeypatch):
    monkeypatch.setattr("pnc.method.task.IMAGES_SHARE", 0.0)
    before = open_files()
    with pytest.raises(OSError, match="no such photograph"):
        prepared(Once(broken_at=100))
    gc.collect()
    assert open_files() <= before
    nets, data = pair(), Once()

    def stop(*_):
        assert open_files() - before
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pnc.clone(nets.source.module, nets.target.module, data, **nets.names(), progress=stop)
    assert open_files() <= before


def test_a_memory_that_holds_nothing_is_refused():
    with pytest.raises(InputError, match="memory: expected a whole number, at least 1048576; got 1000"):
        prepared(support(), memory=1000)


def test_a_part_of_a_support_has_its_classes_and_folds_in_the_same_shares():
    task = prepared(support(n_new=40, n_base=20), flip=True)
    part = task.reduced(100)
    samples = part.samples
    assert len(samples.groups.unique()) == 100 and len(samples.labels) == 200  # including copies
    assert (samples.folds.diff() >= 0).all() and samples.n_folds == 5
    counts = samples.labels.bincount(minlength=10)
    assert (counts[:5] - 200 * 20 / 300).abs().max() <= 6 and (counts[5:] - 200 * 40 / 300).abs().max() <= 6
    for label in range(5, 10):
        assert len(samples.folds[samples.labels == label].unique()) == 5
    few = task.reduced(1).samples  # at least one image of every new class, and of some base class, in each fold
    assert few.labels.bincount(minlength=10).tolist() == [2] * 5 + [10] * 5
    assert task.reduced(300) is task
    assert task.within(10, share=1.0) is task
