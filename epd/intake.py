"""A new request as a sequence: checked, its images expanded, its tokens placed. No tensors."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise

from epd.errors import InvalidRequestError
from epd.kv.handoff import ModelFacts
from epd.sequence import Sequence, expand_images, place_kept
from epd.step import KeptTokens, NewSequence
from epd_pruning.errors import PruningError
from epd_pruning.schedule import Schedule, fit_like

__all__ = ["take_in"]


def take_in(
    new: NewSequence,
    image_lengths: list[int],
    facts: ModelFacts,
    *,
    layers: Schedule | None = None,
) -> Sequence:
    """The sequence that serves `new`, whose i-th image has `image_lengths[i]` vision tokens.

    `layers` is how the core prunes inside the decoder, if it does: where, in which proportions.
    Raises `InvalidRequestError` for anything that contradicts itself or the model of `facts`.
    """
    _check_tokens(new, facts.vocab_size)
    kept = _checked_kept(new, image_lengths)
    prompt, spans = expand_images(
        new.prompt_token_ids, new.image_token_id, new.mm_keys, image_lengths
    )
    spans = tuple(
        span if tokens is None else replace(span, key=_content_key(span.key, tokens, new.positions))
        for span, tokens in zip(spans, kept, strict=True)
    )
    keep = new.positions == "keep"
    positions, shift = place_kept(len(prompt), spans, kept) if keep else ([], 0)
    before = sum(
        length if tokens is None else tokens.num_tokens
        for length, tokens in zip(image_lengths, kept, strict=True)
    )
    sequence = Sequence(
        request_id=new.request_id, attempt=new.attempt, tokens=prompt + new.output_token_ids,
        num_prompt=len(prompt), spans=spans, sampling=new.sampling, salt=new.salt,
        deadline=new.deadline, handoff=new.handoff, positions=positions, shift=shift,
        image_tokens_before=before, next_pos=positions[0] if positions else 0,
    )  # fmt: skip
    if new.layer_keep is not None:
        _plan_layers(sequence, new.layer_keep, layers, facts.num_layers)
    return sequence


def _plan_layers(
    sequence: Sequence, keep: int | float, layers: Schedule | None, num_layers: int
) -> None:
    """Give `sequence` the largest schedule within its layer average; none where all may stay."""
    if layers is None:
        raise InvalidRequestError("this server prunes nothing inside the decoder", "pruning.method")
    sizes = [span.stop - span.start for span in sequence.spans]
    entering = sum(sizes)
    if isinstance(keep, int):
        average: float = sum(min(keep, size) for size in sizes)
    else:
        average = keep * sequence.image_tokens_before
    if not (keep >= 1 if isinstance(keep, int) else 0.0 < keep <= 1.0):
        raise InvalidRequestError(
            "layer_keep must be a count of at least 1 or a share in (0, 1]", "pruning.layer_keep"
        )
    if average >= entering or not sequence.text_after_images:
        return
    try:
        schedule = fit_like(layers, num_tokens=entering, num_layers=num_layers, average=average)
    except PruningError as error:
        raise InvalidRequestError(
            f"a layer average of {average:g} vision tokens was asked for; it must be "
            f"{error.allowed}",
            "pruning.layer_keep",
        ) from None
    sequence.schedule = schedule
    dropped = (0, *(entering - left for left in schedule.kept(entering)))
    sequence.dropped = dropped if any(dropped) else ()


def _check_tokens(new: NewSequence, vocab_size: int) -> None:
    tokens = [*new.prompt_token_ids, *new.output_token_ids]
    if not new.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty", "messages")
    if not all(0 <= token < vocab_size or token == new.image_token_id for token in tokens):
        raise InvalidRequestError("the prompt has tokens outside the vocabulary", "messages")
    if len(new.output_token_ids) >= new.sampling.max_tokens:
        raise InvalidRequestError("the request already has max_tokens tokens", "max_tokens")


def _checked_kept(new: NewSequence, image_lengths: list[int]) -> list[KeptTokens | None]:
    """What is left of each image, None for all of it."""
    if new.positions not in ("keep", "renumber"):
        raise InvalidRequestError("positions must be keep or renumber", "pruning.positions")
    kept = new.kept or [None] * len(image_lengths)
    if len(kept) != len(image_lengths):
        raise InvalidRequestError(
            f"kept tokens of {len(kept)} images for {len(image_lengths)} images", "pruning"
        )
    for tokens, length in zip(kept, image_lengths, strict=True):
        if tokens is not None and not _is_choice(tokens, length):
            raise InvalidRequestError(
                f"{length} vision tokens need as many kept indices, increasing, "
                f"in [0, {tokens.num_tokens - 1}]",
                "pruning",
            )
    return kept


def _is_choice(kept: KeptTokens, length: int) -> bool:
    indices = [-1, *kept.keep_indices, kept.num_tokens]
    return len(kept.keep_indices) == length and all(a < b for a, b in pairwise(indices))


def _content_key(key: str, kept: KeptTokens, positions: str) -> str:
    """What prefix blocks call the survivors of an image: any other choice is another content."""
    told = repr((key, kept.digest, positions, kept.num_tokens, kept.keep_indices))
    return blake2b(told.encode(), digest_size=32).hexdigest()
