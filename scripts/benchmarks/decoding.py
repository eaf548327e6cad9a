"""Sections ``model`` and ``trace``: one variant of the whole model decodes, and one step of it is profiled."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lowering import report

from . import compiled, llama, trace
from .model_options import ModelOptions
from .options import Record

REFERENCE = "bf16"
"""The variant with which others are compared: plain linears on dequantized weights."""
SEED = 1
MULTIPLE = 64
"""Of places in the cache, so that attention finds aligned masks."""


def records(options: ModelOptions, variant: str, sections: Sequence[str], folder: str) -> Iterator[tuple[str, Record]]:
    """One record for each batch size, and one of a step of the first."""
    model = llama.build(options, variant)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = options.batches if "model" in sections else options.batches[:1]
    for batch in batches:
        decoder = Decoder.compile(model, options, variant, batch)
        if "model" in sections:
            size = linear_bytes(model, decoder.graphs)
            result = decode(decoder, options)
            agreement = compare(result, variant, Path(folder) / f"reference-{batch}.pt")
            yield (
                "model",
                {"variant": variant + ", lm_head too" * options.quantize_head, "batch": batch}
                | timing(result, batch)
                | {"compile_s": decoder.seconds, "cudagraph_skips": decoder.skips, "linear_bytes": size}
                | (memory() if on_gpu else {})
                | {"agreement": agreement},
            )
        if "trace" in sections and batch == batches[0]:
            decoder.cache.reset()
            yield "trace", {"variant": variant, "batch": batch} | trace.profiled(decoder.advance, Path(folder))
        del decoder  # and, with the compiled step, its cache and CUDA graphs
        torch.compiler.reset()
        gc.collect()


@dataclass
class Decoder:
    """A compiled decode step on a static cache.

    Attributes:
        step: takes token ids ``[batch, 1]``, gives the next ones and the logits ``[batch, vocabulary]``.
        graphs: reports of the backend, none in variants that do not use it.
        seconds: until the first step was compiled and run. skips: graphs that are no CUDA graphs.
    """

    step: Callable[[Tensor], tuple[Tensor, Tensor]]
    cache: Any
    tokens: Tensor
    graphs: list[report.GraphReport]
    seconds: float
    skips: int

    @staticmethod
    def compile(model: Any, options: ModelOptions, variant: str, batch: int) -> Decoder:
        length = math.ceil((options.prompt + 1 + options.steps) / MULTIPLE) * MULTIPLE
        cache = llama.cache(model, options, batch, length)
        tokens = torch.randint(
            model.config.vocab_size, (options.prompt + 1, batch, 1), generator=torch.Generator().manual_seed(SEED)
        ).to(options.device)

        def step(token: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            return logits.argmax(-1, keepdim=True), logits

        counters.clear()
        function = compiled.compile_as(variant, step, options.device == "cuda", release_quantized=True)
        started = time.monotonic()
        with report.collect() as graphs:
            function(tokens[0])
            synchronize(options)
        seconds = round(time.monotonic() - started, 2)
        decoder = Decoder(function, cache, tokens, graphs, seconds, 0)
        for _ in range(compiled.WARM_UP):
            decoder.advance()
        decoder.skips = compiled.cudagraph_skips()
        return decoder

    def advance(self) -> Tensor:
        """One step, of the first token of the prompt."""
        return self.next(self.tokens[0])[0]

    def next(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens, a copy, and the logits, which are gone after the next step."""
        torch.compiler.cudagraph_mark_step_begin()
        following, logits = self.step(token)
        return following.clone(), logits


@dataclass(frozen=True)
class Result:
    """What was decoded: seconds of each repeat, logits of the first step ``[batch, vocabulary]``, tokens of all."""

    seconds: list[float]
    logits: Tensor
    tokens: Tensor


def decode(decoder: Decoder, options: ModelOptions) -> Result:
    """The prompt token by token, of which the last one gives the logits, then as many greedy steps as are timed."""
    seconds = []
    for _ in range(options.repeats):
        decoder.cache.reset()
        for given in decoder.tokens:
            token, first = decoder.next(given)
        logits, decoded = first.float().cpu(), [token]
        synchronize(options)
        started = time.monotonic()
        for _ in range(options.steps):
            token, _ = decoder.next(token)
            decoded.append(token)
        synchronize(options)
        seconds.append(time.monotonic() - started)
    return Result([each / options.steps for each in seconds], logits, torch.cat(decoded, 1).cpu())


def synchronize(options: ModelOptions) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def timing(result: Result, batch: int) -> Record:
    """Of a step: the median of all repeats, their spread, and tokens a second of all sequences."""
    ms = [each * 1000 for each in result.seconds]
    median = statistics.median(ms)
    return {
        "ms": round(median, 4),
        "ms_range": [round(min(ms), 4), round(max(ms), 4)],
        "tokens_per_s": round(batch * 1000 / median, 1),
    }


def memory() -> Record:
    """Bytes that torch has now, and had at most since the model was there."""
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}


def linear_bytes(model: nn.Module, graphs: Sequence[report.GraphReport]) -> int:
    """Bytes held for the weights of linears, lm_head included."""
    held = sum(weight.bytes_after for weight in report.distinct(graphs))
    kinds = (nn.Linear,) if graphs else (nn.Linear, compiled.EmulatedLinear)
    for module in model.modules():
        if isinstance(module, kinds):
            held += sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return held


def compare(result: Result, variant: str, path: Path) -> Record | None:
    """How a variant agrees with the reference, which stores what it decoded; None without one."""
    if variant == REFERENCE:
        torch.save((result.logits, result.tokens), path)
        return None
    if not path.exists():
        return None
    logits, tokens = torch.load(path)
    same = (result.tokens == tokens).cumprod(1).sum(1)
    return {
        "logits_difference": float((result.logits - logits).abs().max()),
        "logits_largest": float(logits.abs().max()),
        "first_token": float((result.tokens[:, 0] == tokens[:, 0]).float().mean()),
        "same_tokens": round(float(same.float().mean()), 1),
        "tokens": tokens.shape[1],
    }
