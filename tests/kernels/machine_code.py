"""Reading machine code: the body of the longest loop, and registers written while in use."""

from __future__ import annotations

import re

__all__ = ["loop_body", "overwritten_operands"]

_NO_REGISTER = ("ST", "RED", "BAR", "LDG", "ISETP", "FSETP", "U", "BRA", "WARP", "DEPBAR", "@")


def loop_body(sass: str) -> list[str]:
    """The instructions between the longest backward jump and its label, without their guards."""
    labels: dict[str, int] = {}
    flat: list[str] = []
    longest: list[str] = []
    for line in sass.splitlines():
        text = line.split("\t")[-1].strip()
        if label := re.match(r"(\.?L\w+):", text):
            labels[label[1]] = len(flat)
        elif text.endswith(";"):
            flat.append(re.sub(r"^@!?U?P\w+ ", "", text[:-1]))
            jump = re.search(r"\bBRA\b.*?(\.?L\w+)", text)
            if jump and len(flat) - labels.get(jump[1], len(flat)) > len(longest):
                longest = flat[labels[jump[1]] :]
    return longest


def overwritten_operands(sass: str) -> list[str]:
    """Instructions of the loop that write a register which a product in flight still reads.

    A product whose left operand lies in registers reads them until it is waited for; some versions
    of the compiler let it run into the next trip of the loop, where they are decoded anew.
    """
    body, flying, found = loop_body(sass), set[int](), []
    for text in body + body:
        name, _, operands = text.partition(" ")
        if "GMMA" in name and not name.startswith("WARP"):
            if product := re.match(r"R\d+, R(\d+), gdesc", operands):
                first = int(product[1])
                flying |= set(range(first, first + 4))
        elif name.startswith("WARPGROUP.DEPBAR"):
            flying.clear()
        elif not name.startswith(_NO_REGISTER) or name.startswith("LDG.E"):
            target = re.match(r"(?:P\d+, )?R(\d+)\b", operands)
            if target and flying & set(range(int(target[1]), int(target[1]) + _width(name))):
                found.append(text)
    return found


def _width(name: str) -> int:
    """Registers an instruction writes."""
    if name.startswith("LDSM"):
        return int(name[-1]) if name[-1].isdigit() else 1
    if ".128" in name:
        return 4
    return 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1
