"""Every answer is derived a second time, from the scene in plain Python, by other means."""

from __future__ import annotations

from collections import Counter

import pytest

from epd.demo.examples import Example, held_out, held_out_example
from epd.demo.wording import ANSWERS, MULTI, SINGLE, TYPES, caption, prompts_of, spellings
from epd.demo.world import Scene, SceneObject, with_article

COUNT = 255  # fifteen of each type
WORDS = {"both": 2, "all three": 3}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return held_out(COUNT, seed=5)


def matching(scene: Scene, noun: str) -> list[SceneObject]:
    """The objects a noun phrase names: `red stars`, `a star`, `red objects`, `objects`."""
    words = [word for word in noun.split() if word not in ("a", "an")]
    found = list(scene.objects)
    for word in words:
        stem = {"crosses": "cross"}.get(word, word if word == "cross" else word.rstrip("s"))
        if stem != "object":
            found = [item for item in found if stem in (item.color, item.shape)]
    return found


def neighbours(scene: Scene, anchor: SceneObject, side: str, spread: float) -> list[SceneObject]:
    """The objects on that side of the anchor, within a cone of slope `spread`."""
    found = []
    for item in scene.objects:
        along = {
            "left of": anchor.x - item.x,
            "right of": item.x - anchor.x,
            "above": anchor.y - item.y,
            "below": item.y - anchor.y,
        }[side]
        across = abs(item.y - anchor.y if side in ("left of", "right of") else item.x - anchor.x)
        if item is not anchor and along > 0 and across < spread * along:
            found.append(item)
    return found


def derive(example: Example) -> str:
    """The answer, from the scenes and the words that fill the question's blanks."""
    fill, scenes = example.fill, example.scenes
    ordinal = fill.get("ordinal", "first")
    scene = scenes[-1] if ordinal == "last" else scenes[("first", "second", "third").index(ordinal)]
    kind = example.type
    if kind in ("color_of_shape", "color_in_image"):
        (item,) = matching(scene, fill["noun"])
        return item.color
    if kind == "shape_of_color":
        (item,) = matching(scene, fill["hue"])
        return item.shape
    if kind in ("count_shape", "count_color", "count_in_image"):
        return str(len(matching(scene, fill["many"])))
    if kind == "count_all":
        return str(len(scene.objects))
    if kind in ("exist", "exist_in_image"):
        return "yes" if matching(scene, fill["a"]) else "no"
    if kind in ("text", "text_in_image"):
        return scene.word or "none"
    if kind == "relation":
        (anchor,) = matching(scene, fill["noun"])
        (item,) = neighbours(scene, anchor, fill["side"], 1.2)
        return with_article(f"{item.color} {item.shape}")
    if kind == "quadrant":
        (item,) = matching(scene, fill["noun"])
        return f"{'top' if item.y < 0.5 else 'bottom'} {'left' if item.x < 0.5 else 'right'}"
    if kind == "size":
        sign = -1 if fill["extreme"] in ("largest", "biggest") else 1
        item = min(scene.objects, key=lambda item: sign * item.radius)
        return item.color if fill["attribute"] == "color" else item.shape
    if kind == "which_image":
        (number,) = [n for n, other in enumerate(scenes) if matching(other, fill["noun"])]
        return f"the {('first', 'second', 'third')[number]}"
    if kind == "all_images":
        assert WORDS[fill["all"]] == len(scenes)
        return "yes" if all(matching(other, fill["a"]) for other in scenes) else "no"
    assert kind == "caption"
    ordered = sorted(scene.objects, key=lambda item: item.x)
    words = [f"a {item.color} {item.shape}".replace("a orange", "an orange") for item in ordered]
    words += [f"the text {scene.word}"] if scene.word else []
    return (", ".join(words[:-1]) + " and " + words[-1] if words[1:] else words[0]) + "."


def test_every_answer_is_what_plain_python_derives(examples: list[Example]) -> None:
    for example in examples:
        assert example.answer == derive(example), example


def test_types_are_even_and_image_counts_fit(examples: list[Example]) -> None:
    assert Counter(example.type for example in examples) == dict.fromkeys(TYPES, COUNT // 17)
    for kinds, counts in ((SINGLE, {1}), (MULTI, {2, 3})):
        names = {kind.name for kind in kinds}
        seen = {len(example.images) for example in examples if example.type in names}
        assert seen == counts
    assert all(image.size == (224, 224) for example in examples for image in example.images)


def test_yes_and_no_are_balanced() -> None:
    answers = Counter(e.answer for e in held_out(60, 6, types=("exist", "all_images")))
    assert 18 <= answers["yes"] <= 42


def test_the_fill_is_in_the_question(examples: list[Example]) -> None:
    by_name = {kind.name: kind for kind in SINGLE + MULTI}
    for example in examples:
        rows = prompts_of(by_name[example.type])
        index = by_name[example.type].fills.index(example.fill)
        assert example.question in rows[index]


def test_a_longer_set_starts_with_the_shorter_one() -> None:
    short, long = held_out(3, 7), held_out(6, 7)
    for first, second in zip(short, long, strict=False):
        assert (first.question, first.answer) == (second.question, second.answer)
        assert first.images[0].tobytes() == second.images[0].tobytes()


def test_sets_of_different_seeds_share_nothing() -> None:
    one, two = held_out(17, 8), held_out(17, 9)
    assert {e.images[0].tobytes() for e in one}.isdisjoint(e.images[0].tobytes() for e in two)


def test_the_same_number_can_be_asked_for_any_type() -> None:
    for kind in TYPES:
        assert held_out_example(4, 10, kind=kind).type == kind


def test_spellings_keep_the_words_and_vary_the_writing() -> None:
    assert spellings("What color is the {noun}?") == (
        "What color is the {noun}?",
        "what color is the {noun}",
        "What colour is the {noun}?",
        "what colour is the {noun}",
    )


def test_no_two_types_share_a_prompt_with_different_answers() -> None:
    owner: dict[str, str] = {}
    for kind in SINGLE + MULTI:
        for row in prompts_of(kind):
            for prompt in row:
                assert owner.setdefault(prompt, kind.name) == kind.name, prompt
    assert len(owner) > 9000


def test_answers_are_unique_and_captions_read_well() -> None:
    assert len(set(ANSWERS)) == len(ANSWERS)
    star = SceneObject("star", "red", 0.2, 0.5, 0.1)
    ring = SceneObject("ring", "orange", 0.7, 0.5, 0.1)
    assert caption(Scene((star,), "", 0, 0)) == "a red star."
    assert caption(Scene((ring, star), "", 0, 0)) == "a red star and an orange ring."
    told = caption(Scene((ring, star), "K7", 0, 0))
    assert told == "a red star, an orange ring and the text K7."
