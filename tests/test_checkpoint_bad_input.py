"""Damaged and dishonest checkpoints: an error that names file and tensor, nothing run, nothing half-loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    SMALL,
    assert_opens_as,
    edit_header,
    made,
    raw,
    replace_tensors,
    small,
    write_raw,
)
from dialects import EXPERTS, WRITERS, random_content
from safetensors.torch import load_file

from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint
from mxfp8_ops.checkpoint.headers import TensorInfo

Q, K = SMALL
FILE = "model.safetensors"
WEIGHT, SCALE, BIAS = f"{Q}.weight", f"{Q}.weight_scale_inv", f"{Q}.bias"
Edit = Callable[[Path], Any]


def entry(**changes: Any) -> Edit:
    """Changes what the header says of q_proj's weight."""
    return lambda file: edit_header(file, lambda header: header[WEIGHT].update(changes))


def header(text: str | bytes) -> Edit:
    return lambda file: write_raw(file, text, raw(file)[1])


def length(claimed: int) -> Edit:
    return lambda file: write_raw(file, *raw(file), length=claimed)


def resized(change: Callable[[int], int]) -> Edit:
    return lambda file: os.truncate(file, change(file.stat().st_size))


def twice(file: Path) -> None:
    parsed, data = raw(file)
    write_raw(file, json.dumps(parsed)[:-1] + f', "{WEIGHT}": {json.dumps(parsed[WEIGHT])}}}', data)


def moved(first: int, last: int) -> Edit:
    """Moves one end, or both, of q_proj's weight in the data."""

    def edit(parsed: dict[str, Any]) -> None:
        start, stop = parsed[WEIGHT]["data_offsets"]
        parsed[WEIGHT]["data_offsets"] = [start + first, stop + last]

    return lambda file: edit_header(file, edit)


