"""The assembly of decoding by single warps: what 32 lanes hold and do to it, a tile at a time.

A lane has a row g = lane // 4 and a column t = lane % 4, as in the matrix instruction m16n8k16.
There the left operand is codes: 16 keys by 16 channels for scores, 16 channels by 16 positions for
outputs; the right one has eight columns, the queries. Which channel or position meets which index
of the sum is free as long as both operands agree, so a lane reads consecutive bytes and no code
changes its lane. `words` is D / 32: a key takes four lanes of that many words.
"""

from __future__ import annotations

__all__ = ["add_rows", "load_words", "max_rows", "outputs", "scores", "weights"]

_LOW, _HIGH = "0x000F000F", "0x00F000F0"
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def _braced(names: list[str]) -> str:
    return "{" + ", ".join(names) + "}"


def _product(total: list[str], left: list[str], right: list[str], added: list[str]) -> str:
    return f"{_MMA} {_braced(total)}, {_braced(left)}, {_braced(right)}, {_braced(added)};"


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def load_words(words: int) -> tuple[str, str]:
    """Assembly and constraints: consecutive words at an address, which L1 need not keep."""
    out = [f"${i}" for i in range(words)]
    kind = "b32" if words == 1 else f"v{words}.b32"
    names = out[0] if words == 1 else _braced(out)
    text = f"ld.global.L1::no_allocate.{kind} {names}, [${words}];"
    return text, ",".join(["=r"] * words + ["l"])


def scores(words: int) -> tuple[str, str]:
    """Four sums of 16 keys and eight queries: rows g and g + 8, columns 2 t and 2 t + 1.

    In: the words of key g and of key g + 8; per word the queries of its low and high nibbles, two
    registers each: bytes 0 and 2, then 1 and 3.
    """
    first, second = ([f"${4 + r * words + w}" for w in range(words)] for r in (0, 1))
    queries = [f"${4 + 2 * words + i}" for i in range(4 * words)]
    low, high = ([f"{name}{i}" for i in range(4)] for name in "st")
    parts = [f"p{i}" for i in range(4)]
    lines = [".reg .b32 y0, y1, " + ", ".join(parts) + ";",
             ".reg .f32 " + ", ".join(low + high) + ";"]  # fmt: skip
    lines += [f"mov.f32 {name}, 0f00000000;" for name in low + high]
    for w in range(words):
        lines += [f"shr.u32 y0, {first[w]}, 8;", f"shr.u32 y1, {second[w]}, 8;"]
        for mask, total, right in (
            (_LOW, low, queries[4 * w : 4 * w + 2]), (_HIGH, high, queries[4 * w + 2 : 4 * w + 4])
        ):  # fmt: skip
            sources = (first[w], second[w], "y0", "y1")
            lines += [f"and.b32 {p}, {s}, {mask};" for p, s in zip(parts, sources, strict=True)]
            lines.append(_product(total, parts, right, total))
    lines += [f"add.f32 ${i}, {low[i]}, {high[i]};" for i in range(4)]
    return _block(lines), ",".join(["=f"] * 4 + ["r"] * (6 * words))


def outputs(words: int) -> tuple[str, str]:
    """The sums of 8 `words` outputs after 16 positions: low nibbles' channels, then high ones'.

    Sum 4 m + i of a half is channel 2 (words g + m) + i // 2, query 2 t + i % 2. In: the words of
    positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, the two registers of weights, and the sums.
    """
    half = words // 2
    sums = 8 * words
    codes = [[f"${sums + p * half + w}" for w in range(half)] for p in range(4)]
    right = [f"${sums + 4 * half + i}" for i in (0, 1)]
    before = [f"${sums + 4 * half + 2 + i}" for i in range(sums)]
    after = [f"o{i}" for i in range(sums)]
    pairs, parts = ([f"{name}{i}" for i in range(4)] for name in "ep")
    lines = [".reg .b32 " + ", ".join(pairs + parts) + ";", ".reg .f32 " + ", ".join(after) + ";"]
    for m in range(words):
        for i, (p, byte) in enumerate(((0, 0), (0, 1), (2, 0), (2, 1))):
            word, at = divmod(2 * m + byte, 4)
            select = f"0x{at + 4}{at + 4}{at}{at}"
            lines.append(f"prmt.b32 {pairs[i]}, {codes[p][word]}, {codes[p + 1][word]}, {select};")
        for h, mask in enumerate((_LOW, _HIGH)):
            lines += [f"and.b32 {p}, {e}, {mask};" for p, e in zip(parts, pairs, strict=True)]
            mine = slice(4 * (h * words + m), 4 * (h * words + m) + 4)
            lines.append(_product(after[mine], parts, right, before[mine]))
    lines += [f"mov.f32 ${i}, {after[i]};" for i in range(sums)]
    return _block(lines), ",".join(["=f"] * sums + ["r"] * (4 * half + 2) + ["f"] * sums)


def weights() -> tuple[str, str]:
    """Eight keys' weights of queries 2 t and 2 t + 1 turned around, and as fp16 rounds them.

    The register then holds keys 2 t and 2 t + 1 of query g, as the right operand wants them.
    """
    lines = [".reg .b32 r, top;", ".reg .b16 first, second;", "mov.b32 top, 0x7BFF7BFF;",
             "cvt.rn.f16x2.f32 r, $4, $3;", "min.f16x2 r, r, top;",
             "mov.b32 {first, second}, r;", "cvt.f32.f16 $1, first;", "cvt.f32.f16 $2, second;",
             "movmatrix.sync.aligned.m8n8.trans.b16 $0, r;"]  # fmt: skip
    return _block(lines), "=r,=f,=f,f,f"


def _over_rows(step: str) -> tuple[str, str]:
    lines = [".reg .f32 a, b, x, y;", "mov.f32 a, $2;", "mov.f32 b, $3;"]
    for distance in (4, 8, 16):
        for name, other in (("a", "x"), ("b", "y")):
            lines.append(f"shfl.sync.bfly.b32 {other}, {name}, {distance}, 31, -1;")
            lines.append(f"{step} {name}, {name}, {other};")
    lines += ["mov.f32 $0, a;", "mov.f32 $1, b;"]
    return _block(lines), "=f,=f,f,f"


def max_rows() -> tuple[str, str]:
    """The largest over the rows g of two numbers."""
    return _over_rows("max.f32")


def add_rows() -> tuple[str, str]:
    """The sums over the rows g of two numbers."""
    return _over_rows("add.f32")
