"""What consumers of ``skinny`` that stand next to each other share, without a device."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from compiling import compiled

from mxfp8_ops.gpu import skinny
from mxfp8_ops.gpu.plans import TABLE, Skinny

KINDS = pytest.mark.parametrize("kind", TABLE, ids=repr)


@KINDS
def test_a_consumer_gets_a_stage_of_its_own_group_that_all_have_left_for_the_last_time(
    monkeypatch: pytest.MonkeyPatch, kind: Skinny
) -> None:
    """A barrier's phases are counted modulo two: one of the time before would look the same as none to come."""
    waits: list[tuple[int, int, bool]] = []
    barriers = SimpleNamespace(wait=lambda stage, phase, pred: waits.append((stage, phase, pred)))
    monkeypatch.setattr(skinny, "mbarrier", barriers)
    empty = SimpleNamespace(index=lambda stage: stage)
    config = (1, kind.rows, kind.across, kind.along, kind.stages)
    consumers = list(itertools.product(range(kind.across), range(kind.along)))
    own = [skinny._own_stage(r, s, kind.along) for r, s in consumers]
    assert [stage % kind.along for stage in own] == [s for _, s in consumers]
    assert len(set(own)) == len(own)
    for steps in range(1, 30):
        waits.clear()
        for r, s in consumers:
            skinny._wait_until_left.fn((None, None, None, None, empty), steps, r, s, config)
        times = [len(range(stage, steps, kind.stages)) for stage in own]
        if kind.across > 1:  # or else nobody shares it
            assert waits == [(stage, (n - 1) & 1, n > 0) for stage, n in zip(own, times, strict=True)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
def test_a_stage_of_two_consumers_comes_in_as_many_copies_as_one_of_one(packed: bool, tmp_path: Path) -> None:
    one, two = (kind for kind in TABLE if (kind.rows, kind.along) in {(64, 1), (128, 1)})
    assert (one.across, two.across) == (1, 2)
    copies = [
        compiled(kind, packed, 4096, torch.bfloat16, False, tmp_path).ttgir.count("async_tma_copy_global_to_local")
        for kind in (one, two)
    ]
    assert copies[0] == copies[1] == 2 * (5 if packed else 4)  # the first stage, and any other one
