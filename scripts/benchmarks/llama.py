"""A model of Llama-3-8B's shape, or a smaller one, with random weights, the same in every process, in each variant."""

from __future__ import annotations

import gc
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
import transformers
from torch import nn

import mxfp8_ops

from . import compiled
from .model_options import ModelOptions

SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
SMALL = SIZES | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""For CPUs: of TinyLlama's shape."""
TINY = SIZES | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
STANDARD_DEVIATION = 0.02
"""Of all matrices."""


def build(options: ModelOptions, variant: str, layers: int | None = None) -> Any:
    """The model of a variant, not compiled. The dense one has the values of the MXFP8 weights."""
    sizes = TINY if options.tiny else SMALL if options.device == "cpu" else SIZES
    config = transformers.LlamaConfig(
        num_hidden_layers=options.layers if layers is None else layers,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    randomize_(model, options.device)
    if variant == "bf16":
        round_to_mxfp8_(model, options.quantize_head)
    else:
        mxfp8_ops.quantize_(model, lambda module, name: is_quantized(name, options.quantize_head))
    if variant == "emulation":
        compiled.emulate_(model)
    model.requires_grad_(False)
    gc.collect()
    return model


def is_quantized(name: str, head: bool) -> bool:
    """Whether a linear becomes MXFP8."""
    return head or name != "lm_head"


def randomize_(model: nn.Module, device: str) -> None:
    """Fills every matrix from one seed, in the order of the parameters."""
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, STANDARD_DEVIATION, generator=generator)


def round_to_mxfp8_(model: nn.Module, head: bool) -> None:
    """Brings the weights of linears to values that MXFP8 has."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(name, head):
            weight = module.weight
            weight.copy_(mxfp8_ops.dequant(*mxfp8_ops.quantize(weight), weight.dtype))


def cache(model: Any, options: ModelOptions, batch: int, length: int) -> Any:
    """Keys and values of ``batch`` sequences of at most ``length`` tokens, in memory that does not move."""
    config = model.config
    made = transformers.StaticCache(config=config, max_cache_len=length)
    made.early_initialization(
        batch_size=batch,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=torch.bfloat16,
        device=torch.device(options.device),
    )
    return made