NESTED = "[" * 100_000
OF_WEIGHT = rf"{FILE}: {WEIGHT}"
DAMAGE: dict[str, tuple[Edit, str]] = {
    "empty": (resized(lambda size: 0), "truncated or not safetensors: 0 bytes"),
    "seven bytes": (resized(lambda size: 7), "truncated or not safetensors: 7 bytes"),
    "only a length": (resized(lambda size: 8), "truncated or not safetensors: 8 bytes"),
    "half a header": (resized(lambda size: 500), "truncated or not safetensors: 500 bytes, a header of"),
    "a byte less": (resized(lambda size: size - 1), "truncated or damaged"),
    "half": (resized(lambda size: size // 2), "truncated or damaged"),
    "a byte more": (resized(lambda size: size + 1), "bytes of data, but the tensors take"),
    "length of 2**64 - 1": (length(2**64 - 1), "a header of 18446744073709551615 announced"),
    "length of 2**40": (length(2**40), "a header of 1099511627776 announced"),
    "length of 0": (length(0), "not JSON"),
    "length too short": (length(100), "not JSON"),
    "length too long": (length(2000), "not JSON"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not JSON"),
    "UTF-16": (header('{"a": 1}'.encode("utf-16")), "not JSON"),
    "a byte order mark": (header('\ufeff{"a": 1}'), "not JSON"),
    "a list": (header("[]"), "not a JSON object"),
    "a number": (header("1"), "not a JSON object"),
    "nothing": (header(""), "not JSON"),
    "an open brace": (header("{"), "not JSON"),
    "nested deeply": (header(NESTED), "not JSON"),
    "nested deeply in an entry": (header('{"x": ' + NESTED), "not JSON"),
    "a name twice": (twice, f"names a tensor twice: {WEIGHT} twice"),
    "a key twice": (header('{"x": {"dtype": "U8", "dtype": "U8"}}'), "dtype twice"),
    "half a surrogate pair": (
        lambda file: write_raw(file, '{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        f"{FILE}: not taken by safetensors",
    ),
    "metadata of numbers": (
        lambda file: edit_header(file, lambda each: each.update(__metadata__={"a": 1})),
        "__metadata__",
    ),
    "metadata of null": (lambda file: edit_header(file, lambda each: each.update(__metadata__=None)), "__metadata__"),
    "metadata that is a list": (
        lambda file: edit_header(file, lambda each: each.update(__metadata__=[])),
        "__metadata__",
    ),
    "an entry that is a list": (lambda file: edit_header(file, lambda each: each.update({WEIGHT: [1]})), OF_WEIGHT),
    **{
        f"dtype {dtype}": (entry(dtype=dtype), f"{OF_WEIGHT} has no known dtype")
        for dtype in ("U7", None, ["U8"], {}, 8)
    },
    **{
        f"shape {str(shape)[:30]}": (entry(shape=shape), OF_WEIGHT)
        for shape in (
            [-96, -64],
            [96.0, 64],
            [True, 6144],
            ["96", 64],
            None,
            6144,
            [95, 64],
            [6144, 1, 1, 2],
            [10**400],
        )
    },
    "shape of many numbers": (entry(shape=[2**62] * 300), OF_WEIGHT),
    "shape of 2**63": (entry(shape=[0, 2**63]), f"{OF_WEIGHT} has no proper shape"),
    **{
        f"offsets {offsets}": (entry(data_offsets=offsets), OF_WEIGHT)
        for offsets in ([], [0], [0, 1, 2], ["0", "1"], [6144, 0], [-6144, 0], None, "ab", [0.0, 6144.0], [0, 10**30])
    },
    "offsets beyond the end": (moved(10**6, 10**6), OF_WEIGHT),
    "offsets that overlap": (moved(-1, -1), f"{FILE}: .* of the data"),
    "offsets that leave a gap": (moved(1, 1), f"{FILE}: .* of the data|damaged"),
    "offsets of too much": (moved(0, 1), OF_WEIGHT),
    "a tensor less": (lambda file: edit_header(file, lambda each: each.pop(WEIGHT)), f"{FILE}: .* of the data"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, found = DAMAGE[case]
    path, content = small(tmp_path)
    assert_opens_as(path, content)
    edit(path / FILE)
    with pytest.raises(CheckpointError, match=found) as error:
        open_checkpoint(path)
    assert FILE in str(error.value)
    assert len(str(error.value)) < 1000


def test_json_of_any_depth_is_read_or_refused(tmp_path: Path) -> None:
    path, _ = small(tmp_path)
    for depth in [1, 10, 100, *range(960, 1000)]:  # what Python can just parse, and has to print
        nested = "[" * depth + "]" * depth
        write_raw(path / FILE, f'{{"x": {nested}}}')
        with pytest.raises(CheckpointError, match=FILE):
            open_checkpoint(path)


# --- tensors -------------------------------------------------------------------------------------------


Damages = dict[str, Callable[[torch.Tensor], torch.Tensor | None]]
SCALES: Damages = {
    "missing": lambda scale: None,
    "float32": lambda scale: torch.exp2(scale.view(torch.uint8).float() - 127),
    "bfloat16": lambda scale: torch.exp2(scale.view(torch.uint8).float() - 127).bfloat16(),
    "float16": lambda scale: scale.view(torch.uint8).half(),
    "int8": lambda scale: scale.view(torch.int8),
    "e4m3": lambda scale: scale.view(torch.float8_e4m3fn),
    "one column less": lambda scale: scale[:, 1:],
    "one row less": lambda scale: scale[1:],
    "one row more": lambda scale: torch.cat([scale.view(torch.uint8), scale[:1].view(torch.uint8)]).view(scale.dtype),
    "transposed": lambda scale: scale.T.contiguous(),
    "in one dimension too many": lambda scale: scale[None],
    "a single number": lambda scale: scale.flatten()[0],
    "nothing": lambda scale: scale[:, :0],
}


@pytest.mark.parametrize("name", WRITERS)
def test_wrong_scales_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path, content = small(tmp_path, name)
    checkpoint = assert_opens_as(path, content)
    refuses_each(SCALES, path, checkpoint.sources[Q].scale)


WEIGHTS: Damages = {
    "missing": lambda weight: None,
    "bytes": lambda weight: weight.view(torch.uint8),
    "int8": lambda weight: weight.view(torch.int8),
    "e5m2": lambda weight: weight.view(torch.float8_e5m2),
    "bfloat16": lambda weight: weight.bfloat16(),
    "in one dimension": lambda weight: weight.flatten(),
    "transposed": lambda weight: weight.T.contiguous(),
    "two blocks less": lambda weight: weight[:, 64:],
    "half of the rows": lambda weight: weight[:48],
    "nothing": lambda weight: weight[:0],
}


@pytest.mark.parametrize("name", WRITERS)
def test_wrong_weights_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path, content = made(tmp_path, name, random_content(layers={Q: (512, 160), K: (512, 160)}))
    checkpoint = assert_opens_as(path, content)
    refuses_each(WEIGHTS, path, checkpoint.sources[Q].weight)


def refuses_each(damages: Damages, path: Path, info: TensorInfo) -> None:
    whole, tensor = info.file.read_bytes(), load_file(info.file)[info.name]
    for name, damage in damages.items():
        info.file.write_bytes(whole)
        replace_tensors(info.file, {info.name: damage(tensor)})
        with pytest.raises(CheckpointError, match=Q) as error:
            raise AssertionError(f"{name} is taken: {open_checkpoint(path)}")
        assert path.name in str(error.value), name


ONE = torch.zeros(96, 2, dtype=torch.uint8)
TENSORS: dict[str, tuple[str, dict[str, torch.Tensor | None], str]] = {
    "a scale of no weight": (
        "mxfp8",
        {"x.weight_scale_inv": ONE},
        r"x\.weight_scale_inv .* there is no x\.weight that",
    ),
    "a scale of a dense weight": ("mxfp8", {"lm_head.weight_scale_inv": ONE}, r"lm_head\.weight \(BF16 .*not F8_E4M3"),
    "e8m0 of no weight": ("modelopt", {"x.y": ONE.view(torch.float8_e8m0fnu)}, r"belong to no weight: x\.y \(F8_E8M0"),
    "e4m3 without scales": ("modelopt", {"x.weight": ONE.view(torch.float8_e4m3fn)}, r"no scales .* for x\.weight"),
    "e5m2 without scales": ("modelopt", {"x.weight": ONE.view(torch.float8_e5m2)}, r"no scales .* for x\.weight"),
    "e8m0 under a format of bytes": (
        "modelopt",
        {f"{Q}.weight_scale": torch.full((96, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        rf"{Q}\.weight_scale \(F8_E8M0 .*must be E8M0 bytes, as U8",
    ),
    "two scales": ("fp8-32x32", {f"{Q}.scale": ONE[:3]}, rf"two tensors claim the layer {Q}: .*scale.*scale"),
    "two scales for one weight": (
        "modelopt",
        {f"{Q}.weight_weight_scale": ONE},
        rf"{Q}\.weight is part of two layers: ",
    ),
    "a bias of other rows": ("mxfp8", {BIAS: torch.zeros(95)}, rf"{BIAS} \(F32 \[95\] .* must be .*\[96\]"),
    "a bias of two dimensions": ("mxfp8", {BIAS: torch.zeros(96, 1)}, rf"{BIAS} \(F32 \[96, 1\] .* must be .*\[96\]"),
    "a bias of bytes": ("mxfp8", {BIAS: ONE[:, 0]}, rf"{BIAS} \(U8 \[96\] .* must be F32 or BF16 or F16 \[96\]"),
    "a bias of e4m3": ("mxfp8", {BIAS: ONE[:, 0].view(torch.float8_e4m3fn)}, rf"{BIAS} \(F8_E4M3"),
    "packed FP4 experts": (
        "fp8-32x32-scale",
        {"e.w1.weight": ONE.view(torch.int8), "e.w1.scale": ONE},
        r"e\.w1\.weight .* is FP4",
    ),
    "a marker of floats": ("comfyui", {f"{Q}.comfy_quant": torch.zeros(5)}, r"comfy_quant \(F32 .* must be the bytes"),
    "a long marker": ("comfyui", {f"{Q}.comfy_quant": torch.zeros(99999, dtype=torch.uint8)}, "must be the bytes of"),
    "a marker of zeros": ("comfyui", {f"{Q}.comfy_quant": ONE[0]}, "comfy_quant .* is not JSON"),
    "a marker nested deeply": (
        "comfyui",
        {f"{Q}.comfy_quant": torch.full((60000,), ord("["), dtype=torch.uint8)},
        "comfy_quant .* is not JSON",
    ),
    "a marker that is a list": (
        "comfyui",
        {f"{Q}.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
        "comfy_quant .* must be a JSON object",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, changes, found = TENSORS[case]
    path, content = small(tmp_path, name)
    assert_opens_as(path, content)
    replace_tensors(next(path.glob("*.safetensors")), changes)
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path)


@pytest.mark.parametrize("name", WRITERS)
def test_scales_that_were_never_written_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path, content = small(tmp_path, name)
    checkpoint = assert_opens_as(path, content)
    scale = checkpoint.sources[Q].scale
    zeros = torch.zeros_like(checkpoint.files.read(scale.name).view(torch.uint8))
    replace_tensors(scale.file, {scale.name: zeros.view(checkpoint.files.read(scale.name).dtype)})
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=rf"{Q}\..*all scales are 0 although {Q}"):
        checkpoint[Q]
    assert checkpoint[K].scale.any()


def test_scales_of_one_expert_that_were_never_written_are_refused(tmp_path: Path) -> None:
    content = random_content(layers=EXPERTS)
    layer, other = content.layers.values()
    layer.scale[1] = 0
    other.scale[1] = 0
    other.weight.view(torch.uint8)[1] = 0x80  # -0 has no need of a scale
    checkpoint = open_checkpoint(made(tmp_path, "mxfp8", content)[0])
    bad, good = content.layers
    with pytest.raises(CheckpointError, match=f"{bad}_scale_inv .*all scales are 0"):
        checkpoint[bad]
    assert not checkpoint[good].scale[1].any()


def test_some_scales_of_0_are_scales(tmp_path: Path) -> None:
    content = random_content(layers=SMALL, scale_bytes=range(2))
    assert_opens_as(*made(tmp_path, "mxfp8", content))
