"""What a `quantization_config` may say."""

from __future__ import annotations

from typing import Any

import pytest

from epd.errors import CheckpointError
from epd.models.quantization import Quantization

_GOOD = {"quant_method": "compressed-tensors", "config_groups": {"g": {
    "weights": {"num_bits": 4, "type": "int"}, "input_activations": None}}}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "scheme"),
    [
        (_GOOD, "w4a16"),
        ({**_GOOD, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"},
          "input_activations": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        ({**_GOOD, "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"},
          "input_activations": {"num_bits": 8, "type": "float"}}}}, "w4a8-fp8"),
        ({"quant_method": "gptq", "bits": 4}, "w4a16"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, "w4a16"),
        ({"quant_method": "qqq", "wbits": 4}, "w4a8-int8"),
        ({"quant_method": "epd", "format_version": 1, "scheme": "w4a8-fp8"}, "w4a8-fp8"),
    ],
)  # fmt: skip
def test_declared_schemes(raw: dict[str, Any], scheme: str) -> None:
    assert Quantization.from_config(raw).scheme == scheme


def test_gptq_versions_differ_in_their_zeros() -> None:
    versions = ({}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"})
    facts = [Quantization.from_config({"quant_method": "gptq", "bits": 4, **v}) for v in versions]
    assert [fact.zero_offset for fact in facts] == [1, 1, 0]
    told = [{"quant_method": "gptq", "bits": 4, "desc_act": order} for order in (True, False)]
    assert [Quantization.from_config(raw).act_order for raw in told] == [True, False]


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("four bits", "quantization_config"),
        ({"quant_method": "gptq", "bits": 3}, "weight bits: 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "epd", "format_version": 3, "scheme": "fp8"}, "format_version: 3"),
        ({"quant_method": "epd", "format_version": 1, "scheme": "w2"}, "scheme: w2"),
        ({**_GOOD, "transform_config": {"R1": {}}}, "transform_config"),
        ({**_GOOD, "config_groups": {}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
            "num_bits": 8, "type": "int"}}}}, "weights int8"),
    ],
)  # fmt: skip
def test_declarations_that_are_not_served(raw: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        Quantization.from_config(raw)
