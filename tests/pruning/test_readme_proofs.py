"""The table of proven properties in the README names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "pruning/README.md").read_text()
TABLE = README.partition("## What is proven where\n")[2].partition("\n## ")[0]
NAMED = re.findall(r"`([\w/]*::test_\w+)`", TABLE)


def test_every_property_has_its_row() -> None:
    numbers = re.findall(r"^\| (\d+) ", TABLE, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 20)]


def test_every_test_named_is_there() -> None:
    place = ""
    assert len(NAMED) > 30
    for name in NAMED:
        before, _, test = name.partition("::")
        place = before or place
        room, _, stem = place.rpartition("/")
        text = (ROOT / "tests" / room / f"test_{stem}.py").read_text()
        assert f"def {test}(" in text, name
