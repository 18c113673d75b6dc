"""Measures a checkpoint: exact answers per question type, dense and with vision tokens removed.

    python -m epd.demo.evaluate --checkpoint DIR --count 850 --keep-ratio 0.25 --out results.json

The dense answers come from transformers' own greedy `generate`, over PNG bytes and the checkpoint's
own processor. With a keep ratio, tokens are really taken out of the sequence, the others keep their
positions, and an explicit mask is passed: without one, transformers reads a jump in the positions
as the border of a packed sequence and blocks attention across it.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from epd.demo import CHECKPOINT, TEXT_TOWER
from epd.demo.dropping import greedy_picks
from epd.demo.examples import Example, held_out
from epd.demo.wording import TYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_NEW_TOKENS = 48
EVALUATION_SEED = 1

KeepIndices: TypeAlias = "Callable[[Tensor], Tensor]"
"""Vision embeddings `[N, D]` of one image to the sorted int64 indices of the tokens to keep."""


def prompt_of(example: Example) -> str:
    """What the chat template makes of the example: images first, then the question."""
    return "USER: " + "<image>\n" * len(example.images) + example.question + " ASSISTANT:"


def through_png(image: Image.Image) -> Image.Image:
    """The same picture, written to PNG bytes and read back."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def keep_by_greedy_dpp(ratio: float) -> KeepIndices:
    """A keep function: exact greedy DPP on cosine similarity, blind to the question."""

    def keep(vision_embeddings: Tensor) -> Tensor:
        count = max(1, round(ratio * vision_embeddings.shape[0]))
        return greedy_picks(vision_embeddings[None], count)[0].sort().values

    return keep


class Answerer:
    """A loaded checkpoint that answers examples in batches."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu") -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device = torch.device(device)
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        self.model.to(self.device).eval()

    def inputs(self, examples: Sequence[Example]) -> Any:
        """The processor's tensors for a batch, from PNG bytes."""
        images = [[through_png(image) for image in example.images] for example in examples]
        prompts = [prompt_of(example) for example in examples]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs.to(self.device)

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example]) -> list[str]:
        """Greedy answers through transformers' `generate`, nothing removed."""
        inputs = self.inputs(examples)
        out = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def answer_pruned(self, examples: Sequence[Example], keep: KeepIndices) -> list[str]:
        """Greedy answers from the kept vision tokens alone, positions of the full sequence."""
        rows = self._pruned_rows(examples, keep)
        width = max(len(positions) for _, positions in rows)
        embeds = rows[0][0].new_zeros(len(rows), width, rows[0][0].shape[-1])
        positions = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        used = torch.zeros_like(positions, dtype=torch.bool)
        for row, (embedding, position) in enumerate(rows):
            embeds[row, -len(position) :] = embedding
            positions[row, -len(position) :] = position
            used[row, -len(position) :] = True
        return self._decode(embeds, positions, used)

    def _pruned_rows(
        self, examples: Sequence[Example], keep: KeepIndices
    ) -> list[tuple[Tensor, Tensor]]:
        """Embeddings and positions of each prompt after pruning."""
        inputs = self.inputs(examples)
        model = self.model.model
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeddings = iter(features)
        embed, rows = model.language_model.embed_tokens, []
        image_id = self.model.config.image_token_id
        for example, ids, used in zip(
            examples, inputs["input_ids"], inputs["attention_mask"], strict=True
        ):
            ids = ids[used.bool()]
            row = embed(ids)
            image_at = (ids == image_id).nonzero()[:, 0]
            stay = torch.ones(len(ids), dtype=torch.bool, device=self.device)
            for at in image_at.chunk(len(example.images)):
                embedding = next(embeddings)
                row[at] = embedding.to(row.dtype)
                stay[at] = False
                stay[at[keep(embedding.float()).to(self.device)]] = True
            rows.append((row[stay], stay.nonzero()[:, 0]))
        return rows

    def _decode(self, embeds: Tensor, positions: Tensor, used: Tensor) -> list[str]:
        """Greedy answers to rows padded on the left, with explicit positions and masks."""
        count, width = positions.shape
        model, end = self.model.model.language_model, self.model.generation_config.eos_token_id
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        # padding attends to itself, so that no softmax is empty
        mask = (causal & used[:, None]) | torch.eye(width, dtype=torch.bool, device=self.device)
        position, cache, tokens = positions[:, -1:], None, []
        done = torch.zeros(count, dtype=torch.bool, device=self.device)
        for _ in range(MAX_NEW_TOKENS):
            out = model(
                inputs_embeds=embeds,
                attention_mask=mask[:, None],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            token = self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            token = torch.where(done, end, token)
            done |= token == end
            tokens.append(token)
            if bool(done.all()):
                break
            cache, embeds = out.past_key_values, model.embed_tokens(token)[:, None]
            position = positions = position + 1
            used = torch.cat([used, torch.ones_like(used[:, :1])], 1)
            mask = used[:, None]
        texts = self.processor.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True)
        return [text.strip() for text in texts]


def batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Batches of examples with equally many images, which need the same memory."""
    for num_images in sorted({len(example.images) for example in examples}):
        group = [example for example in examples if len(example.images) == num_images]
        for first in range(0, len(group), size):
            yield group[first : first + size]


def score(
    examples: Sequence[Example],
    answer: Callable[[list[Example]], list[str]],
    *,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Exact matches per type and overall, with up to 20 of the wrong answers."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    wrong = []
    for batch in batches(examples, batch_size):
        for example, got in zip(batch, answer(batch), strict=True):
            asked[example.type] += 1
            right[example.type] += got == example.answer
            if got != example.answer:
                wrong.append([example.type, example.question, example.answer, got])
    types = {
        name: {"asked": asked[name], "exact": round(right[name] / asked[name], 4)}
        for name in TYPES
        if asked[name]
    }
    total = sum(asked.values())
    exact = round(sum(right.values()) / total, 4)
    return {"asked": total, "exact": exact, "types": types, "wrong": wrong[:20]}


@torch.inference_mode()
def peak_inside(examples: Sequence[Example], checkpoint: Path, tower: Path) -> float:
    """How often the most relevant patch for `COLOR SHAPE` lies in such an object, in [0, 1]."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    answerer = Answerer(checkpoint)
    text = CLIPTextModelWithProjection.from_pretrained(tower, dtype=torch.float32).eval()
    projection = load_file(tower / "alignment.safetensors")["visual_projection.weight"].float()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    vision = answerer.model.model.vision_tower
    hits: list[bool] = []
    for example in examples:
        scene = example.scenes[0]
        named = scene.objects[0]
        ids = tokenizer(f"{named.color} {named.shape}", add_special_tokens=False)["input_ids"]
        query = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
        pixels = answerer.inputs([example])["pixel_values"][:1]
        state = vision(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        patches = vision.post_layernorm(state) @ projection.t()
        relevance = torch.cosine_similarity(patches, text(input_ids=query).text_embeds, dim=-1)
        grid = round(len(relevance) ** 0.5)
        best = int(relevance.argmax())
        x, y = (best % grid + 0.5) / grid, (best // grid + 0.5) / grid
        alike = [o for o in scene.objects if (o.color, o.shape) == (named.color, named.shape)]
        reach = 0.5 / grid
        gaps = [max(abs(x - o.x), abs(y - o.y)) - o.radius for o in alike]
        hits.append(min(gaps) < reach)
    return sum(hits) / len(hits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a demo checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=510)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--keep-ratio", type=float, nargs="*", default=[0.25])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    examples = held_out(given.count, given.seed)
    answerer = Answerer(given.checkpoint, device=device)
    results: dict[str, Any] = {
        "seed": given.seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    results["dense"] = score(examples, answerer.answer, batch_size=given.batch_size)
    for ratio in given.keep_ratio:
        pruned = partial(answerer.answer_pruned, keep=keep_by_greedy_dpp(ratio))
        results[f"greedy_dpp_{ratio}"] = score(examples, pruned, batch_size=given.batch_size)
    tower = given.checkpoint / TEXT_TOWER.name
    singles = [example for example in examples if len(example.images) == 1]
    seen = [example for example in singles if example.scenes[0].objects][:100]
    results["peak_inside"] = round(peak_inside(seen, given.checkpoint, tower), 4)
    results["seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(results, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
