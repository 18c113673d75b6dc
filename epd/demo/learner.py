"""The model in training: one forward pass from a batch to its losses.

Two heads exist only here: one names colour, shape, size and character under each patch (labels the
renderer knows exactly), one aligns patches with the text tower. The second is saved beside the
tower, because query-conditioned pruning needs it: relevance of a patch to a text is the cosine of
`visual_projection(post_layernorm(hidden_states[-2]))` with the tower's `text_embeds`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epd.demo.dropping import keep_by_dpp
from epd.demo.model import PIXEL_MEAN, PIXEL_STD, PROJECTION, Size
from epd.demo.packing import IGNORED, Layout, TokenTables
from epd.demo.scenes import constant
from epd.demo.world import CHARS, COLORS, MAX_OBJECTS, RADII, SHAPES

if TYPE_CHECKING:
    from epd.demo.batches import Batch, Pack

PATCH_CLASSES = (len(COLORS) + 1, len(SHAPES) + 1, len(RADII) + 1, len(CHARS) + 1)
POOLED_BIAS = -2.0


class Learner(nn.Module):
    """LLaVA, text tower and the two heads. Call with a batch for a dict of losses."""

    mean: Tensor
    std: Tensor

    def __init__(self, llava: Any, text_tower: Any, *, size: Size, tables: TokenTables) -> None:
        super().__init__()
        self.llava, self.text_tower, self.size, self.tables = llava, text_tower, size, tables
        self.visual_projection = nn.Linear(size.vision_width, PROJECTION, bias=False)
        self.patch_head = nn.Linear(size.vision_width, sum(PATCH_CLASSES))
        for layer in (self.visual_projection, self.patch_head):
            nn.init.normal_(layer.weight, 0, 0.02)
        self.patch_logit_scale = nn.Parameter(torch.tensor(2.3))
        self.patch_logit_bias = nn.Parameter(torch.tensor(-4.0))
        self.pooled_logit_scale = nn.Parameter(torch.tensor(2.3))
        self.register_buffer("mean", 255 * torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), False)
        self.register_buffer("std", 255 * torch.tensor(PIXEL_STD).view(1, 3, 1, 1), False)
        self._static: dict[Layout, tuple[Tensor, Tensor]] = {}

    def compile_layers(self) -> None:
        """Compiles each transformer layer: layers share their code, so little is compiled."""
        for tower in (self._vision.encoder, self.llava.model.language_model):
            for layer in tower.layers:
                layer.compile(dynamic=False)

    def alignment(self) -> dict[str, Tensor]:
        """What the text tower needs to score patches."""
        return {
            "visual_projection.weight": self.visual_projection.weight,
            "patch_logit_scale": self.patch_logit_scale,
            "patch_logit_bias": self.patch_logit_bias,
        }

    @property
    def _vision(self) -> Any:
        return self.llava.model.vision_tower

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features, patches, pooled = self._see(batch.images)
        vision_embeddings = self.llava.model.multi_modal_projector(features)
        kept = batch.kept
        if batch.dropping:
            kept = keep_by_dpp(vision_embeddings.detach(), kept, batch.dpp_counts)
        parts: list[Tensor] = []
        exact: dict[int, Tensor] = {}
        for pack in batch.packs:
            loss, right = self._answer(pack, vision_embeddings, kept)
            slots = pack.layout.num_slots * pack.layout.slot_length
            told = pack.labels != IGNORED
            sums = [part.sum() for part in (loss[:, :slots], loss[:, slots:])]
            counts = [part.sum() for part in (told[:, :slots], told[:, slots:])]
            parts.append(torch.stack([*sums, *counts]))
            exact[pack.layout.num_images] = self._exact(pack, right)
        question_sum, caption_sum, questions, captions = torch.stack(parts).sum(0)
        return {
            "question": question_sum / questions.clamp(min=1),
            "caption": caption_sum / captions.clamp(min=1),
            "patch": self._patch_loss(patches, batch),
            **self._text_losses(patches, pooled, batch),
            **{f"exact_{number}": value for number, value in exact.items()},
        }

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """LLaVA's features `[M, N, D]`, the patch features for the heads, the pooled vector."""
        tower = self._vision
        states = tower.pre_layrnorm(tower.embeddings((images.float() - self.mean) / self.std))
        earlier = states
        for layer in tower.encoder.layers:
            earlier, states = states, layer(states, None)
        features = earlier[:, 1:]
        return features, tower.post_layernorm(features), tower.post_layernorm(states[:, 0])

    def _answer(self, pack: Pack, vision_embeddings: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy `[R, S]` of the tokens after the prefix (0 where unlabelled), and hits."""
        layout, decoder = pack.layout, self.llava.model.language_model
        num_rows = pack.tokens.shape[0]
        images = slice(pack.first_image, pack.first_image + num_rows * layout.num_images)
        rows = vision_embeddings[images].view(
            num_rows, layout.num_images, *vision_embeddings.shape[1:]
        )
        embed = decoder.embed_tokens
        start = constant(tuple(self.tables.start), rows.device)
        gap = constant(tuple(self.tables.image_break), rows.device)
        pieces = [embed(start).expand(num_rows, -1, -1), rows[:, 0]]
        for image in range(1, layout.num_images):
            pieces += [embed(gap).expand(num_rows, -1, -1), rows[:, image]]
        states = torch.cat([piece.float() for piece in [*pieces, embed(pack.tokens)]], 1)
        mask, positions = self._mask(pack, kept[images].view(num_rows, -1, kept.shape[1]))
        rotary = decoder.rotary_emb(states, positions[None])
        for layer in decoder.layers:
            states = layer(states, attention_mask=mask, position_embeddings=rotary)
        states = decoder.norm(states[:, layout.prefix_length :])
        logits = self.llava.lm_head(states).float()
        # a slot starts with its prompt, so shifting by one never crosses into the next slot
        target = F.pad(pack.labels[:, 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
        )
        right = (logits.argmax(-1) == target) | (target == IGNORED)
        shifted = F.pad(loss.view_as(target)[:, :-1], (1, 0))
        return shifted, F.pad(right[:, :-1], (1, 0), value=True)

    def _exact(self, pack: Pack, right: Tensor) -> Tensor:
        """Which questions would be answered exactly, bool `[R, K]` (teacher forced)."""
        slots, length = pack.layout.num_slots, pack.layout.slot_length
        return right[:, : slots * length].reshape(-1, slots, length).all(-1)

    def _mask(self, pack: Pack, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Boolean attention mask `[R, 1, L, L]` without the dropped tokens, and positions `[L]`."""
        layout = pack.layout
        if layout not in self._static:
            device = kept.device
            self._static[layout] = layout.mask().to(device), layout.positions().to(device)
        base, positions = self._static[layout]
        mask = base.expand(kept.shape[0], -1, -1).clone()
        for image in range(layout.num_images):
            mask[:, :, layout.image_span(image)] &= kept[:, image, None]
        if pack.visible is not None:
            first, last = layout.prefix_length, layout.length - layout.tail_length
            seen = pack.visible.repeat_interleave(layout.slot_length, 1)
            mask[:, first:last, layout.image_span(0)] &= seen
        # a dropped token still attends to itself, so that no softmax is empty
        mask |= torch.eye(layout.length, dtype=torch.bool, device=mask.device)
        return mask[:, None], positions

    def _patch_loss(self, patches: Tensor, batch: Batch) -> Tensor:
        """Naming what lies under each patch: colour, shape, size and character."""
        logits = self.patch_head(patches).float().split(PATCH_CLASSES, -1)
        scenes, labels = batch.scenes, batch.patches
        targets = [
            F.pad(kind, (0, 1), value=none).gather(1, labels.obj)
            for kind, none in (
                (scenes.color, len(COLORS)),
                (scenes.shape, len(SHAPES)),
                (scenes.size, len(RADII)),
            )
        ]
        assert scenes.color.shape[1] == MAX_OBJECTS
        losses = [
            F.cross_entropy(logit.flatten(0, 1), target.flatten())
            for logit, target in zip(logits, [*targets, labels.char], strict=True)
        ]
        return torch.stack(losses).sum()

    def _text_losses(self, patches: Tensor, pooled: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Text against patches (a sigmoid each) and phrases against whole images."""
        ids = self.tables.query[batch.queries.flatten()]
        texts = F.normalize(self.text_tower(input_ids=ids).text_embeds.float(), dim=-1)
        texts = texts.view(*batch.queries.shape, -1)  # [M, Q, P]
        seen = F.normalize(self.visual_projection(patches).float(), dim=-1)
        logits = torch.einsum("mnp,mqp->mqn", seen, texts) * self.patch_logit_scale.exp()
        wanted = batch.query_patches.float()
        loss = F.binary_cross_entropy_with_logits(
            logits + self.patch_logit_bias, wanted, reduction="none"
        )
        size = wanted.sum(-1, keepdim=True).clamp(min=1)
        patch_text = ((loss * wanted / size).sum(-1) + (loss * (1 - wanted)).mean(-1)).mean()
        whole = F.normalize(self.visual_projection(pooled).float(), dim=-1)
        similarity = whole @ texts[:, -1].t() * self.pooled_logit_scale.exp()
        pooled_text = F.binary_cross_entropy_with_logits(
            similarity + POOLED_BIAS, batch.phrase_seen
        )
        return {"patch_text": patch_text, "pooled_text": pooled_text}
