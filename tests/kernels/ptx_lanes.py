"""Thirty-two lanes that execute the few instructions of inline assembly that kernels use."""

from __future__ import annotations

import ctypes
import re

import numpy as np

LANES = np.arange(32)
ROW, COLUMN = LANES // 4, LANES % 4


def execute(asm: str, constraints: str, values: list[np.ndarray]) -> list[np.ndarray]:
    """What the output operands hold, as raw words; `values` are raw words or addresses."""
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=") for kind in kinds)
    registers = {f"${outputs + i}": value for i, value in enumerate(values)}
    lines = re.split(r";|^\{\n|\n\}$", asm)
    for line in (part.strip() for part in lines):
        if line and not line.startswith(".reg"):
            opcode, rest = line.split(None, 1)
            _step(registers, opcode, _operands(rest))
    return [registers[f"${i}"] for i in range(outputs)]


def _operands(text: str) -> list[list[str]]:
    found = re.findall(r"\{([^}]*)\}|\[([^\]]*)\]|([^,{}\[\]\s][^,{}\[\]]*)", text)
    return [[n.strip() for n in (a or b or c).split(",")] for a, b, c in found]


def _step(registers: dict[str, np.ndarray], opcode: str, operands: list[list[str]]) -> None:
    def words(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint32)
        return np.full(32, int(name, 0) & 0xFFFFFFFF, np.uint32)

    def floats(name: str) -> np.ndarray:
        return words(name).view(np.float32)

    def halves(name: str) -> np.ndarray:
        return words(name).view(np.float16).reshape(32, 2)

    target, *sources = operands
    first = [s[0] for s in sources]
    result: list[np.ndarray]
    if opcode.startswith("ld.global"):
        count = len(target)
        result = list(_read(registers[first[0]], count).T)
    elif opcode.startswith("mma.sync.aligned.m16n8k16"):
        left, right, added = sources
        result = _product([halves(n) for n in left], [halves(n) for n in right],
                          [floats(n) for n in added])  # fmt: skip
    elif opcode.startswith("mma.sync.aligned.m16n8k32"):
        left, right, added = sources
        result = _integer_product(*([words(n) for n in names] for names in (left, right, added)))
    elif opcode.startswith("movmatrix"):
        square = np.zeros((8, 8), np.float16)
        square[ROW, 2 * COLUMN], square[ROW, 2 * COLUMN + 1] = halves(first[0]).T
        turned = np.stack((square.T[ROW, 2 * COLUMN], square.T[ROW, 2 * COLUMN + 1]), 1)
        result = [turned]
    elif opcode == "prmt.b32":
        both = np.stack((words(first[0]), words(first[1])), 1).view(np.uint8).reshape(32, 8)
        select = int(first[2], 16)
        picked = [both[:, select >> 4 * i & 7] for i in range(4)]
        result = [np.stack(picked, 1)]
    elif opcode.startswith("shfl.sync"):
        moved = LANES ^ int(first[1]) if ".bfly." in opcode else words(first[1]) % 32
        result = [words(first[0])[moved]]
    elif opcode == "cvt.rn.f16x2.f32":
        with np.errstate(over="ignore"):
            pair = np.stack((floats(first[1]), floats(first[0])), 1).astype(np.float16)
        result = [pair]
    elif opcode == "min.f16x2":
        result = [np.minimum(halves(first[0]), halves(first[1]))]
    elif opcode == "mov.b32" and len(target) == 2:
        result = [np.ascontiguousarray(halves(first[0])[:, i]) for i in (0, 1)]
        registers.update(zip(target, result, strict=True))
        return
    elif opcode == "cvt.f32.f16":
        result = [registers[first[0]].astype(np.float32)]
    else:
        simple = {
            "and.b32": lambda: words(first[0]) & words(first[1]),
            "shr.u32": lambda: words(first[0]) >> words(first[1]),
            "shl.b32": lambda: words(first[0]) << words(first[1]),
            "add.f32": lambda: floats(first[0]) + floats(first[1]),
            "max.f32": lambda: np.maximum(floats(first[0]), floats(first[1])),
            "mov.f32": lambda: words(first[0]),
            "mov.b32": lambda: words(first[0]),
        }
        result = [simple[opcode]()]
    for name, value in zip(target, result, strict=True):
        registers[name] = np.ascontiguousarray(value).view(np.uint32).reshape(32)


def _read(addresses: np.ndarray, count: int) -> np.ndarray:
    found = [np.frombuffer(ctypes.string_at(int(a), 4 * count), np.uint32) for a in addresses]
    return np.stack(found)


def _product(
    left: list[np.ndarray], right: list[np.ndarray], added: list[np.ndarray]
) -> list[np.ndarray]:
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for i in (0, 1):
        k = 2 * COLUMN + i
        a[ROW, k], a[ROW + 8, k] = left[0][:, i], left[1][:, i]
        a[ROW, k + 8], a[ROW + 8, k + 8] = left[2][:, i], left[3][:, i]
        b[k, ROW], b[k + 8, ROW] = right[0][:, i], right[1][:, i]
    c = a @ b
    places = [(ROW + 8 * (i // 2), 2 * COLUMN + i % 2) for i in range(4)]
    return [(c[at] + added[i]).astype(np.float32) for i, at in enumerate(places)]


def _integer_product(
    left: list[np.ndarray], right: list[np.ndarray], added: list[np.ndarray]
) -> list[np.ndarray]:
    """16 rows by 8 columns over 32 signed bytes; a register holds four of them."""
    a, b = np.zeros((16, 32), np.int32), np.zeros((32, 8), np.int32)
    for i in range(4):
        for half in (0, 1):
            k = 16 * half + 4 * COLUMN + i
            for r in (0, 1):
                a[ROW + 8 * r, k] = left[2 * half + r].view(np.int8).reshape(32, 4)[:, i]
            b[k, ROW] = right[half].view(np.int8).reshape(32, 4)[:, i]
    c = a @ b
    places = [(ROW + 8 * (i // 2), 2 * COLUMN + i % 2) for i in range(4)]
    return [c[at] + added[i].view(np.int32) for i, at in enumerate(places)]
