"""Format 11, after torchao's ``prototype/safetensors`` and ``mx_tensor.py``, and transformers' use of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .content import Content, Layer
from .files import row_scale, write_config, write_tensors
from .swizzle import swizzled

E4M3 = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
BFLOAT16 = {"_type": "torch.dtype", "_data": "bfloat16"}
KERNEL = {"_type": "KernelPreference", "_data": "AUTO"}
MODE = {"_type": "ScaleCalculationMode", "_data": "RCEIL"}


def write_torchao(
    folder: Path, content: Content, *, swizzle: bool, attribute: str = "is_swizzled_scales", shards: int = 1
) -> Path:
    """``M.weight`` is ``M._weight_qdata`` and ``M._weight_scale`` (E8M0), and JSON in the metadata, of which every
    shard has all. Scales are ``[N, K/32]``, or swizzled ``[32 * ceil(N/128), 16 * ceil(K/128)]``, as
    ``attribute`` says: a bool, later ``swizzle_type``, an object.
    """
    tensors, metadata = {}, {}
    for name, layer in content.layers.items():
        parameter = name if layer.weight.dim() == 3 else f"{name}.weight"
        prefix = "{}._{}_".format(*parameter.rsplit(".", 1))
        tensors |= {f"{prefix}qdata": layer.weight, f"{prefix}scale": _scale(layer, swizzle)}
        metadata[parameter] = _mx_tensor(attribute, swizzle)
        if layer.bias is not None:
            bias = f"{name}_bias" if layer.weight.dim() == 3 else f"{name}.bias"
            tensors[bias], metadata[bias] = layer.bias, {"_type": "Tensor"}
    metadata |= {name: {"_type": "Tensor"} for name in content.plain}
    texts = {name: json.dumps(value) for name, value in (metadata | {"tensor_names": list(metadata)}).items()}
    write_config(folder, content, _config(content))
    write_tensors(folder, tensors | content.plain, shards, metadata=texts)
    return folder


def _scale(layer: Layer, swizzle: bool) -> Tensor:
    """Experts are swizzled as one matrix ``[E * N, K/32]``, so their N must be whole tiles."""
    *experts, n, columns = row_scale(layer).shape
    if not swizzle:
        return layer.scale.view(torch.float8_e8m0fnu)
    if experts and n % 128:
        raise ValueError(f"scales of {experts[0]} experts of {n} rows cannot be swizzled: N must be a multiple of 128")
    flat = swizzled(layer.scale.view(-1, columns))
    return flat.view(*experts, -(-n // 128) * 32, -(-columns // 4) * 16).view(torch.float8_e8m0fnu)


def _mx_tensor(attribute: str, swizzle: bool) -> dict[str, Any]:
    activations = {
        "elem_dtype": E4M3,
        "block_size": 32,
        "scaling_mode": MODE,
        "kernel_preference": KERNEL,
        attribute: _swizzle(attribute, True),
    }
    data = {
        "elem_dtype": E4M3,
        "block_size": 32,
        "orig_dtype": BFLOAT16,
        "kernel_preference": KERNEL,
        "act_quant_kwargs": {"_type": "QuantizeTensorToMXKwargs", "_data": activations},
        attribute: _swizzle(attribute, swizzle),
    }
    return {"_type": "MXTensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}


def _swizzle(attribute: str, swizzle: bool) -> Any:
    if attribute == "is_swizzled_scales":
        return swizzle
    return {"_type": "Swizzle_32_4_4" if swizzle else "NoSwizzle", "_data": {}}


def _config(content: Content) -> dict[str, Any]:
    workflow = {
        "_type": "MXDynamicActivationMXWeightConfig",
        "_version": 1,
        "_data": {
            "block_size": 32,
            "activation_dtype": E4M3,
            "weight_dtype": E4M3,
            "kernel_preference": KERNEL,
            "scaling_mode": MODE,
        },
    }
    return {
        "quant_method": "torchao",
        "quant_type": {"default": workflow},
        "modules_to_not_convert": content.unquantized,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
