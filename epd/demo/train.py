"""Trains the demo model from nothing and writes its checkpoint: one command, one GPU.

    python -m epd.demo.train --out DIR

takes 14 minutes on an H200 and is resumable: interrupted, the same command goes on from the state
it saved within the last two minutes. The learning rate follows the seconds spent, so a slower
machine ends as smoothly, only with fewer steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from epd.demo.batches import Mix, draw_batch
from epd.demo.glyphs import load_glyphs
from epd.demo.learner import Learner
from epd.demo.model import SIZES, build_llava, build_text_tower, build_tokenizer, export
from epd.demo.packing import TokenTables
from epd.demo.seeds import training_seed
from epd.demo.wording import TYPES

WARM_UP_STEPS = 300
LOWEST_RATE = 0.01
UNTIMED_STEPS = 5
WEIGHT_DECAY = 0.05
CAPTION_WEIGHT, TEXT_WEIGHT = 0.5, 0.3
PATCH_WEIGHT_START, PATCH_WEIGHT_END = 0.5, 0.1
DROPPING_FROM, DROPPING_FULL = 0.42, 0.50
SAVE_EVERY_S = 90.0
STATE_FILE = "training-state.safetensors"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is asked to do."""

    out: Path
    seconds: float
    steps: int
    learning_rate: float
    size: str
    mix: Mix
    compile: bool
    log_every: int


def learning_rate(plan: Plan, step: int, progress: float) -> float:
    """Linear warm-up over steps, then a cosine over the run's progress down to 1 %."""
    cosine = LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return plan.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def drop_share(progress: float) -> float:
    """The share of samples that may lose vision tokens: none at first, all in the second half."""
    return min(1.0, max(0.0, (progress - DROPPING_FROM) / (DROPPING_FULL - DROPPING_FROM)))


