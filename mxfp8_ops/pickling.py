"""Parameters of float8 weights and of packed ones in pickles, where plain pickle could not keep them."""

from __future__ import annotations

import copy
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import functional
from .format import ELEMENT_DTYPE
from .packing import packed_for


class PickledWeight:
    """Stands for a Parameter in a module's state: plain pickle cannot take a float8 tensor, so its bytes go. One for
    each Parameter, so that pickle's memo keeps a weight shared that several layers share.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = ref(weight)

    @classmethod
    def of(cls, weight: Tensor) -> object:
        if weight.dtype != ELEMENT_DTYPE:
            return weight
        return _pickled.setdefault(weight, cls(weight))

    def parameter(self) -> Tensor:
        weight = self.weight()
        assert weight is not None  # the module whose state this is holds it
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.parameter(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_weight, (self.parameter().detach().view(torch.uint8),)


class PickledPacked(PickledWeight):
    """Stands for the Parameter of a packed weight ``[n, k]``. Pickles hold what was packed: the packed layout may
    change from one version of this package to the next, and a pickle outlives that.
    """

    def __init__(self, packed: Tensor, n: int, k: int) -> None:
        super().__init__(packed)
        self.n, self.k = n, k

    @classmethod
    def of_layer(cls, packed: Tensor, n: int, k: int) -> object:
        return _pickled.setdefault(packed, cls(packed, n, k))

    def __reduce__(self) -> tuple[Any, ...]:
        weight, scale = functional.unpack(self.parameter().detach(), self.n, self.k)
        return _unpickle_packed, (weight.view(torch.uint8), scale, packed_for(self.parameter()))


_pickled = WeakIdKeyDictionary()


def _unpickle_weight(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data.view(ELEMENT_DTYPE), requires_grad=False)


def _unpickle_packed(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(functional.pack(data.view(ELEMENT_DTYPE), scale, dtype), requires_grad=False)
