"""Which weights of an unquantized checkpoint are those of linears, which the checkpoint itself does not say.

Where transformers knows the architecture, the model, built without memory, says it. Names decide otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...convert import linears_to_leave
from ..documents import CONFIG
from ..names import wildcards

NOT_LINEAR = {
    "an embedding, by its name": (
        "*embed*", "*_emb", "*_emb.*", "*wte", "*wpe", "shared", "*.shared", "*relative_attention_bias",
    ),
    "a norm, by its name": ("*norm*", "ln_*", "*.ln_*"),
    "perhaps a Conv1D, [K, N], by its name": ("*.c_attn", "*.c_fc", "*.c_proj"),
}  # fmt: skip
"""Wildcards for names of modules with a matrix that is, or may be, no linear's; only where no model tells."""

SENSITIVE = {
    "it computes the output": (
        "lm_head", "*.lm_head", "output", "output_layer", "proj_out", "classifier", "*.classifier", "score", "*.score",
        "qa_outputs",
    ),
    "a router of experts": ("*router*", "gate", "*.gate", "*shared_expert_gate"),
}  # fmt: skip
"""Wildcards for names of linears that lose more by MXFP8 than they are worth: small, or last."""

_EMBEDDINGS = (
    "embed_tokens", "*.embed_tokens", "wte", "*.wte", "wpe", "*.wpe", "*word_embeddings", "*position_embeddings",
    "*token_type_embeddings", "*tok_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Linears:
    """What is known of the modules of a model.

    Attributes:
        how: how it is known, in a line.
        modules: for each module with a weight why it is no linear to quantize, "" where it is one. Empty: names decide.
        prefix: of names in the model which the checkpoint may lack, or the other way round.
        embeddings: the modules that are no linears for anybody.
        absent: linears whose weight is tied to another tensor, so that the checkpoint may not have them.
    """

    how: str
    modules: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    embeddings: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ("lm_head",)

    def why_not(self, layer: str) -> str:
        """Why ``layer`` is not to be quantized; "" where it is."""
        name = self._in_model(layer)
        reason = _first(NOT_LINEAR, layer) if name is None else self.modules[name]
        return reason or _first(SENSITIVE, layer)

    def is_embedding(self, layer: str) -> bool:
        """Whether ``layer`` is certainly an embedding."""
        name = self._in_model(layer)
        return wildcards(layer, _EMBEDDINGS) if name is None else name in self.embeddings

    def _in_model(self, layer: str) -> str | None:
        names = (layer, f"{self.prefix}.{layer}", layer.removeprefix(f"{self.prefix}."))
        return next((name for name in names if name in self.modules), None)


def by_names(why: str) -> Linears:
    """Names decide, because of ``why``."""
    return Linears(f"linears were told by their names ({why})")


def linears_of(folder: Path, config: Mapping[str, Any]) -> Linears:
    """From the architecture in config.json, if there is one, transformers is installed and knows it. Code of the
    checkpoint is never run.
    """
    if not (folder / CONFIG).is_file() or not (config.get("architectures") or config.get("model_type")):
        return by_names(f"{CONFIG} names no architecture")
    try:
        model = _on_meta(folder, config)
    except Exception as error:  # whatever an unknown or broken config makes of it
        return by_names(
            f"no model can be built: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}"
        )
    return of_model(model)


def of_model(model: nn.Module) -> Linears:
    """From a model of transformers, which may be on the meta device."""
    linears: dict[nn.Linear, str] = {each: name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    left = linears_to_leave(model, linears)
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules[name] = left.get(module, "")
        elif isinstance(module._parameters.get("weight"), nn.Parameter):
            modules[name] = f"{type(module).__name__}, not Linear"
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return Linears(
        f"linears were told by {type(model).__name__} of transformers",
        modules,
        str(getattr(model, "base_model_prefix", "")),
        frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Embedding)),
        tuple(name.removesuffix(".weight") for name in tied if name.removesuffix(".weight") in linears.values()),
    )


def _on_meta(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when it is imported: nothing is asked of a hub
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        described = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
        known = [getattr(transformers, name) for name in names if isinstance(getattr(transformers, name, None), type)]
        with torch.device("meta"):
            for architecture in known:
                if issubclass(architecture, transformers.PreTrainedModel):
                    return architecture(described)
            return transformers.AutoModel.from_config(described, trust_remote_code=False)
    finally:
        transformers.utils.logging.set_verbosity(level)


def _first(reasons: Mapping[str, tuple[str, ...]], layer: str) -> str:
    return next((reason for reason, patterns in reasons.items() if wildcards(layer, patterns)), "")
