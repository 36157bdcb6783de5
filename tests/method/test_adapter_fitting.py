import dataclasses
import math

import pytest
import torch
from sklearn.linear_model import Ridge

from pnc.clones.adapter import MAX_CHANNELS_3X3, Adapter, Stitched, kernel_size
from pnc.clones.position_grids import from_grid, grid_size, pool, resize, to_grid
from pnc.graph.cut_points import CutPoint
from pnc.method.adapter_fitting import AdapterFitter
from pnc.method.ridge import PENALTIES


def cut(name: str, *shape: int, channel_dim: int = 1, n_prefix_tokens: int = 0) -> CutPoint:
    kind = {1: "vector", 2: "tokens", 3: "map"}[len(shape)]
    return CutPoint(name, 0, "", kind, shape, channel_dim, n_prefix_tokens, 0, 0)


MAP = cut("map", 5, 8, 8)
LAST = cut("last", 4, 4, 6, channel_dim=3)
TOKENS = cut("tokens", 17, 7, channel_dim=2, n_prefix_tokens=1)
FLAT = cut("flat", 3, 10, channel_dim=1)
VECTOR = cut("vector", 9)
CUTS = [MAP, LAST, TOKENS, FLAT, VECTOR]


def solved(fitter: AdapterFitter, target: CutPoint, source: CutPoint) -> tuple[Adapter, float]:
    fitted = fitter.solve(target, source)
    assert fitted.error == fitter.error(target, source)
    return fitted.adapter, fitted.error


