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
    of the compiler let it run into the next trip of the loop, where they are decoded anew. A wait
    for "at most n" groups of products leaves the n latest under way.
    """
    body, found = loop_body(sass), []
    groups: list[set[int]] = [set()]  # registers read by each group, the last one still open
    for text in body + body:
        name, _, operands = text.partition(" ")
        if "GMMA" in name and not name.startswith("WARP"):
            if product := re.match(r"R\d+, R(\d+), gdesc", operands):
                first = int(product[1])
                groups[-1] |= set(range(first, first + 4))
            if "gsb0" in operands:
                groups.append(set())
        elif name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands.rpartition(" ")[2], 0)
            groups = groups[len(groups) - 1 - left :] if left < len(groups) - 1 else groups
        elif not name.startswith(_NO_REGISTER) or name.startswith("LDG.E"):
            target = re.match(r"(?:P\d+, )?R(\d+)\b", operands)
            written = range(int(target[1]), int(target[1]) + _width(name)) if target else ()
            if any(group & set(written) for group in groups):
                found.append(text)
    return found


def _width(name: str) -> int:
    """Registers an instruction writes."""
    if name.startswith("LDSM"):
        return int(name[-1]) if name[-1].isdigit() else 1
    if ".128" in name:
        return 4
    return 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1
