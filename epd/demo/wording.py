"""How the demo asks and answers: every prompt and every fixed answer as text. Free of torch.

A question *type* has templates and a list of *fills* (the words that go into the blanks). The index
of a fill is what `questions` computes from a scene, so the order of the lists here is binding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from epd.demo.world import (
    COLORS,
    MAX_OBJECTS,
    NUM_PAIRS,
    NUM_PROPERTIES,
    SHAPES,
    Scene,
    plural,
    property_noun,
    with_article,
)

DIRECTIONS = ("left of", "right of", "above", "below")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
EXTREMES = ("largest", "biggest", "smallest", "tiniest")
ORDINALS = ("first", "second", "third", "last")
COUNTED = tuple(plural(shape) for shape in SHAPES) + tuple(f"{c} objects" for c in COLORS)
PROPERTIES = tuple(property_noun(index) for index in range(NUM_PROPERTIES))
PAIRS = PROPERTIES[:NUM_PAIRS]

Fill = dict[str, str]


@dataclass(frozen=True, slots=True)
class QuestionType:
    """Templates, the fills of their blanks, and how often training draws the type."""

    name: str
    templates: tuple[str, ...]
    fills: tuple[Fill, ...]
    weight: float


def spellings(template: str) -> tuple[str, ...]:
    """The template as written, in lower case without its last mark, and with British `colour`."""
    bare = template[0].lower() + template[1:].rstrip("?.")
    plain = dict.fromkeys((template, bare))
    return tuple(dict.fromkeys([*plain, *(text.replace("color", "colour") for text in plain)]))


def _an(nouns: tuple[str, ...]) -> tuple[Fill, ...]:
    return tuple({"noun": noun, "a": with_article(noun)} for noun in nouns)


SINGLE = (
    QuestionType(
        "color_of_shape",
        (
            "What color is the {noun}?",
            "What is the color of the {noun}?",
            "Which color does the {noun} have?",
            "The {noun} is what color?",
            "Tell me the color of the {noun}.",
            "What color does the {noun} have?",
            "Name the color of the {noun}.",
            "In what color is the {noun} painted?",
        ),
        tuple({"noun": shape} for shape in SHAPES),
        1.0,
    ),
    QuestionType(
        "shape_of_color",
        (
            "What shape is the {hue} object?",
            "Which shape is {hue}?",
            "What is the shape of the {hue} object?",
            "What {hue} shape is there?",
            "Which {hue} shape do you see?",
            "What kind of shape is {hue}?",
            "Name the shape of the {hue} thing.",
            "The {hue} object has what shape?",
        ),
        tuple({"hue": hue} for hue in COLORS),
        1.0,
    ),
    QuestionType(
        "count_shape",
        (
            "How many {many} are there?",
            "How many {many} are in the image?",
            "Count the {many}.",
            "What is the number of {many}?",
            "How many {many} do you see?",
            "How many {many} does the picture show?",
            "Tell me how many {many} there are.",
        ),
        tuple({"many": many} for many in COUNTED[: len(SHAPES)]),
        1.4,
    ),
    QuestionType(
        "count_color",
        (
            "How many {many} are there?",
            "How many {many} are in the image?",
            "Count the {many}.",
            "What is the number of {many}?",
            "How many {many} do you see?",
            "How many {many} does the picture show?",
            "Tell me how many {many} there are.",
        ),
        tuple({"many": many} for many in COUNTED[len(SHAPES) :]),
        1.3,
    ),
    QuestionType(
        "count_all",
        (
            "How many objects are there?",
            "How many shapes are in the image?",
            "Count the objects.",
            "What is the total number of objects?",
            "How many shapes do you see?",
            "How many objects does the picture show?",
            "Count all shapes.",
            "Tell me how many objects there are.",
        ),
        ({},),
        0.9,
    ),
    QuestionType(
        "exist",
        (
            "Is there {a}?",
            "Is there {a} in the image?",
            "Do you see {a}?",
            "Does the image contain {a}?",
            "Can you see {a}?",
            "Does this picture show {a}?",
            "Can you find {a}?",
            "Is {a} in the picture?",
        ),
        _an(PROPERTIES),
        1.2,
    ),
    QuestionType(
        "relation",
        (
            "What is {side} the {noun}?",
            "Which object is {side} the {noun}?",
            "What do you see {side} the {noun}?",
            "What is there {side} the {noun}?",
            "Which shape is {side} the {noun}?",
            "Name the object {side} the {noun}.",
        ),
        tuple({"side": side, "noun": noun} for side, noun in product(DIRECTIONS, PAIRS)),
        2.2,
    ),
    QuestionType(
        "text",
        (
            "What text is written?",
            "Read the text.",
            "What does the text say?",
            "What word is printed in the image?",
            "Which characters are written?",
            "What does it say?",
            "Please read the word.",
            "Spell the printed text.",
            "What is written in the picture?",
        ),
        ({},),
        2.4,
    ),
    QuestionType(
        "quadrant",
        (
            "Where is the {noun}?",
            "In which quadrant is the {noun}?",
            "Which corner is the {noun} closest to?",
            "In which part of the image is the {noun}?",
            "Where can I find the {noun}?",
            "Where do you see the {noun}?",
        ),
        tuple({"noun": noun} for noun in PAIRS),
        0.8,
    ),
    QuestionType(
        "size",
        (
            "What {attribute} is the {extreme} object?",
            "What is the {attribute} of the {extreme} object?",
            "Which {attribute} is the {extreme} object?",
            "Tell me the {attribute} of the {extreme} object.",
            "What {attribute} does the {extreme} object have?",
            "The {extreme} object has which {attribute}?",
        ),
        tuple(
            {"extreme": extreme, "attribute": attribute}
            for extreme, attribute in product(EXTREMES, ("color", "shape"))
        ),
        0.9,
    ),
    QuestionType(
        "caption",
        (
            "Describe the image.",
            "What is in this image?",
            "Describe this picture.",
            "What do you see?",
            "List the objects.",
            "What does the picture show?",
            "Tell me what is in the picture.",
        ),
        ({},),
        0.0,  # captions have a place of their own in every training row
    ),
)

MULTI = (
    QuestionType(
        "which_image",
        (
            "Which picture has {a}?",
            "Which image has {a}?",
            "In which image is {a}?",
            "Which picture shows {a}?",
            "Which one contains {a}?",
            "Where is the {noun}, in which picture?",
            "Which image contains the {noun}?",
        ),
        _an(PROPERTIES),
        1.4,
    ),
    QuestionType(
        "text_in_image",
        (
            "What does the {ordinal} one say?",
            "What does the {ordinal} image say?",
            "Read the text in the {ordinal} picture.",
            "What text is in the {ordinal} image?",
            "What is written in the {ordinal} picture?",
            "Which word is printed in the {ordinal} image?",
        ),
        tuple({"ordinal": ordinal} for ordinal in ORDINALS),
        2.2,
    ),
    QuestionType(
        "count_in_image",
        (
            "How many {many} are in the {ordinal} image?",
            "How many {many} in the {ordinal} picture?",
            "Count the {many} in the {ordinal} image.",
            "How many {many} does the {ordinal} one have?",
            "How many {many} does the {ordinal} picture show?",
        ),
        tuple(
            {"ordinal": ordinal, "many": many}
            for ordinal, many in product(ORDINALS, (*COUNTED, "objects"))
        ),
        1.8,
    ),
    QuestionType(
        "color_in_image",
        (
            "What color is the {noun} in the {ordinal} image?",
            "What is the color of the {noun} in the {ordinal} picture?",
            "Which color does the {noun} in the {ordinal} one have?",
            "In the {ordinal} image, what color is the {noun}?",
        ),
        tuple({"ordinal": ordinal, "noun": shape} for ordinal, shape in product(ORDINALS, SHAPES)),
        1.2,
    ),
    QuestionType(
        "exist_in_image",
        (
            "Is there {a} in the {ordinal} image?",
            "Does the {ordinal} picture have {a}?",
            "Does the {ordinal} one show {a}?",
            "Do you see {a} in the {ordinal} image?",
        ),
        tuple(
            {"ordinal": ordinal, "a": with_article(noun)}
            for ordinal, noun in product(ORDINALS, PROPERTIES)
        ),
        1.2,
    ),
    QuestionType(
        "all_images",
        (
            "Do {all} images have {a}?",
            "Do {all} pictures show {a}?",
            "Is there {a} in {all} images?",
            "Do {all} pictures contain {a}?",
        ),
        tuple(
            {"all": group, "a": with_article(noun)}
            for group, noun in product(("both", "all three"), PROPERTIES)
        ),
        1.5,
    ),
)

TYPES = tuple(kind.name for kind in SINGLE + MULTI)

NUMBERS = tuple(str(number) for number in range(MAX_OBJECTS + 1))
IMAGE_ANSWERS = ("the first", "the second", "the third")
ANSWERS = (
    *COLORS,
    *SHAPES,
    *NUMBERS,
    "yes",
    "no",
    *QUADRANTS,
    *(with_article(pair) for pair in PAIRS),
    *IMAGE_ANSWERS,
    "none",
)


def prompts_of(kind: QuestionType) -> list[list[str]]:
    """All wordings of every fill, `[fill][wording]`; each fill has the same number of them."""
    wordings = [spelling for template in kind.templates for spelling in spellings(template)]
    return [[wording.format(**fill) for wording in wordings] for fill in kind.fills]


def caption(scene: Scene) -> str:
    """The scene in one sentence, objects from left to right, the printed word last."""
    items = [item.phrase for item in sorted(scene.objects, key=lambda item: item.x)]
    if scene.word:
        items.append(f"the text {scene.word}")
    if len(items) == 1:
        return items[0] + "."
    return ", ".join(items[:-1]) + f" and {items[-1]}."