def tensor_at(where: CutPoint, n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *where.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("where", CUTS, ids=lambda c: c.name)
def test_grids_hold_all_values_and_are_inverted(where):
    tensor = tensor_at(where)
    grid, prefix = to_grid(tensor, where)
    assert grid.shape == (4, where.n_channels, *grid_size(where))
    assert prefix.shape == (4, where.n_prefix_tokens, where.n_channels)
    assert torch.equal(from_grid(grid, prefix, where), tensor)


def test_tokens_without_a_square_number_form_one_row():
    assert grid_size(TOKENS) == (4, 4)
    assert grid_size(FLAT) == (10, 1)


@pytest.mark.parametrize("source", CUTS, ids=lambda c: c.name)
@pytest.mark.parametrize("target", CUTS, ids=lambda c: c.name)
def test_every_kind_of_tensor_maps_to_every_other(target, source):
    fitter = AdapterFitter([target], [source], 12, torch.Generator().manual_seed(0))
    for seed in range(3):
        tensors = {target.name: tensor_at(target, seed=seed)}, {source.name: tensor_at(source, seed=9 + seed)}
        fitter.update(seed, *tensors)
    adapter, error = solved(fitter, target, source)
    assert len(fitter.solve(target, source).held_out) == 3
    assert adapter(tensor_at(target, 2)).shape == (2, *source.shape)
    assert error >= 0
    assert adapter.n_params == sum(buffer.numel() for buffer in adapter.buffers())


@pytest.mark.parametrize("source", [cut("s", 6, 8, 8), cut("s", 6, 4, 4), cut("s", 6, 16, 16)], ids=str)
def test_a_linear_relation_is_found_exactly(source):
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(6, 5, generator=generator), torch.randn(6, generator=generator)
    fitter = AdapterFitter([MAP], [source], 32, generator)
    for seed in range(4):
        x = tensor_at(MAP, 8, seed) * 3 + 100  # a large mean must not cost digits
        resized = resize(x, grid_size(source))
        y = torch.einsum("oc,bchw->bohw", weight, resized) + bias[:, None, None]
        fitter.update(seed % 2, {"map": x}, {"s": y})
    adapter, error = solved(fitter, MAP, source)
    assert error < 1e-6
    # the smallest ridge penalty, float32 rows
    middle = adapter.weight[:, :, adapter.kernel_size // 2, adapter.kernel_size // 2]
    torch.testing.assert_close(middle, weight, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(adapter(x), y, atol=5e-3, rtol=1e-4)  # values near 100 in float32


@pytest.mark.parametrize("source", [cut("s", 6), cut("s", 6, 2, 2)], ids=["vector", "map"])
@pytest.mark.parametrize("n_channels", [9, 90], ids=["moments", "rows"])  # 60 images: fewer than 90 channels
def test_ridge_and_its_held_out_error_are_those_of_scikit_learn(n_channels, source):
    generator = torch.Generator().manual_seed(2)
    target = cut("vector", n_channels)
    x, noise = torch.randn(60, n_channels, generator=generator), torch.randn(60, *source.shape, generator=generator)
    x = x * torch.linspace(0.1, 10, n_channels) + 5
    y = x[:, :6].reshape(60, 6, *(1 for _ in source.shape[1:])) + 3 * noise
    fitter = AdapterFitter([target], [source], 60, generator)
    folds = [torch.arange(60) % 3 == fold for fold in range(3)]
    for fold, rows in enumerate(folds):
        for half in (slice(0, 7), slice(7, None)):  # as batches
            fitter.update(fold, {"vector": x[rows][half]}, {"s": y[rows][half]})
    inputs, n_positions = (x / x.std(0, correction=0)).numpy(), source.size // 6

    def spread(rows):  # every position is a row
        return inputs[rows].repeat(n_positions, 0), y[rows].reshape(-1, 6, n_positions).movedim(1, 2).flatten(0, 1)

    def ridge(rows, penalty):
        return Ridge(alpha=penalty * int(rows.sum()) * n_positions, solver="svd").fit(*spread(rows))

    variance = (spread(slice(None))[1] - spread(slice(None))[1].mean(0)).square().sum()
    missed = []
    for penalty in PENALTIES:
        models = [(ridge(~rows, penalty), *spread(rows)) for rows in folds]
        squares = [(torch.from_numpy(m.predict(a)) - b).square().sum() for m, a, b in models]
        missed.append(float(sum(squares) / variance))
    best = min(range(len(PENALTIES)), key=lambda index: missed[index])
    fitted = fitter.solve(target, source)
    assert fitted.error == pytest.approx(missed[best], rel=1e-5)  # float32 rows
    everything = torch.ones(60, dtype=torch.bool)
    for adapter, rows in zip([fitted.adapter, *fitted.held_out], [everything, *(~r for r in folds)], strict=True):
        made = torch.from_numpy(ridge(rows, PENALTIES[best]).predict(inputs)).float()
        expected = made.reshape(60, 6, *(1 for _ in source.shape[1:])).expand_as(y)
        torch.testing.assert_close(adapter(x), expected, atol=1e-4, rtol=1e-4)  # float32


def test_very_wide_tensors_need_only_the_memory_of_their_rows():
    """25,088 channels, as in VGG after flattening: their second moments would take 5 GB."""
    wide, source = cut("wide", 25_088), cut("s", 3, 4, 4)
    fitter = AdapterFitter([wide], [source], 20, torch.Generator())
    weight = torch.randn(3, 25_088, generator=torch.Generator().manual_seed(6)) / 100
    for fold in range(2):
        x = tensor_at(wide, 10, fold)
        y = (x @ weight.T)[:, :, None, None].expand(-1, -1, 4, 4)
        fitter.update(fold, {"wide": x}, {"s": y})
    adapter, _ = solved(fitter, wide, source)
    torch.testing.assert_close(adapter(x), y, atol=0.1, rtol=0.1)  # fitted on these, with a penalty


def test_memorised_samples_do_not_lower_the_error():
    source = cut("s", 6)
    fitter = AdapterFitter([MAP], [source], 40, torch.Generator())
    for fold in range(4):
        fitter.update(fold, {"map": tensor_at(MAP, 10, fold)}, {"s": tensor_at(source, 10, fold + 50)})
    assert fitter.error(MAP, source) > 0.9  # noise from noise


def test_a_tensor_that_is_never_negative_is_rectified():
    fitter = AdapterFitter([MAP], [cut("s", 5, 8, 8)], 4, torch.Generator())
    fitter.update(0, {"map": tensor_at(MAP)}, {"s": tensor_at(MAP, seed=3).relu()})
    adapter, _ = solved(fitter, MAP, cut("s", 5, 8, 8))
    assert adapter.rectify
    assert (adapter(tensor_at(MAP) * 100) >= 0).all()


@pytest.mark.parametrize("where", CUTS, ids=lambda c: c.name)
def test_the_adapter_between_equal_tensors_is_the_identity(where):
    source, other = dataclasses.replace(where, name="s"), dataclasses.replace(where, name="o")
    fitter = AdapterFitter([where], [source, other], 24, torch.Generator())
    for fold in range(3):
        x = tensor_at(where, 8, fold)
        nearly = x.clone()
        if fold == 2:
            nearly.view(-1)[-1] += 1e-3
        fitter.update(fold, {where.name: x}, {"s": x.clone(), "o": nearly})
    fitted = fitter.solve(where, source)
    assert (fitted.adapter.n_macs, fitted.adapter.n_params, fitted.error) == (0, 0, 0)
    assert fitter.error(where, source) == 0
    for adapter in [fitted.adapter, *fitted.held_out]:
        assert torch.equal(adapter(x), x)
    assert len(fitted.held_out) == 3
    affine, _ = solved(fitter, where, other)
    assert not affine.is_identity and affine.n_macs > 0


def test_prefix_tokens_come_from_the_class_token_or_from_the_mean():
    for target in (MAP, TOKENS):
        weight = torch.randn(7, target.n_channels, generator=torch.Generator().manual_seed(5))
        fitter = AdapterFitter([target], [TOKENS], 160, torch.Generator())
        for seed in range(20):
            x = tensor_at(target, 8, seed)
            summary = x[:, 0] if target is TOKENS else x.mean((2, 3))
            y = tensor_at(TOKENS, 8, seed + 100)
            y[:, 0] = summary @ weight.T
            fitter.update(seed % 5, {target.name: x}, {"tokens": y})
        made = fitter.solve(target, TOKENS).adapter(x)
        torch.testing.assert_close(made[:, 0], y[:, 0], atol=1e-3, rtol=1e-3)  # ridge penalty 1e-7, float32


def test_macs_count_the_cheaper_order():
    up, down = Adapter(cut("t", 5, 4, 4), MAP, False), Adapter(MAP, cut("s", 3, 4, 4), False)
    assert (up.kernel_size, down.kernel_size) == (1, 3)
    assert up.n_macs == 5 * 5 * 16
    assert down.n_macs == 3 * 5 * 9 * 16


def test_drawn_positions_depend_only_on_the_generator():
    fits = []
    for _ in range(2):
        fitter = AdapterFitter([MAP], [cut("s", 2, 8, 8)], 20_000, torch.Generator().manual_seed(3))
        fitter.update(0, {"map": tensor_at(MAP)}, {"s": tensor_at(cut("s", 2, 8, 8), seed=8)})
        fits.append(fitter.solve(MAP, cut("s", 2, 8, 8)).adapter.weight)
    assert torch.equal(*fits)


def test_features_are_pooled_to_one_vector():
    tensor = tensor_at(MAP)
    assert torch.equal(pool(tensor, MAP), tensor.mean((2, 3)))
    tokens = tensor_at(TOKENS)
    assert torch.equal(pool(tokens, TOKENS), tokens[:, 0])
    vector = tensor_at(VECTOR)
    assert pool(vector, VECTOR) is vector
    stitched = Stitched(Adapter(MAP, VECTOR, False), torch.nn.Identity(), VECTOR)
    assert stitched(tensor).shape == (4, math.prod(VECTOR.shape))


def test_neighbours_are_used_on_grids_that_do_not_grow_and_have_few_channels():
    assert kernel_size(MAP, (8, 8)) == kernel_size(MAP, (4, 4)) == 3
    assert kernel_size(MAP, (16, 16)) == kernel_size(MAP, (2, 2)) == kernel_size(VECTOR, (1, 1)) == 1
    assert kernel_size(cut("wide", MAX_CHANNELS_3X3 + 1, 8, 8), (8, 8)) == 1


def test_a_3x3_relation_is_found_exactly():
    weight = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(4))
    source = cut("s", 2, 8, 8)
    fitter = AdapterFitter([MAP], [source], 64, torch.Generator())
    for seed in range(4):
        x = tensor_at(MAP, 16, seed)
        fitter.update(seed, {"map": x}, {"s": torch.nn.functional.conv2d(x, weight, padding=1)})
    adapter, error = solved(fitter, MAP, source)
    assert error < 1e-6
    torch.testing.assert_close(adapter.weight, weight, atol=1e-4, rtol=1e-3)  # the smallest ridge penalty, float32 rows
