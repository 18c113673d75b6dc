"""`epd calibrate`: after which layers a decoder's attention to the image shifts, as a file.

AdaptInfer's offline analysis on scenes: the text-to-vision attention of every layer, the layer at
which the running total of each much-looked-at token bends, and pruning where many of them bend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epd.chat import ChatFormatter
from epd.demo import CHECKPOINT
from epd.errors import ConfigError
from epd.images import rgb_array
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.vision import VisionEncoder
from epd.sequence import expand_images
from epd_pruning.accounting import count_tokens
from epd_pruning.calibrate import calibrated_schedule, shift_histogram
from epd_pruning.errors import PruningError
from epd_pruning.schedule import Schedule
from epd_services.cli.terminal import show_table, table, usage_error
from epd_services.evaluation.answering import prompt_of
from epd_services.evaluation.attention_dump import text_to_vision
from epd_services.evaluation.questions import Question, load_bench
from epd_services.progress import Advance, progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Calibration", "calibrate", "find_schedule"]


PUBLISHED_SHARES = (133.0, 27.0, 3.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """`histogram` counts, per layer, the vision tokens whose attention shifts after it."""

    histogram: list[int]
    num_tokens: int
    schedule: Schedule


def calibrate(
    model: str | None,
    *,
    out: Path,
    samples: int,
    seed: int,
    average: float,
    shares: str,
    device: str | None,
) -> int:
    """Write the schedule file, print what it is made of; the exit code. Raises `EPDError`."""
    import torch

    torch.set_grad_enabled(False)
    found = find_schedule(
        model, samples=samples, seed=seed, average=average, shares=_shares(shares),
        device=device or "cpu",
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_as_ratios(found).to_json(), encoding="utf-8")
    _show(found)
    print(f"{out}: prune after layers {', '.join(map(str, found.schedule.layers))}")
    return 0


def find_schedule(
    model: str | None,
    *,
    samples: int,
    seed: int,
    average: float,
    shares: tuple[float, ...] = PUBLISHED_SHARES,
    device: str = "cpu",
) -> Calibration:
    """The schedule for `average`, a share of the tokens that a layer processes.

    It has a stage for each of `shares`, the proportions of what the stages keep.
    """
    card = ModelCard.load(model if model is not None else CHECKPOINT)
    decoder, encoder = Decoder.load(card, device), VisionEncoder.load(card, device)
    bench = load_bench("scenes", questions=samples, seed=seed)
    with progress("calibrate", samples) as advance:
        maps = _maps(card, decoder, encoder, bench.questions, advance)
        histogram = shift_histogram(maps).tolist()
    num_tokens = encoder.num_tokens(1, 1)
    try:
        schedule = calibrated_schedule(
            histogram, num_tokens=num_tokens, average=average * num_tokens, shares=shares
        )
    except PruningError as error:
        raise ConfigError(f"no schedule of {decoder.config.num_layers} layers: {error}") from None
    return Calibration(histogram, num_tokens, schedule)


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0.0 < share < 1e6 for share in shares):
        raise usage_error(
            f"Cannot keep {text[:100]!r} of the tokens.", "Shares are numbers above 0.",
            "epd calibrate --shares 133,27,3",
        )  # fmt: skip
    return shares


def _maps(
    card: ModelCard,
    decoder: Decoder,
    encoder: VisionEncoder,
    questions: Sequence[Question],
    advance: Advance,
) -> Iterator[Tensor]:
    """Attention [L, V] of one question after the other."""
    formatter = ChatFormatter(card)
    for number, question in enumerate(questions):
        images = encoder.encode([rgb_array(image) for image in question.images])
        keys = [str(place) for place in range(len(images))]
        ids, spans = expand_images(
            prompt_of(formatter, question), card.image_token_id, keys, [len(i) for i in images]
        )
        yield text_to_vision(decoder, ids, spans, images)
        advance(number + 1, "reading attention")


def _as_ratios(found: Calibration) -> Schedule:
    """The same schedule for images of any size."""
    kept = found.schedule.kept(found.num_tokens)
    ratios = tuple(max(count, 1) / found.num_tokens for count in kept)
    return Schedule(found.schedule.layers, ratios=ratios, of="original")


def _show(found: Calibration) -> None:
    layers = len(found.histogram)
    counts = count_tokens(found.num_tokens, layers, found.schedule)
    rows = [
        [layer, found.histogram[layer], counts.processed[layer], counts.booked[layer]]
        for layer in range(layers)
    ]
    title = (
        f"{counts.processed_average:.1f} of {found.num_tokens} tokens processed by the average "
        f"layer ({counts.booked_average:.1f} booked)"
    )
    show_table(table(title, ["layer", "shifts after it", "processed", "booked"], rows))
