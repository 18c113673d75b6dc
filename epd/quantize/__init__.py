"""Quantising the language layers of a checkpoint: from plain floats to four or eight bits.

`epd.quantize.run.quantize_model` does a whole checkpoint, `layer.quantize_layer` one layer of it.
"""