class Trainer:
    """One run: model, optimiser, clock and the state file that lets it be resumed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.size = plan, SIZES[plan.size]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.tokenizer = build_tokenizer()
        self.tables = TokenTables(self.tokenizer, self.device)
        self.glyphs = load_glyphs(self.device)
        self.llava = build_llava(self.size, len(self.tokenizer))
        self.text_tower = build_text_tower(self.size, len(self.tokenizer))
        self.learner = Learner(self.llava, self.text_tower, size=self.size, tables=self.tables).to(
            self.device
        )
        self.parameters = dict(self.learner.named_parameters())
        self.optimizer = self._optimizer()
        self.generator = torch.Generator(device=self.device)
        self.step, self.spent = 0, 0.0
        self.spent_before = 0.0
        self.state_path = plan.out / STATE_FILE
        if self.state_path.exists():
            self.load_state()
        if plan.compile:
            self.learner.compile_layers()
        self.tally = torch.zeros(2, len(TYPES), device=self.device)

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for n, p in self.parameters.items() if p.ndim >= 2 and "embed" not in n]
        chosen = {id(parameter) for parameter in matrices}
        others = [p for p in self.parameters.values() if id(p) not in chosen]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.plan.learning_rate,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps if a number was asked for, else by seconds."""
        if self.plan.steps:
            return min(1.0, self.step / self.plan.steps)
        return min(1.0, self.spent / self.plan.seconds)

    def run(self) -> None:
        """Trains until the plan is done; logs, and saves state and checkpoint every 90 s."""
        started = saved = time.monotonic()
        first = self.step
        self.spent_before = self.spent
        while self.progress < 1.0:
            losses = self.train_step()
            if self.step - first == UNTIMED_STEPS:
                self._synchronize()
                print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
                started = saved = time.monotonic()
            if self.step - first >= UNTIMED_STEPS:
                self.spent = self.spent_before + time.monotonic() - started
            if self.step % self.plan.log_every == 0 or self.step in (1, 50):
                self.log(losses, self.step - first)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save_state()
                self.export()
                saved = time.monotonic()
        self._synchronize()
        self.save_state()
        self.export()

    def train_step(self) -> dict[str, torch.Tensor]:
        """One batch; returns its losses."""
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, self.step, progress)
        batch = draw_batch(
            self.plan.mix,
            self.tables,
            glyphs=self.glyphs,
            grid=self.size.grid,
            drop_share=drop_share(progress),
            generator=self.generator.manual_seed(training_seed(self.step)),
        )
        cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
            losses: dict[str, torch.Tensor] = self.learner(batch)
        patch_weight = PATCH_WEIGHT_START + (PATCH_WEIGHT_END - PATCH_WEIGHT_START) * progress
        loss = losses["question"] + CAPTION_WEIGHT * losses["caption"]
        loss = loss + patch_weight * losses["patch"]
        loss = loss + TEXT_WEIGHT * (losses["patch_text"] + losses["pooled_text"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        for pack in batch.packs:
            kinds, right = pack.kinds.flatten(), losses[f"exact_{pack.layout.num_images}"].flatten()
            self.tally[0].index_add_(0, kinds, right.float())
            self.tally[1].index_add_(0, kinds, torch.ones_like(right, dtype=torch.float))
        return losses

    def log(self, losses: dict[str, torch.Tensor], steps: int) -> None:
        """One line of losses, one of teacher-forced exact answers per type since the last."""
        timed, seconds = max(0, steps - UNTIMED_STEPS), max(self.spent - self.spent_before, 1e-3)
        rate = timed * self.plan.mix.num_images / seconds
        shown = " ".join(
            f"{name} {losses[name].item():.4f}"
            for name in ("question", "caption", "patch", "patch_text", "pooled_text")
        )
        print(f"step {self.step} t {self.spent:.0f} img/s {rate:.0f} {shown}", flush=True)
        right, asked = self.tally.tolist()
        pairs = zip(TYPES, right, asked, strict=True)
        print("  " + " ".join(f"{t} {r / n:.2f}" for t, r, n in pairs if n), flush=True)
        self.tally.zero_()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def save_state(self) -> None:
        """Parameters, optimiser moments, step and seconds, in one safetensors file."""
        tensors = {f"parameter.{name}": value.detach() for name, value in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": value for key, value in state.items()}
        progress = {"step": str(self.step), "spent": str(self.spent)}
        part = self.state_path.with_suffix(".part")
        self.plan.out.mkdir(parents=True, exist_ok=True)
        on_cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(on_cpu, part, progress)
        part.replace(self.state_path)

    def load_state(self) -> None:
        """Goes on where `save_state` left off."""
        with safe_open(self.state_path, "pt", device=str(self.device)) as file:
            metadata, keys = file.metadata(), set(file.keys())
            self.step, self.spent = int(metadata["step"]), float(metadata["spent"])
            for name, parameter in self.parameters.items():
                parameter.data.copy_(file.get_tensor(f"parameter.{name}"))
                if f"exp_avg.{name}" in keys:
                    self.optimizer.state[parameter] = {
                        key: file.get_tensor(f"{key}.{name}")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        print(f"resumed at step {self.step}, {self.spent:.0f} s", flush=True)

    def export(self) -> None:
        """Writes the checkpoint as it stands beside the state; training can go on afterwards."""
        vocabulary = len(self.tokenizer)
        llava = build_llava(self.size, vocabulary)
        llava.load_state_dict(self.llava.state_dict())
        text_tower = build_text_tower(self.size, vocabulary)
        text_tower.load_state_dict(self.text_tower.state_dict())
        export(
            self.plan.out / "checkpoint",
            llava,
            text_tower,
            tokenizer=self.tokenizer,
            alignment=self.learner.alignment(),
            size=self.size,
        )


def facts(trainer: Trainer) -> dict[str, Any]:
    """What the run is about to train, for the log."""
    layouts = [
        trainer.tables.layout(images, trainer.size.image_tokens, slots).length
        for images, _, slots in trainer.plan.mix.groups()
    ]
    return {
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "llava_parameters": sum(p.numel() for p in trainer.llava.parameters()),
        "text_tower_parameters": sum(p.numel() for p in trainer.text_tower.parameters()),
        "vocabulary": len(trainer.tokenizer),
        "prompts": len(trainer.tables.prompts),
        "row_lengths": layouts,
        "images_per_step": trainer.plan.mix.num_images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="state and checkpoint go here")
    parser.add_argument("--seconds", type=float, default=780.0, help="training time")
    parser.add_argument("--steps", type=int, default=0, help="stop by steps instead of seconds")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="highest learning rate")
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the batch size")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--log-every", type=int, default=250)
    given = parser.parse_args()
    default = Mix()
    rows = (default.single_rows, default.pair_rows, default.triple_rows)
    mix = Mix(*(max(1, round(number * given.scale)) for number in rows))
    plan = Plan(
        given.out,
        given.seconds,
        given.steps,
        given.rate,
        given.size,
        mix,
        not given.no_compile,
        given.log_every,
    )
    trainer = Trainer(plan)
    print(json.dumps(facts(trainer)), flush=True)
    trainer.run()
    print(f"done: {trainer.step} steps in {trainer.spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
