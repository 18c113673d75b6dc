"""Quantised linear layers as various writers store them, into the canonical form.

One module per writer. `read_linear` chooses by tensor names, never by what config.json declares.
"""

from __future__ import annotations

from epd.models.layouts.stored import StoredLayer, StoredWeight, is_quantized, read_linear

__all__ = ["StoredLayer", "StoredWeight", "is_quantized", "read_linear"]
