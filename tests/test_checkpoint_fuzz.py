"""Checkpoints damaged at random: each gives exactly the right bits or a CheckpointError, whatever the damage."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import made, raw
from dialects import WRITERS, Content, random_content
from helpers import assert_same

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mxfp8_ops.checkpoint import Checkpoint, CheckpointError, open_checkpoint  # noqa: E402

LAYERS = {"a.q_proj": (64, 64), "a.k_proj": (40, 32), "b.down_proj": (32, 160)}
QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=40)
HEADERS = ("modelopt", "mxfp8", "fp8-32x32-scale", "modelslim", "comfyui", "comfyui-metadata", "torchao-swizzled")
DESCRIPTIONS = {"modelslim": "quant_model_description.json", "modelopt-hf-quant-config": "hf_quant_config.json"}
DESCRIBED = [name for name in WRITERS if "comfyui" not in name and name not in ("fp8-32x32-u8", "torchao-swizzle-type")]

LEAVES = (None, True, False, -1, 0, 1, 4, 16, 31, 33, 64, 128, 2**31, 2**63, 2**64, 10**40, -1.5, 1e300)
WORDS = (
    "",
    "U8",
    "F8_E4M3",
    "F8_E8M0",
    "BF16",
    "F32",
    "MXFP8",
    "FP8",
    "mxfp8",
    "fp8",
    "quark",
    "re:(",
    "../x.safetensors",
)
JSON = st.recursive(
    st.sampled_from(LEAVES) | st.sampled_from(WORDS) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
Check = Callable[[Checkpoint], object]


class Made:
    """One checkpoint of each format: a damaged file of it is mended at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, int], tuple[Path, Content]] = {}

    def get(self, name: str, shards: int = 1) -> tuple[Path, Content]:
        if (name, shards) not in self.made:
            content = random_content(layers=LAYERS)
            content.plain["c"] = content.plain.pop("lm_head.weight")[:2, :3].clone()
            self.made[name, shards] = made(self.folder / f"{name}-{shards}", name, content, shards)
        return self.made[name, shards]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("fuzz"))


def tries(path: Path, file: Path, damaged: bytes, check: Check) -> bool:
    """Opens and reads a checkpoint with ``damaged`` in a file of it; whether a CheckpointError, which names the
    checkpoint, has stopped us. Any other exception is for pytest.
    """
    whole = file.read_bytes()
    file.write_bytes(damaged)
    try:
        check(open_checkpoint(path))
    except CheckpointError as error:
        assert path.name in str(error) or file.name in str(error)  # noqa: PT017
        return True
    finally:
        file.write_bytes(whole)
    return False


