"""A quantised checkpoint in the making: beside its destination, resumable, and renamed at the end.

    .NAME.partial/model/     becomes NAME in one rename, when everything is in it
    .NAME.partial/scratch/   plan.json, calibration.json, layer-I.json once layer I is on disk,
                             hidden-I.safetensors, what enters layer I

Every file is written under another name and renamed, so whatever has its name is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from epd.errors import ConfigError, EPDError
from epd.kv.gate import SAMPLE_FILE, SAMPLE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

__all__ = ["Workspace", "layer_file"]


def layer_file(index: int) -> str:
    """The name of the file that holds one layer."""
    return f"layer-{index:05d}.safetensors"


class Workspace:
    """The unfinished output for `out`; hold it with `opened`, so that nobody else writes to it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._root = out.with_name(f".{out.name}.partial")
        self.model = self._root / "model"
        self._scratch = self._root / "scratch"

    @contextmanager
    def opened(self, plan: Mapping[str, Any]) -> Iterator[Workspace]:
        """The workspace, with what an earlier run of the same `plan` finished, or else empty.

        Raises `ConfigError` when the destination is taken or another process works on it. After an
        error that would come again, nothing of it is left.
        """
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise ConfigError(f"Cannot write to {self._out}.\nIt exists already.\n"
                              "Choose another place, or remove it.")  # fmt: skip
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"Cannot write to {self._out}.\nAnother process is at it.\n"
                                  "Wait for it, or choose another place.") from None  # fmt: skip
            self._prepare(json.loads(json.dumps(plan)))
            try:
                yield self
            except EPDError:
                shutil.rmtree(self._root, ignore_errors=True)
                raise

    def _prepare(self, plan: dict[str, Any]) -> None:
        file = self._scratch / "plan.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == plan:
            return
        for directory in (self.model, self._scratch):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        self._write_json(file, plan)

    def finished(self) -> int:
        """How many layers, from the first on, are done."""
        count = 0
        while (self._scratch / f"layer-{count}.json").is_file():
            count += 1
        return count

    def calibration(self) -> dict[str, Any] | None:
        """What `save_calibration` was told, None before that."""
        file = self._scratch / "calibration.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def save_calibration(self, hidden: torch.Tensor, told: Mapping[str, Any]) -> None:
        """Keep what enters the first layer, and facts about it."""
        self._save(self._hidden_file(0), {"hidden": hidden})
        self._write_json(self._scratch / "calibration.json", told)

    def hidden(self) -> torch.Tensor:
        """What enters the first layer that is not finished; after the last, what left it."""
        hidden: torch.Tensor = load_file(self._hidden_file(self.finished()))["hidden"]
        return hidden

    def save_layer(
        self, index: int, tensors: dict[str, torch.Tensor], report: dict[str, Any],
        hidden: torch.Tensor,
    ) -> None:  # fmt: skip
        """Put a finished layer on disk; only when its report is there does it count."""
        self._save(self.model / layer_file(index), tensors)
        self._save(self._hidden_file(index + 1), {"hidden": hidden})
        self._write_json(self._scratch / f"layer-{index}.json", report)
        self._hidden_file(index).unlink(missing_ok=True)

    def reports(self) -> list[dict[str, Any]]:
        """The reports of finished layers."""
        files = [self._scratch / f"layer-{index}.json" for index in range(self.finished())]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """A file of the finished checkpoint, of other tensors than a layer's."""
        self._save(self.model / name, tensors)

    def save_sample(self, hidden: torch.Tensor) -> None:
        """What the check of coded KV at load looks at: hidden states of one sequence."""
        self._save(self.model / SAMPLE_FILE, {"hidden": hidden[:SAMPLE_TOKENS].contiguous()})

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A file of the finished checkpoint."""
        self._write_json(self.model / name, value)

    def publish(self) -> None:
        """Make the model appear at its destination, whole; then forget the rest."""
        for file in self.model.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.rename(self.model, self._out)
        shutil.rmtree(self._root, ignore_errors=True)

    def _hidden_file(self, index: int) -> Path:
        return self._scratch / f"hidden-{index}.safetensors"

    def _save(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        unfinished = file.with_suffix(".writing")
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, file)

    def _write_json(self, file: Path, value: Mapping[str, Any]) -> None:
        unfinished = file.with_suffix(".writing")
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
