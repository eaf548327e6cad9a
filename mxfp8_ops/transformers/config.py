"""``Mxfp8Config``: how to quantize, load and save, and the ``quantization_config`` of a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

from transformers import FineGrainedFP8Config

from ..format import BLOCK_SIZE, check_rule
from .description import of_config, writable

QUANT_METHOD = "mxfp8_ops"
_OPTIONS = ("rule", "modules_to_not_convert", "dequant_at_load", "save_format")


class Mxfp8Config(FineGrainedFP8Config):  # whose options transformers merges into the config of a checkpoint
    """Options for ``from_pretrained(..., quantization_config=Mxfp8Config(...))``.

    With a float checkpoint they say how to quantize it, with an MXFP8 one only the last two count.

    Args:
        rule: how scales are chosen, see ``mxfp8_ops.quantize``.
        modules_to_not_convert: linears that stay as they are: names, ends or beginnings of names up to a dot, or
            wildcards ("*.mlp.*"). None is what transformers leaves, the output embedding and tied weights.
        dequant_at_load: True makes ``nn.Linear`` in the model's dtype, False and None keep the MXFP8 weights; beats
            ``MXFP8_DEQUANT_AT_LOAD`` unless None.
        save_format: what ``save_pretrained`` writes: "modelopt", "mxfp8", "fp8-1x32" or "compressed-tensors". May be
            set later, at ``model.config.quantization_config.save_format``.
        checkpoint: the ``quantization_config`` of an MXFP8 checkpoint, as it is in its config.json.

    Raises:
        ValueError: an unknown rule or format. TypeError: ``dequant_at_load`` is not a bool or None.
    """

    def __init__(
        self,
        rule: str = "rceil",
        modules_to_not_convert: list[str] | None = None,
        dequant_at_load: bool | None = None,
        save_format: str = "modelopt",
        checkpoint: dict[str, Any] | None = None,
    ) -> None:
        check_rule(rule)
        if dequant_at_load is not None and not isinstance(dequant_at_load, bool):
            raise TypeError(f"dequant_at_load must be True, False or None, got {dequant_at_load!r}")
        writable(save_format)
        super().__init__(
            quant_method=QUANT_METHOD,
            weight_block_size=(1, BLOCK_SIZE),
            scale_fmt="ue8m0",
            modules_to_not_convert=modules_to_not_convert,
        )
        self.rule = rule
        self.dequant_at_load = dequant_at_load
        self.save_format = save_format
        self.checkpoint = checkpoint

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From our own options, or from the ``quantization_config`` of an MXFP8 checkpoint.

        Raises:
            ValueError: an option that there is not, or a checkpoint that is not MXFP8.
        """
        options = {name: value for name, value in config_dict.items() if name != "quant_method"}
        if config_dict.get("quant_method") != QUANT_METHOD:
            of_config(config_dict)
            options = {"checkpoint": copy.deepcopy(config_dict)}
        unknown = sorted(options.keys() - {*_OPTIONS, "checkpoint"})
        if unknown:
            raise ValueError(f"{QUANT_METHOD} has no option {', '.join(unknown)}: use {', '.join(_OPTIONS)}")
        config = cls(**options)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mxfp8Config) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Mxfp8Config {self.to_json_string()}"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of ``from_pretrained`` changes in the config of an MXFP8 checkpoint."""
        return {"dequant_at_load": self.dequant_at_load, "save_format": self.save_format}

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: that of the checkpoint that was read or saved last, else the options."""
        if self.checkpoint is not None:
            return copy.deepcopy(self.checkpoint)
        return {"quant_method": QUANT_METHOD, **{name: copy.deepcopy(getattr(self, name)) for name in _OPTIONS}}
