"""Formats 1 and 2, after ModelOpt's export (hf_quant_config.json, and config.json made of it by its
``convert_hf_quant_config_format``) and vLLM's ``modelopt.py``, which reads both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .content import Content
from .files import layer_tensors, row_scale, write_config, write_json, write_tensors

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
KV_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


def write_modelopt(folder: Path, content: Content, shards: int = 1) -> Path:
    """``quant_algo`` MXFP8 in config.json, and the older file beside it, as ModelOpt writes both."""
    return _write(folder, content, shards, _config(content, quant_algo="MXFP8"), _mxfp8(content))


def write_modelopt_hf_quant_config(folder: Path, content: Content, shards: int = 1) -> Path:
    """Only hf_quant_config.json; nothing in config.json."""
    return _write(folder, content, shards, None, _mxfp8(content))


def write_modelopt_mixed(folder: Path, content: Content, shards: int = 1) -> Path:
    """``quant_algo`` MIXED_PRECISION: each layer's own in ``quantized_layers``. A linear that ``content.plain``
    has in per-tensor FP8 (see ``with_fp8_layer``) is listed as such; to a reader of MXFP8 it is not a layer.
    """
    fp8 = [name.removesuffix(".input_scale") for name in content.plain if name.endswith(".input_scale")]
    layers = {name: {"quant_algo": "MXFP8", "group_size": 32} for name in content.layers}
    layers |= {name: {"quant_algo": "FP8"} for name in fp8}
    groups = {"group_0": _group(sorted(content.layers), group_size=32)}
    if fp8:
        groups["group_1"] = _group(sorted(fp8))
    quantization = _config(content, config_groups=groups, quantized_layers=layers, quant_algo="MIXED_PRECISION")
    older = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": _kv_cache(content), "quantized_layers": layers}
    return _write(folder, content, shards, quantization, older | {"exclude_modules": content.unquantized})


def _write(
    folder: Path, content: Content, shards: int, quantization: dict[str, Any] | None, older: dict[str, Any]
) -> Path:
    write_config(folder, content, quantization)
    write_json(folder / "hf_quant_config.json", {"producer": PRODUCER, "quantization": older})
    tensors = layer_tensors(content, "weight_scale", "weight_scale", row_scale)
    write_tensors(folder, tensors | content.plain, shards)
    return folder


def _mxfp8(content: Content) -> dict[str, Any]:
    return {
        "quant_algo": "MXFP8",
        "kv_cache_quant_algo": _kv_cache(content),
        "group_size": 32,
        "exclude_modules": content.unquantized,
    }


def _group(targets: list[str], **options: int) -> dict[str, Any]:
    kind = {"dynamic": False, "num_bits": 8, "type": "float", **options}
    return {"input_activations": kind, "weights": kind, "targets": targets}


def _kv_cache(content: Content) -> str | None:
    return "FP8" if any(name.endswith(".k_scale") for name in content.plain) else None


def _config(content: Content, **options: Any) -> dict[str, Any]:
    """``quantization_config`` of config.json. It has no group size."""
    kv_cache = {"kv_cache_scheme": KV_CACHE} if _kv_cache(content) else {}
    return options | {"ignore": content.unquantized} | kv_cache | {"producer": PRODUCER, "quant_method": "modelopt"}
