"""Format 9, after msModelSlim's AscendV1 saver, which vLLM-Ascend and SGLang read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .content import Content
from .files import layer_tensors, write_config, write_json, write_tensors


def write_modelslim(folder: Path, content: Content, shards: int = 1) -> Path:
    """quant_model_description.json names the kind of every tensor; config.json says nothing. A bias is stored,
    and so given back, in float32. K may end in a short block (see ``ragged``): weight ``[N, K]``, scale
    ``[N, ceil(K/32)]``, and a reader is to give back ``padded(content)``.
    """
    tensors = layer_tensors(content, "weight_scale", None, lambda layer: layer.scale)
    tensors = {name: tensor.float() if name.endswith(".bias") else tensor for name, tensor in tensors.items()}
    kinds: dict[str, Any] = {name: "FLOAT" if name.endswith(".bias") else "W8A8_MXFP8" for name in tensors}
    kinds |= dict.fromkeys(content.plain, "FLOAT")
    kinds |= {"version": "1.0.0", "model_quant_type": "W8A8_MXFP8", "metadata": {}, "group_size": 32, "optional": {}}
    write_config(folder, content, None)
    write_json(folder / "quant_model_description.json", kinds)
    write_tensors(folder, tensors | content.plain, shards, "quant_model_weights", numbered=True)
    return folder
