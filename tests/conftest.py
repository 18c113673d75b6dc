"""What must be set before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this once, at its first import: kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
