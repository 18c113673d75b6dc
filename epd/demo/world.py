"""The vocabulary of the demo world: shapes, colours, sizes, characters; scenes in plain Python.

Free of torch. Lengths are fractions of the image side; x runs right and y runs down from the top
left corner. A *property* is something an object can be asked for: a colour and a shape (0..47), a
shape alone (48..53) or a colour alone (54..61).
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "pink")
COLOR_RGB = (
    (215, 35, 35),
    (35, 160, 55),
    (35, 75, 220),
    (240, 215, 40),
    (245, 130, 15),
    (125, 45, 175),
    (40, 205, 215),
    (245, 130, 190),
)
# I and O are left out: at this size they cannot be told from 1 and 0.
CHARS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"

IMAGE_SIDE = 224
RADII = (0.055, 0.085, 0.12)
MAX_OBJECTS = 10
MAX_CAPTION_OBJECTS = 6
MIN_CHARS, MAX_CHARS = 2, 6
MAX_IMAGES = 3
GLYPH_WIDTH, GLYPH_HEIGHT = 19, 28
CHAR_WIDTH, CHAR_HEIGHT = GLYPH_WIDTH / IMAGE_SIDE, GLYPH_HEIGHT / IMAGE_SIDE

NUM_PAIRS = len(COLORS) * len(SHAPES)
NUM_PROPERTIES = NUM_PAIRS + len(SHAPES) + len(COLORS)


def plural(noun: str) -> str:
    """The plural of a shape or of the word `object`."""
    return noun + ("es" if noun.endswith("s") else "s")


def property_noun(index: int) -> str:
    """The noun phrase of a property, without article: `red star`, `star`, `red object`."""
    if index < NUM_PAIRS:
        return f"{COLORS[index // len(SHAPES)]} {SHAPES[index % len(SHAPES)]}"
    if index < NUM_PAIRS + len(SHAPES):
        return SHAPES[index - NUM_PAIRS]
    return f"{COLORS[index - NUM_PAIRS - len(SHAPES)]} object"


def with_article(noun: str) -> str:
    """The phrase with `a` or `an` in front."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One coloured shape; `x`, `y` is its centre and `radius` its size, in image sides."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        """The object in words, for example `an orange ring`."""
        return with_article(f"{self.color} {self.shape}")


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in one picture; `word` is empty when nothing is printed."""

    objects: tuple[SceneObject, ...]
    word: str
    word_x: float
    word_y: float

    @property
    def word_box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the printed word, in image sides."""
        half = len(self.word) * CHAR_WIDTH / 2
        return (
            self.word_x - half,
            self.word_y - CHAR_HEIGHT / 2,
            self.word_x + half,
            self.word_y + CHAR_HEIGHT / 2,
        )
