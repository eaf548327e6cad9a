"""Tensor parallelism: which part of a linear a rank has, and the sum over ranks where K is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn

from ...format import BLOCK_SIZE
from ..values import EVERYTHING

COLUMN, ROW = "colwise", "rowwise"


@dataclass(frozen=True)
class TensorParallel:
    """A plan for splitting the linears of a model over the ranks of a process group.

    Attributes:
        plan: patterns for module names (``*`` stands for anything) to "colwise", which splits N, so that each rank has
            a part of the outputs, or "rowwise", which splits K: each rank takes a part of x, and outputs are summed up
            over the ranks. Modules that no pattern names are whole on every rank. transformers' plans look the same.
        group: the ranks; None takes the default process group.
    """

    plan: Mapping[str, str]
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        unknown = set(self.plan.values()) - {COLUMN, ROW}
        if unknown:
            raise ValueError(f"a tensor-parallel plan may say {COLUMN!r} or {ROW!r}, got {sorted(unknown)}")

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def style(self, module: str) -> str | None:
        """How ``module`` is split, by the first pattern that is its name; None where it is whole."""
        return next((style for pattern, style in self.plan.items() if fnmatchcase(module, pattern)), None)

    def part(self, module: str, shape: tuple[int, ...], block: int = BLOCK_SIZE) -> tuple[slice, slice]:
        """The rows of N and columns of K that this rank has of the weight ``shape = [N, K]`` of a linear ``module``.

        Raises:
            ValueError: N cannot be divided by the number of ranks, or K not into whole blocks of ``block``.
        """
        style, (n, k) = self.style(module), shape[-2:]
        if style == COLUMN:
            return self._share(n, 1, f"the {n} rows of {module}"), EVERYTHING
        if style == ROW:
            return EVERYTHING, self._share(k, block, f"K = {k} of {module}")
        return EVERYTHING, EVERYTHING

    def _share(self, length: int, unit: int, what: str) -> slice:
        if length % (self.ranks * unit):
            blocks = f" into whole blocks of {unit}, which share a scale," if unit > 1 else ""
            raise ValueError(f"{what} cannot be split{blocks} over {self.ranks} ranks")
        each = length // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)

    def finish(self, name: str, module: nn.Module) -> None:
        """Makes ``module`` sum up its outputs over the ranks, if it is split along K."""
        if self.style(name) == ROW:
            module.register_forward_hook(_SumOverRanks(self.group or dist.group.WORLD))


@dataclass(frozen=True)
class _SumOverRanks:
    group: Any

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(output, "sum", self.group))
