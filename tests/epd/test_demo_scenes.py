"""The renderer draws what the scene says, where it says it."""

from __future__ import annotations

import numpy as np
import torch

from epd.demo.glyphs import load_glyphs
from epd.demo.render import render
from epd.demo.scenes import EDGE, OBJECT_GAP, choose, draw_scenes, label_patches
from epd.demo.world import (
    CHARS,
    COLOR_RGB,
    COLORS,
    IMAGE_SIDE,
    MAX_CHARS,
    MAX_OBJECTS,
    NUM_PROPERTIES,
    SHAPES,
    property_noun,
)

GRID = 16


def test_the_centre_of_every_solid_object_has_its_colour() -> None:
    generator = torch.Generator().manual_seed(11)
    scenes = draw_scenes(24, generator)
    pictures = render(scenes, load_glyphs(), generator).permute(0, 2, 3, 1).numpy()
    checked = 0
    for picture, scene in zip(pictures, scenes.to_scenes(), strict=True):
        for item in scene.objects:
            pixel = picture[int(item.y * IMAGE_SIDE), int(item.x * IMAGE_SIDE)].astype(int)
            named = np.array(COLOR_RGB[COLORS.index(item.color)])
            near = np.abs(pixel - named).max() <= 32
            assert near == (item.shape != "ring"), (item, pixel, named)
            checked += 1
    assert checked > 60


def test_a_ring_has_its_colour_on_the_band_and_the_ground_in_its_hole() -> None:
    generator = torch.Generator().manual_seed(12)
    scenes = draw_scenes(40, generator)
    pictures = render(scenes, load_glyphs(), generator).permute(0, 2, 3, 1).numpy()
    rings = 0
    for picture, scene in zip(pictures, scenes.to_scenes(), strict=True):
        for item in scene.objects:
            if item.shape != "ring":
                continue
            rings += 1
            x, y = (item.x + 0.72 * item.radius) * IMAGE_SIDE, item.y * IMAGE_SIDE
            pixel = picture[int(y), int(x)].astype(int)
            assert np.abs(pixel - COLOR_RGB[COLORS.index(item.color)]).max() <= 40
    assert rings > 10


def test_ink_lies_inside_the_word_box_and_nowhere_else() -> None:
    scenes = draw_scenes(40, torch.Generator().manual_seed(13))
    printed = render(scenes, load_glyphs(), torch.Generator().manual_seed(1)).int()
    blank = render(scenes, torch.zeros_like(load_glyphs()), torch.Generator().manual_seed(1)).int()
    changed = (printed - blank).abs().amax(1) > 3
    for row, scene in enumerate(scenes.to_scenes()):
        if not scene.word:
            assert not changed[row].any()
            continue
        ys, xs = changed[row].nonzero().unbind(1)
        left, top, right, bottom = (edge * IMAGE_SIDE for edge in scene.word_box)
        assert left - 1 <= xs.min() and xs.max() <= right + 1
        assert top - 1 <= ys.min() and ys.max() <= bottom + 1
        # the ink reaches from the first character's cell into the last one's
        cell = (right - left) / len(scene.word)
        assert xs.min() < left + cell and xs.max() > right - cell


def test_objects_and_words_keep_their_distance() -> None:
    for scene in draw_scenes(200, torch.Generator().manual_seed(14)).to_scenes():
        left, top, right, bottom = scene.word_box
        for number, item in enumerate(scene.objects):
            assert item.radius + EDGE * 0.99 <= min(item.x, item.y, 1 - item.x, 1 - item.y)
            for other in scene.objects[:number]:
                apart = ((item.x - other.x) ** 2 + (item.y - other.y) ** 2) ** 0.5
                assert apart > item.radius + other.radius + OBJECT_GAP * 0.99
            if scene.word:
                dx = max(left - item.x, 0, item.x - right)
                dy = max(top - item.y, 0, item.y - bottom)
                assert (dx * dx + dy * dy) ** 0.5 > item.radius


def test_the_world_is_as_hard_as_it_says() -> None:
    scenes = draw_scenes(2000, torch.Generator().manual_seed(15)).to_scenes()
    assert {len(scene.objects) for scene in scenes} == set(range(1, MAX_OBJECTS + 1))
    lengths = [len(scene.word) for scene in scenes]
    assert set(lengths) == {0, 2, 3, 4, 5, MAX_CHARS}
    assert 0.55 < sum(length > 0 for length in lengths) / len(lengths) < 0.65
    assert set("".join(scene.word for scene in scenes)) == set(CHARS)


def test_drawing_and_rendering_repeat_for_a_seed_and_differ_between_seeds() -> None:
    def picture(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return render(draw_scenes(3, generator), load_glyphs(), generator)

    assert torch.equal(picture(1), picture(1))
    assert not torch.equal(picture(1), picture(2))


def test_patch_labels_agree_with_plain_geometry() -> None:
    batch = draw_scenes(30, torch.Generator().manual_seed(16))
    labels = label_patches(batch, GRID)
    for row, scene in enumerate(batch.to_scenes()):
        slots = batch.present[row].nonzero()[:, 0].tolist()
        left, top, right, bottom = scene.word_box
        for patch in range(GRID * GRID):
            x, y = (patch % GRID + 0.5) / GRID, (patch // GRID + 0.5) / GRID
            gaps = {
                slot: ((x - item.x) ** 2 + (y - item.y) ** 2) ** 0.5 - item.radius
                for slot, item in zip(slots, scene.objects, strict=True)
            }
            nearest = min(gaps, key=gaps.__getitem__)
            if abs(gaps[nearest] - 0.2 / GRID) > 1e-4:
                expected = nearest if gaps[nearest] < 0.2 / GRID else MAX_OBJECTS
                assert int(labels.obj[row, patch]) == expected
            char = int(labels.char[row, patch])
            inside = bool(scene.word) and left < x < right and top < y < bottom
            assert (char < len(CHARS)) == inside
            if inside:
                column = int((x - left) / (right - left) * len(scene.word))
                assert CHARS[char] == scene.word[column]


def test_property_members_agree_with_the_nouns() -> None:
    batch = draw_scenes(50, torch.Generator().manual_seed(17))
    counts = batch.property_members().sum(-1)
    for row, scene in enumerate(batch.to_scenes()):
        for index in range(NUM_PROPERTIES):
            words = property_noun(index).split()
            matches = [
                item
                for item in scene.objects
                if all(word in (item.color, item.shape) or word == "object" for word in words)
            ]
            assert int(counts[row, index]) == len(matches)
    assert len(SHAPES) * len(COLORS) + len(SHAPES) + len(COLORS) == NUM_PROPERTIES


def test_choose_follows_the_weights_and_avoids_zeros() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0]).expand(20000, 4)
    picks = choose(weights, torch.Generator().manual_seed(18)).bincount(minlength=4)
    assert picks[0] == picks[3] == 0
    # 15,000 expected, standard deviation 61
    assert abs(int(picks[2]) - 15000) < 300


def test_glyphs_are_distinct_and_fill_their_cells() -> None:
    glyphs = load_glyphs()
    assert glyphs.shape == (12, len(CHARS), 28, 19)
    assert float(glyphs.flatten(2).amax(-1).min()) > 0.5
    for font in glyphs.flatten(2):
        distance = torch.cdist(font, font) + 100 * torch.eye(len(CHARS))
        assert float(distance.min()) > 1.0
