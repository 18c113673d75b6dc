"""Where Triton runs, what the device is, and how each kernel is launched on it.

Triton is optional. Without it (or on CPU tensors) every op takes its torch reference; with
`TRITON_INTERPRET=1` in the environment before the first import, the kernels run on CPU tensors,
which is how the tests exercise them without a GPU.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    triton = tl = gdc_launch_dependents = gdc_wait = None

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERPRETED", "AttentionConfig", "DeviceFacts", "GemmConfig", "attention_config",
           "attention_splits", "constant", "device_facts", "gdc_launch_dependents", "gdc_wait",
           "gemm_config", "jit", "next_power_of_2", "previous_power_of_2", "read_launches",
           "row_warps", "tl", "triton", "tuned_launch", "tuned_name"]  # fmt: skip

_VARYING = {"M", "least_queries", "num_keys", "num_queries", "num_splits", "num_weights",
            "num_whole"}  # fmt: skip
_MIN_SPLIT = 128  # positions per warp; a shorter split costs more in merging than it gains
_SPLITS = sorted({1 << n for n in range(11)} | {3 << n for n in range(9)})
_TUNED = Path(__file__).with_name("tuned")
# what images, questions and budgets decide, in the kernels that choose vision tokens
_VARYING |= {"form", "num_columns", "num_kept", "num_rows", "num_sides", "num_tiles", "num_tokens",
             "power", "side"}  # fmt: skip
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel: Callable[..., Any]) -> Any:
    """The compiled (or interpreted) kernel; the function itself on a host without Triton.

    The parameters named in `_VARYING` vary from step to step: no variant is compiled for their
    values.
    """
    if triton is None:
        return kernel
    varying = _VARYING & inspect.signature(kernel).parameters.keys()
    return triton.jit(kernel, do_not_specialize=sorted(varying))


def constant(value: object) -> Any:
    """A module constant that kernels may read."""
    return value if triton is None else tl.constexpr(value)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What launch decisions depend on. `arch` is 90 for compute capability 9.0, 0 for a CPU."""

    arch: int
    num_sms: int


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of `device`, asked once; a CPU looks like a GPU of four multiprocessors."""
    if device.type != "cuda":
        return DeviceFacts(arch=0, num_sms=4)
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(properties.major * 10 + properties.minor, properties.multi_processor_count)


@cache
def tuned_name(device: torch.device) -> str:
    """The file name, without its ending, of the launches tuned for `device` and this Triton."""
    words = torch.cuda.get_device_name(device).lower().replace("/", " ").split()
    release = ".".join(triton.__version__.split(".")[:2])
    return f"{'-'.join(words)}-triton-{release}"


def previous_power_of_2(n: int) -> int:
    """The greatest power of two that is at most `n`, and 1 below that."""
    return 1 << max(n.bit_length() - 1, 0)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def row_warps(width: int) -> int:
    """Warps for a kernel that keeps one row of `width` elements in registers."""
    return min(max(next_power_of_2(width) // 512, 1), 16)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Tile rows, KV positions per step, warps and pipeline stages of an attention kernel.

    Splits of positions are counted for `occupancy` programs per multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    occupancy: int = 1


def attention_config(
    device: torch.device, *, head_dim: int, rows: int, decode: bool
) -> AttentionConfig:
    """The launch configuration for `rows` (query, head) pairs per tile.

    The tensor cores want at least 16 rows; a tile never holds fewer than one query's head group.
    """
    block_m = max(16, next_power_of_2(rows))
    if INTERPRETED:
        return AttentionConfig(block_m, 32, 4, 1, 2 if decode else 1)
    wide = head_dim > 64
    if decode and block_m == 16 and head_dim <= 128:
        # one warp: nothing to wait for, and weights need not pass through shared memory
        return AttentionConfig(16, 32, 1, 2, 8)
    if decode:
        return AttentionConfig(block_m, 64, 4, 3, 2)
    arch = device_facts(device).arch
    if arch >= 90:
        return AttentionConfig(max(128, block_m), 64, 8 if wide else 4, 3)
    return AttentionConfig(max(64, block_m), 32 if wide else 64, 4, 2)


def attention_splits(
    device: torch.device, *, programs: int, max_seqlen_k: int, occupancy: int, num_warps: int,
    most: int = 1024,
) -> int:  # fmt: skip
    """Spans that positions are cut into: the fewest that keep the device busy the least time.

    With `occupancy` programs per multiprocessor that is ceil(programs * splits / resident) rounds
    of 1 / splits of the work each; at most two rounds, and at least 128 positions per warp. Powers
    of two and three times those keep the number of compiled kernels small.
    """
    resident = occupancy * device_facts(device).num_sms
    most = min(most, 2 * resident // max(programs, 1), max_seqlen_k // (_MIN_SPLIT * num_warps))
    choices = [n for n in _SPLITS if n <= most] or [1]
    return min(choices, key=lambda n: (-(-programs * n // resident) / n, n))


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Weight rows and tokens per tile, spans of K, warps and pipeline stages of a GEMM.

    `use_ptx` decodes eight-bit operands with inline assembly, which halves the instructions of the
    loop; the interpreter has no assembly. `early` lets the kernel be launched before the one ahead
    of it has drained, and the one behind it once its own loop is done (compute capability 9.0 and
    later). `unroll` steps of 128 input features share a trip of the loop where it divides their
    count; each stage then holds as many. With `turned` each tile of rows begins its span of K one
    trip further on, so that not all of them ask for the same activations at once. With `cut` only
    the tiles beyond whole rounds of all multiprocessors are split, each into at most `splits`
    spans. A launch of one warp is one of `w4_few`: tiles of 16 rows by eight tokens, and stages
    that count the steps weights travel ahead.
    """

    block_n: int
    block_m: int
    splits: int
    num_warps: int
    num_stages: int
    use_ptx: bool = not INTERPRETED
    early: bool = False
    unroll: int = 1
    turned: bool = False
    cut: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options of Triton."""
        found: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.early:
            found["launch_pdl"] = True
        return found


def gemm_config(
    device: torch.device, *, M: int, N: int, K: int, bits: int, scheme: str = ""
) -> GemmConfig:
    """The launch configuration of a four-bit GEMM of M tokens by `[N, K]`.

    `scheme` names the product as the tuning script does. Where a table of this device and Triton
    version ships in `tuned/` and holds the scheme at a shape whose N and K are together within a
    factor of two, its launch for the least tuned count of tokens that is at least M is taken, or
    for the greatest. Otherwise K is split until the device is filled once: a token tile has at
    least 16 columns, below which the tensor cores are not used, and a split at least 512 input
    features. `bits` is the width of an activation; wider tiles than these spill.
    """
    if INTERPRETED:
        return GemmConfig(32, 16, 2 if K >= 1024 else 1, 4, 1)
    if device.type == "cuda" and (found := tuned_launch(tuned_name(device), scheme, M, N, K)):
        return found
    block_m = min(max(16, next_power_of_2(M)), 128)
    block_n = 128 if block_m <= (64 if bits == 8 else 32) else 64
    tiles = -(-N // block_n) * -(-M // block_m)
    splits = previous_power_of_2(min(device_facts(device).num_sms // tiles, K // 512))
    return GemmConfig(block_n, block_m, splits, 4, 4 if bits == 8 else 3)


@cache
def _table(name: str) -> dict[str, dict[tuple[int, int], dict[int, GemmConfig]]]:
    """Launches of a table by scheme, (N, K) and tokens; empty where no such table ships."""
    path = _TUNED / f"{name}.json"
    return read_launches(path) if path.is_file() else {}


def read_launches(path: Path) -> dict[str, dict[tuple[int, int], dict[int, GemmConfig]]]:
    """Launches of the file at `path` by scheme, (N, K) and tokens."""
    told = json.loads(path.read_text())
    found: dict[str, dict[tuple[int, int], dict[int, GemmConfig]]] = {}
    for scheme, shapes in told["gemm"].items():
        for shape, launches in shapes.items():
            n, k = map(int, shape.split("x"))
            found.setdefault(scheme, {})[n, k] = {
                int(tokens): GemmConfig(**dict(zip(told["fields"], values, strict=True)))
                for tokens, values in launches.items()
            }
    return found


@cache
def tuned_launch(name: str, scheme: str, M: int, N: int, K: int) -> GemmConfig | None:
    """The launch of the table `name` for the nearest shape and token count, None without one.

    Beyond the greatest token count tiles are many, and K is not split.
    """
    shapes = _shapes(name, scheme)
    distance = {
        (n, k): abs(math.log2(N / n)) + abs(math.log2(K / k)) for n, k in shapes
    }  # fmt: skip
    nearest = min(distance, key=distance.__getitem__, default=None)
    if nearest is None or distance[nearest] > 1:
        return None
    launches = shapes[nearest]
    enough = min((m for m in launches if m >= M), default=None)
    return replace(launches[max(launches)], splits=1) if enough is None else launches[enough]


def _shapes(name: str, scheme: str) -> dict[tuple[int, int], dict[int, GemmConfig]]:
    """Launches of `scheme` by shape and tokens; those of rows fill in for tiles not tuned."""
    table = _table(name)
    rows, own = table.get(scheme.removesuffix("-tiled"), {}), table.get(scheme, {})
    return {shape: rows.get(shape, {}) | own.get(shape, {}) for shape in rows | own}
