"""Formats 6 and 7: the tensors of compressed-tensors, under its own config or AutoRound's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .content import Content
from .files import layer_tensors, row_scale, write_config, write_json, write_tensors


def write_compressed_tensors(folder: Path, content: Content, shards: int = 1) -> Path:
    """The config is made and written by ``compressed_tensors`` itself, as when a model is saved."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    scheme = preset_name_to_scheme("MXFP8", ["Linear"])
    scheme.format = CompressionFormat.mxfp8_quantized
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=CompressionFormat.mxfp8_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=content.unquantized,
    )
    write_config(folder, content, None)
    ModelCompressor(quantization_config=config).update_config(str(folder))
    return _write_tensors(folder, content, shards)


def write_auto_round(folder: Path, content: Content, shards: int = 1) -> Path:
    """As auto_round's ``model_free_utils`` builds it: layers left alone are in ``extra_config``, with 16 bits.
    The same JSON is in config.json and in quantization_config.json.
    """
    quantization: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 8,
        "group_size": 32,
        "sym": True,
        "data_type": "mx_fp",
        "iters": 0,
        "autoround_version": "0.12.3",
        "enable_quanted_input": False,
        "act_bits": 8,
        "act_data_type": "mx_fp",
        "act_dynamic": True,
        "act_group_size": 32,
        "act_sym": True,
    }
    left = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}
    if content.unquantized:
        quantization["extra_config"] = dict.fromkeys(content.unquantized, left)
    write_config(folder, content, quantization)
    write_json(folder / "quantization_config.json", quantization)
    return _write_tensors(folder, content, shards)


def _write_tensors(folder: Path, content: Content, shards: int) -> Path:
    write_tensors(folder, layer_tensors(content, "weight_scale", None, row_scale) | content.plain, shards)
    return folder