def layers_are_right(content: Content, hit: str | None = None) -> Check:
    """Every layer that comes back, but for one that is ``hit``. There may be fewer biases and other tensors, whose
    names can be damaged without a trace.
    """

    def check(checkpoint: Checkpoint) -> None:
        assert checkpoint.keys() == content.layers.keys()
        for name, layer in content.layers.items():
            weight, scale, bias = checkpoint[name]
            if hit is None or not hit.startswith(name):
                assert_same(weight, layer.weight)
                assert_same(scale, layer.scale)
                assert bias is None or layer.bias is not None
        for name in checkpoint.plain:
            checkpoint.files.read(name)

    return check


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in JSON something can be replaced: paths of keys and positions."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """JSON with ``new`` at ``path``: instead of what is there, as one more key, or nothing any more."""
    if not path:
        return {**value, "x": new} if how == "add" and isinstance(value, dict) else new
    key, *rest = path
    changed = copy.copy(value)
    if how == "remove" and not rest:
        del changed[key]
    else:
        changed[key] = replaced(value[key], tuple(rest), new, how)
    return changed


HOW = st.sampled_from(["replace", "replace", "remove", "add"])


# --- bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
def test_any_bytes_of_a_header_may_be_others(checkpoints: Made, name: str) -> None:
    path, content = checkpoints.get(name)
    (file,) = path.glob("*.safetensors")
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little") + 8

    @QUICK
    @given(st.integers(0, length - 1), st.binary(min_size=1, max_size=4))
    def damage(where: int, new: bytes) -> None:
        tries(path, file, whole[:where] + new + whole[where + len(new) :], layers_are_right(content))

    damage()


@pytest.mark.parametrize("name", HEADERS)
def test_a_bit_of_the_data_changes_its_own_tensor_only(checkpoints: Made, name: str) -> None:
    path, content = checkpoints.get(name)
    (file,) = path.glob("*.safetensors")
    header, data = raw(file)
    header.pop("__metadata__")
    ends = sorted((entry["data_offsets"][1], tensor) for tensor, entry in header.items())
    start = file.stat().st_size - len(data)
    whole = file.read_bytes()

    @QUICK
    @given(st.integers(0, len(data) - 1), st.integers(0, 7))
    def damage(where: int, bit: int) -> None:
        damaged = bytearray(whole)
        damaged[start + where] ^= 1 << bit
        hit = next(tensor for end, tensor in ends if where < end)
        refused = tries(path, file, bytes(damaged), layers_are_right(content, hit))
        assert not refused or hit.endswith(".comfy_quant")

    damage()


def test_every_truncation_is_refused(checkpoints: Made) -> None:
    path, content = checkpoints.get("mxfp8")
    whole = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little") + 8
    for end in (*range(0, length + 20, 3), *range(length + 20, len(whole), 499), len(whole) - 1):
        assert tries(path, path / "model.safetensors", whole[:end], layers_are_right(content))


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_are_no_checkpoint(checkpoints: Made, junk: bytes) -> None:
    path, content = checkpoints.get("mxfp8")
    for file in (path / "model.safetensors", path / "config.json"):
        assert tries(path, file, junk, layers_are_right(content))
    padded = len(junk).to_bytes(8, "little") + junk
    assert tries(path, path / "model.safetensors", padded, layers_are_right(content))


# --- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
def test_any_entry_of_a_header_may_be_another(checkpoints: Made, name: str) -> None:
    path, content = checkpoints.get(name)
    (file,) = path.glob("*.safetensors")
    header, data = raw(file)
    where = list(places(header))

    @QUICK
    @given(st.sampled_from(where), JSON, HOW)
    def damage(at: tuple[Any, ...], new: Any, how: str) -> None:
        text = json.dumps(replaced(header, at, new, how)).encode()
        tries(path, file, len(text).to_bytes(8, "little") + text + data, layers_are_right(content))

    damage()


@pytest.mark.parametrize("name", ["comfyui-metadata", "torchao", "torchao-swizzled", "torchao-swizzle-type"])
def test_any_part_of_the_json_in_metadata_may_be_another(checkpoints: Made, name: str) -> None:
    path, content = checkpoints.get(name)
    (file,) = path.glob("*.safetensors")
    header, data = raw(file)
    metadata = {key: json.loads(text) for key, text in header["__metadata__"].items() if key != "format"}
    where = [at for at in places(metadata) if at]

    @QUICK
    @given(st.sampled_from(where), JSON, HOW)
    def damage(at: tuple[Any, ...], new: Any, how: str) -> None:
        texts = {key: json.dumps(value) for key, value in replaced(metadata, at, new, how).items()}
        text = json.dumps(header | {"__metadata__": texts}).encode()
        tries(path, file, len(text).to_bytes(8, "little") + text + data, layers_are_right(content))

    damage()


@pytest.mark.parametrize("name", ["mxfp8", "modelslim"])
def test_any_part_of_an_index_may_be_another(checkpoints: Made, name: str) -> None:
    path, content = checkpoints.get(name, shards=3)
    (file,) = path.glob("*.index.json")
    index = json.loads(file.read_text())
    where = list(places(index))

    @QUICK
    @given(st.sampled_from(where), JSON, HOW)
    def damage(at: tuple[Any, ...], new: Any, how: str) -> None:
        tries(path, file, json.dumps(replaced(index, at, new, how)).encode(), layers_are_right(content))

    damage()


@pytest.mark.parametrize("name", DESCRIBED)
def test_any_part_of_a_config_may_be_another(checkpoints: Made, name: str) -> None:
    """But for Quark's R of blocks of [R, 32]: another R that fits every layer is another checkpoint."""
    path, content = checkpoints.get(name)
    file = path / DESCRIPTIONS.get(name, "config.json")
    config = json.loads(file.read_text())
    where = [at for at in places(config) if "block_size" not in at]

    @QUICK
    @given(st.sampled_from(where), JSON, HOW)
    def damage(at: tuple[Any, ...], new: Any, how: str) -> None:
        tries(path, file, json.dumps(replaced(config, at, new, how)).encode(), layers_are_right(content))

    damage()
