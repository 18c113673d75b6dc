"""The built-in demo model: a small LLaVA that answers questions about rendered scenes.

This package has two halves. `CHECKPOINT` is a Hugging Face LLaVA directory that needs no network,
and `epd.demo.examples.held_out` renders pictures it has never seen, with questions and answers.
The rest (`scenes`, `questions`, `packing`, `model`, `train`, `evaluate`) is how the checkpoint was
made and measured; README.md beside this file says what the model knows and what it does not.

Importing this module imports neither torch nor transformers.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The LLaVA directory; `CHECKPOINT / "text_tower"` holds the CLIP text tower and its alignment."""

TEXT_TOWER = CHECKPOINT / "text_tower"
"""CLIPTextModelWithProjection layout plus `alignment.safetensors` (visual_projection.weight)."""

BUILT_IN_NAME = "epd-demo"
"""What the built-in model is called in `/v1/models`."""

__all__ = ["BUILT_IN_NAME", "CHECKPOINT", "TEXT_TOWER"]
