"""Launches that ship with the package: how one is found, and that every one can be launched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from epd_kernels import launch
from epd_kernels.launch import GemmConfig, read_launches, tuned_launch

TABLES = sorted(Path(launch.__file__).with_name("tuned").glob("*.json"))
H200 = "nvidia-h200-triton-3.6"


def test_a_table_ships():
    assert H200 in [path.stem for path in TABLES]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_launch_is_one_the_kernel_takes(path):
    """Tiles of powers of two, of at least 64 rows and 16 tokens unless one warp takes them."""
    for shapes in read_launches(path).values():
        for (n, k), launches in shapes.items():
            assert n % 64 == k % 128 == 0
            for config in launches.values():
                if config.num_warps == 1:
                    assert (config.block_n, config.block_m) == (16, 8)
                    assert config.splits == 1 and k // 128 % config.num_stages == 0
                    continue
                assert config.block_n in (64, 128, 256) and config.block_m in (16, 32, 64, 128)
                assert config.block_n * config.block_m <= 32 * 32 * 2 * config.num_warps * 2
                assert 1 <= config.splits <= k // 128 and config.use_ptx


def test_nearest_shape_and_bucket():
    table = read_launches(next(path for path in TABLES if path.stem == H200))
    exact = table["w4a8-fp8-tiled"][22016, 4096]
    find = lambda m, n, k: tuned_launch(H200, "w4a8-fp8-tiled", m, n, k)  # noqa: E731
    for tokens, bucket in ((1, 1), (2, 4), (16, 16), (17, 32), (128, 128), (640, 640)):
        assert find(tokens, 22016, 4096) == exact[bucket]
    assert find(64, 20480, 4096) == exact[64]
    assert find(64, 1024, 4096) is None
    assert find(16, 4096, 14336) == table["w4a8-fp8-tiled"][4096, 11008][16]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_k_is_not_split_beyond_the_tuned_token_counts(path):
    for scheme, shapes in read_launches(path).items():
        for n, k in shapes:
            found = tuned_launch(path.stem, scheme, 16 * 1024, n, k)
            assert found is not None and found.splits == 1


def test_row_major_launches_serve_token_counts_that_were_not_tuned_in_tiles(monkeypatch):
    rows = {16: GemmConfig(64, 16, 4, 4, 4), 640: GemmConfig(128, 64, 2, 4, 3)}
    tiles = {16: GemmConfig(64, 16, 2, 4, 6), 128: GemmConfig(64, 64, 2, 4, 3)}
    table = {"s": {(4096, 11008): rows}, "s-tiled": {(4096, 11008): tiles}}
    monkeypatch.setattr(launch, "_table", lambda name: table)
    find = partial(tuned_launch.__wrapped__, "device", "s-tiled", N=4096, K=14336)
    assert find(M=16) == tiles[16]
    assert find(M=100) == tiles[128]
    assert find(M=300) == rows[640]
    assert find(M=16384) == replace(rows[640], splits=1)


def test_without_a_table():
    assert tuned_launch("another-device", "w4a8-fp8", 16, 22016, 4096) is None
    assert tuned_launch(H200, "", 16, 22016, 4096) is None


def test_launches_are_read_by_field_name(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(
        '{"fields": ["block_m", "block_n", "splits", "num_warps", "num_stages"],'
        ' "gemm": {"s": {"64x128": {"16": [16, 64, 2, 4, 3]}}}}'
    )
    assert read_launches(path) == {"s": {(64, 128): {16: GemmConfig(64, 16, 2, 4, 3)}}}
