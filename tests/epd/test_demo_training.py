"""The packed training row must mean exactly what transformers sees in a prompt of its own."""

from __future__ import annotations

import pytest
import torch

from epd.demo.batches import Mix, draw_batch
from epd.demo.dropping import DPP_STRIDE, greedy_picks, keep_by_dpp
from epd.demo.glyphs import load_glyphs
from epd.demo.learner import Learner
from epd.demo.model import IMAGE, SIZES, build_llava, build_text_tower, build_tokenizer
from epd.demo.packing import IGNORED, TokenTables
from epd.demo.questions import caption_valid, draw_questions
from epd.demo.scenes import draw_scenes
from epd.demo.seeds import HELD_OUT_SEEDS, TRAINING_SEEDS, held_out_seed, training_seed
from epd.demo.wording import ANSWERS, caption

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def tables() -> TokenTables:
    return TokenTables(build_tokenizer(), "cpu")


@pytest.fixture(scope="module")
def learner(tables: TokenTables) -> Learner:
    torch.manual_seed(0)
    vocabulary = len(tables.tokenizer)
    llava, tower = build_llava(TINY, vocabulary), build_text_tower(TINY, vocabulary)
    return Learner(llava, tower, size=TINY, tables=tables).eval()


def test_a_slot_scores_its_answer_as_a_prompt_of_its_own(
    learner: Learner, tables: TokenTables
) -> None:
    batch = draw_batch(
        Mix(2, 1, 1, 3, 3),
        tables,
        glyphs=load_glyphs(),
        grid=TINY.grid,
        drop_share=0.0,
        generator=torch.Generator().manual_seed(5),
    )
    with torch.no_grad():
        features, _, _ = learner._see(batch.images)
        embeddings = learner.llava.model.multi_modal_projector(features)
        for pack in batch.packs:
            kept = torch.ones_like(batch.kept)
            pack_losses, _ = learner._answer(pack, embeddings, kept)
            layout = pack.layout
            for slot in range(layout.num_slots):
                span = slice(slot * layout.slot_length, (slot + 1) * layout.slot_length)
                tokens = pack.tokens[0, span]
                labels = pack.labels[0, span]
                ids = list(tables.start)
                for image in range(layout.num_images):
                    ids += [IMAGE] * layout.image_tokens
                    ids += tables.image_break if image + 1 < layout.num_images else []
                ids += tokens.tolist()
                first = pack.first_image
                pixels = batch.images[first : first + layout.num_images].float()
                out = learner.llava(
                    input_ids=torch.tensor([ids]),
                    pixel_values=(pixels - learner.mean) / learner.std,
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                )
                logits = out.logits[0, layout.prefix_length - 1 : -1]
                expected = torch.nn.functional.cross_entropy(
                    logits, labels, ignore_index=IGNORED, reduction="none"
                )
                torch.testing.assert_close(pack_losses[0, span], expected, atol=2e-5, rtol=1e-4)


def test_dropped_tokens_do_not_change_any_loss(learner: Learner, tables: TokenTables) -> None:
    batch = draw_batch(
        Mix(3, 1, 0, 2, 2),
        tables,
        glyphs=load_glyphs(),
        grid=TINY.grid,
        drop_share=0.0,
        generator=torch.Generator().manual_seed(6),
    )
    embeddings = torch.randn(5, TINY.image_tokens, TINY.decoder_width)
    kept = torch.rand(5, TINY.image_tokens) < 0.4
    disturbed = torch.where(kept[..., None], embeddings, torch.randn_like(embeddings))
    with torch.no_grad():
        for pack in batch.packs:
            before, _ = learner._answer(pack, embeddings, kept)
            after, _ = learner._answer(pack, disturbed, kept)
            everything, _ = learner._answer(pack, disturbed, torch.ones_like(kept))
            torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)
            assert (everything - after).abs().max() > 1e-4


def test_caption_tokens_spell_the_caption_in_plain_python(tables: TokenTables) -> None:
    scenes = draw_scenes(200, torch.Generator().manual_seed(1))
    tokens, lengths = tables.captions(scenes)
    for row, scene in enumerate(scenes.to_scenes()):
        told = tokens[row, : lengths[row]]
        assert int(told[-1]) == tables.eos
        assert tables.tokenizer.decode(told[:-1]) == " " + caption(scene)
    assert int(lengths[caption_valid(scenes, 6)].max()) <= tables.caption_length


def test_prompts_and_answers_survive_the_tokenizer(tables: TokenTables) -> None:
    for text in [*tables.prompts[::37], *ANSWERS]:
        assert tables.tokenizer.decode(tables.encode(text)) == text
    scenes = draw_scenes(64, torch.Generator().manual_seed(2))
    words, lengths = tables.words(scenes)
    for row, scene in enumerate(scenes.to_scenes()):
        assert tables.tokenizer.decode(words[row, : lengths[row] - 1]).strip() == scene.word


def test_every_drawn_question_fits_its_slot(tables: TokenTables) -> None:
    generator = torch.Generator().manual_seed(3)
    scenes = draw_scenes(120, generator)
    for num_images in (1, 2, 3):
        questions = draw_questions(scenes, num_images, 4, generator=generator)
        prompts = tables.draw_prompts(questions.type, questions.fill, generator)
        _, length = tables.answers(questions, scenes)
        assert int((tables.prompt_length[prompts] + length).max()) <= tables.slot_length


def test_row_lengths_are_aligned(tables: TokenTables) -> None:
    for num_images in (1, 2, 3):
        layout = tables.layout(num_images, 256, 8)
        assert layout.length % 16 == 0
        assert layout.mask().shape == (layout.length, layout.length)


def test_greedy_dpp_picks_what_brute_force_determinants_pick() -> None:
    features = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(7)).double()
    picks = greedy_picks(features, 4)
    for row in range(2):
        unit = torch.nn.functional.normalize(features[row], dim=-1)
        kernel = unit @ unit.t()
        chosen: list[int] = []
        for step in range(4):
            rest = [token for token in range(12) if token not in chosen]
            volumes = []
            for token in rest:
                trial = [*chosen, token]
                volumes.append(round(float(torch.det(kernel[trial][:, trial])), 9))
            chosen.append(rest[volumes.index(max(volumes))])
            assert int(picks[row, step]) == chosen[step]


def test_dpp_replaces_only_the_rows_with_a_count() -> None:
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(8, 30, 6, generator=generator)
    kept = torch.rand(8, 30, generator=generator) < 0.5
    after = keep_by_dpp(features, kept, torch.tensor([5, 0]))
    assert int(after[0].sum()) == 5
    assert torch.equal(after[1:], kept[1:])
    assert DPP_STRIDE == 4


def test_training_and_held_out_seeds_never_meet() -> None:
    assert set(TRAINING_SEEDS[:: 2**20]).isdisjoint(HELD_OUT_SEEDS[:: 2**20])
    assert TRAINING_SEEDS.stop <= HELD_OUT_SEEDS.start
    # the CPU generator ignores everything above 32 bits
    assert HELD_OUT_SEEDS.stop <= 2**32
    assert training_seed(10**6) in TRAINING_SEEDS
    assert held_out_seed(0, 0) in HELD_OUT_SEEDS
    assert held_out_seed(2047, 2**20 - 1) in HELD_OUT_SEEDS
    with pytest.raises(ValueError, match="has 1048576 examples"):
        held_out_seed(0, 2**20)
