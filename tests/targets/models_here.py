"""Factories that can be inspected."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import mxfp8_ops


def packed(n, k, seed):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return mxfp8_ops.Mxfp8Linear.from_float(weight.bfloat16())


def two_layers():  # nothing that Inductor would need a C++ compiler for
    return nn.Sequential(packed(96, 64, 1), packed(32, 96, 2)), (torch.ones(8, 64, dtype=torch.bfloat16),)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.s = map(nn.Buffer, mxfp8_ops.quantize(torch.ones(32, 64)))
        self.fc = packed(64, 32, 3)

    def forward(self, x):
        return self.fc(x @ mxfp8_ops.dequant(self.w, self.s, x.dtype).T)


def by_hand():
    return ByHand(), {"x": torch.ones(4, 64).bfloat16()}


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = packed(64, 64, 4), packed(32, 64, 5)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def breaking():
    return Breaking(), (torch.ones(8, 64, dtype=torch.bfloat16),)


def no_mxfp8():
    return nn.Linear(64, 32), [torch.randn(2, 64)]


def wrong_shape():
    return two_layers()[0], (torch.randn(3, 5),)
