"""Rounding: grids, compensation, scales in e4m3; each against the definition or brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from epd.errors import CheckpointError
from epd.quantize.rounding import (
    Grid,
    compensated,
    fit_grid,
    output_error,
    per_tensor_scale,
    round_scales,
)


def _correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that lie near a subspace a quarter as wide, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width // 4, width, generator=generator)
    inputs = torch.randn(tokens, width // 4, generator=generator) @ basis
    return inputs + 0.1 * torch.randn(tokens, width, generator=generator)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_compensation_beats_nearest_on_unseen_correlated_inputs(
    group_size: int, symmetric: bool
) -> None:
    x = _correlated(2048, 256, 0)
    seen, unseen = x[:1024], x[1024:]
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    grid = fit_grid(weight, group_size, symmetric=symmetric)
    nearest = grid.encode(weight).dequantize()
    better = compensated(weight, seen.t() @ seen, grid).dequantize()

    def error(rounded: torch.Tensor) -> float:
        return float(((weight - rounded) @ unseen.t()).norm() / (weight @ unseen.t()).norm())

    assert error(better) < 0.6 * error(nearest)


def test_compensation_of_two_columns_is_the_closed_form() -> None:
    weight = torch.tensor([[0.74, 0.31], [-1.26, 2.4]])
    gram = torch.tensor([[4.0, 1.5], [1.5, 2.0]])
    grid = Grid(torch.ones(2, 1))
    got = compensated(weight, gram, grid, damp=0.0).dequantize()
    first = weight[:, 0].round()
    # with w0 fixed, ||dw X||^2 is least at w1 + (H01 / H11) * (w0 - q0)
    second = (weight[:, 1] + 1.5 / 2.0 * (weight[:, 0] - first)).round()
    torch.testing.assert_close(got, torch.stack((first, second), dim=1))


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    grid = fit_grid(weight, 32, symmetric=True)
    gram = torch.diag(torch.rand(64) + 0.5)
    assert torch.equal(compensated(weight, gram, grid).codes, grid.encode(weight).codes)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    x = _correlated(256, 64, 3)
    x[:, 5] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    grid = fit_grid(weight, 64, symmetric=True)
    codes = compensated(weight, x.t() @ x, grid).codes
    assert torch.equal(codes[:, 5], grid.encode(weight).codes[:, 5])


def test_inputs_without_any_energy_are_refused() -> None:
    grid = Grid(torch.ones(2, 1))
    with pytest.raises(CheckpointError, match="second moments"):
        compensated(torch.randn(2, 4), torch.zeros(4, 4), grid)


def test_shrunk_ranges_never_cost_more_and_win_with_an_outlier() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4)) * 0.1
    weight[:, 7] = 1.0
    importance = torch.ones(128)
    importance[7] = 0.01
    for symmetric in (True, False):
        errors = []
        for grid in (
            fit_grid(weight, 64, symmetric=symmetric),
            fit_grid(weight, 64, symmetric=symmetric, importance=importance),
        ):
            difference = grid.encode(weight).dequantize() - weight
            errors.append((difference.square() * importance).view(-1, 64).sum(-1))
        assert bool((errors[1] <= errors[0]).all())
        assert errors[1].sum() < 0.8 * errors[0].sum()


def test_output_error_is_that_of_the_outputs() -> None:
    x, weight = _correlated(512, 64, 5), torch.randn(16, 64)
    rounded = fit_grid(weight, 32, symmetric=True).encode(weight).dequantize()
    direct = (x @ (weight - rounded).t()).norm() / (x @ weight.t()).norm()
    assert output_error(weight, rounded, x.t() @ x) == pytest.approx(float(direct), rel=1e-3)


def test_rounded_scales_are_e4m3_numbers_over_the_tensor_scale() -> None:
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scales = torch.rand(64, 4, generator=torch.Generator().manual_seed(6)) * 1e-3
    t = per_tensor_scale(scales)
    got = round_scales(scales, t) * t
    assert set(got.flatten().tolist()) <= set(numbers.tolist())
    nearest = (scales.flatten()[:, None] * t - numbers[None, 1:]).abs().amin(1)
    torch.testing.assert_close((got - scales * t).abs().flatten(), nearest)


def test_the_tensor_scale_is_the_best_power_of_two_that_fits() -> None:
    for size, seed in itertools.product((1e-4, 1e-2, 3.0), range(3)):
        generator = torch.Generator().manual_seed(seed)
        scales = torch.rand(32, generator=generator) * size + size / 100
        t = per_tensor_scale(scales)
        assert float(scales.max()) * 7 * t <= 448
        least = min(
            float((round_scales(scales, 2.0**p) - scales).square().sum())
            for p in range(15)
            if float(scales.max()) * 7 * 2.0**p <= 448
        )
        assert float((round_scales(scales, t) - scales).square().sum()) == least


def test_small_scales_would_underflow_without_the_tensor_scale() -> None:
    scales = torch.full((4,), 3e-4)
    assert float((round_scales(scales, 1.0) / scales).max()) > 6
    t = per_tensor_scale(scales)
    torch.testing.assert_close(round_scales(scales, t), scales, rtol=0.07, atol=0)
