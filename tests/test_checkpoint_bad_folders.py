"""Folders that are not what they should be: indices that lie or lead elsewhere, missing shards, pickles, bad JSON."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, SMALL, assert_opens_as, edit_json, replace_tensors, small, write_raw
from dialects import Content

from mxfp8_ops.checkpoint import CheckpointError, open_checkpoint

Q, K = SMALL
FILE = "model.safetensors"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
Edit = Callable[[Path], Any]


def refuses(path: Path, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path)


# --- the index -----------------------------------------------------------------------------------------


def placed(where: object) -> Edit:
    """An index that says where q_proj's weight is."""
    return lambda folder: edit_json(folder / INDEX, lambda each: each["weight_map"].update({f"{Q}.weight": where}))


def index(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / INDEX, lambda each: each.update(changes))


ELSEWHERE = (
    *("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "./x.safetensors", "..\\x.safetensors", "..", "."),
    *("C:\\x.safetensors", "", "x.bin", "pytorch_model.bin", "x.safetensors\n", "x.safetensors/", "../", "~"),
    *(None, 1, 1.5, True, [], ["x.safetensors"], {}, {"file": "x.safetensors"}),
)
INDICES: dict[str, tuple[Edit, str]] = {
    "a missing shard": (lambda folder: (folder / SHARDS[1]).unlink(), rf"{SHARDS[1]}: no such file"),
    "a shard under another name": (
        lambda folder: (folder / SHARDS[1]).rename(folder / "x.safetensors"),
        "no such file",
    ),
    "a wrong shard": (placed(SHARDS[2]), rf"{INDEX}: {Q}\.weight is said to be in {SHARDS[2]}, but is in {SHARDS[0]}"),
    "a shard that is not there": (placed("x.safetensors"), r"x\.safetensors: no such file"),
    "a shard with a name that cannot be": (placed("\0.safetensors"), "no such file"),
    "a shard with half a surrogate pair": (placed("\ud800.safetensors"), "no such file"),
    "a shard with a long name": (placed("x" * 5000 + ".safetensors"), "name too long"),
    "a tensor that is not there": (
        lambda folder: edit_json(folder / INDEX, lambda each: each["weight_map"].update({"x.y": SHARDS[0]})),
        rf"{INDEX}: x\.y is said to be in {SHARDS[0]}, but is in no file",
    ),
    "a tensor that is not listed": (
        lambda folder: edit_json(folder / INDEX, lambda each: each["weight_map"].pop(f"{Q}.weight")),
        rf"{INDEX}: tensors that the index does not list: {Q}\.weight",
    ),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX}: weight_map must be an object"),
    "an empty map": (index(weight_map={}), f"{INDEX}: weight_map must be an object"),
    "a list": (index(weight_map=[SHARDS[0]]), f"{INDEX}: weight_map must be an object"),
    "a text": (index(weight_map=SHARDS[0]), f"{INDEX}: weight_map must be an object"),
    "not JSON": (lambda folder: (folder / INDEX).write_text('{"weight_map":'), f"{INDEX}: not readable as JSON"),
    "not UTF-8": (lambda folder: (folder / INDEX).write_bytes(b'{"\xff": 1}'), f"{INDEX}: not readable as JSON"),
    "nested deeply": (lambda folder: (folder / INDEX).write_text("[" * 100_000), f"{INDEX}: not readable as JSON"),
    "a JSON list": (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX}: a JSON object is expected, got list"),
    "two of them": (
        lambda folder: (folder / "x.safetensors.index.json").write_text((folder / INDEX).read_text()),
        rf"more than one index: {INDEX}, x\.safetensors\.index\.json",
    ),
    "a tensor in two shards": (
        lambda folder: replace_tensors(folder / SHARDS[1], {f"{Q}.weight": torch.zeros(3)}),
        rf"{Q}\.weight is in two files: {SHARDS[0]} and {SHARDS[1]}",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    edit, found = INDICES[case]
    path, content = small(tmp_path, shards=3)
    assert_opens_as(path, content)
    edit(path)
    refuses(path, found)


def test_an_index_leads_nowhere_but_to_files_beside_it(tmp_path: Path) -> None:
    path, _ = small(tmp_path / "a" / "b", shards=3)
    for target in (path.parent / "x.safetensors", path / "sub" / "x.safetensors"):
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((path / SHARDS[0]).read_bytes())
    for where in ELSEWHERE:
        placed(where)(path)
        refuses(
            path, rf"{INDEX}: {Q}\.weight is said to be in .*, which is not the name of a \.safetensors file beside"
        )


def test_one_of_two_indices_may_be_asked_for(tmp_path: Path) -> None:
    path, content = small(tmp_path, shards=3)
    (path / "x.safetensors.index.json").write_text("{}")
    assert_opens_as(path / INDEX, content)
    refuses(path / "x.safetensors.index.json", "weight_map must be an object")


# --- files ---------------------------------------------------------------------------------------------


def test_shards_without_an_index_are_read_when_all_are_there(tmp_path: Path) -> None:
    path, content = small(tmp_path, shards=3)
    (path / INDEX).unlink()
    assert_opens_as(path, content)
    replace_tensors(path / SHARDS[0], dict.fromkeys([f"{Q}.weight"], torch.zeros(3)))
    replace_tensors(path / SHARDS[1], dict.fromkeys([f"{Q}.weight"], torch.zeros(3)))
    refuses(path, rf"{Q}\.weight is in two files")


@pytest.mark.parametrize("missing", SHARDS)
def test_a_missing_shard_is_missed_without_an_index(tmp_path: Path, missing: str) -> None:
    path, _ = small(tmp_path)
    (path / FILE).rename(path / next(each for each in SHARDS if each != missing))
    write_raw(path / next(each for each in reversed(SHARDS) if each != missing), {})
    there = ", ".join(each[6:11] for each in SHARDS if each != missing)
    refuses(path, rf"of the 3 files model-\*-of-00003\.safetensors there are only {there}")


def test_shards_may_be_links_to_files_elsewhere_as_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    path, content = small(tmp_path / "snapshot", shards=3)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(path.iterdir()):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..", "blobs", str(number)))
    assert_opens_as(path, content)
    (tmp_path / "blobs" / str(number)).unlink()
    refuses(path, f"{file.name}: no such file")


@pytest.mark.parametrize("name", [FILE, "config.json", "hf_quant_config.json"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path, _ = small(tmp_path)
    (path / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir):
        make(path / name)
        seen: list[Exception] = []
        thread = threading.Thread(target=lambda path, seen: seen.append(error_of(path)), args=(path, seen), daemon=True)
        thread.start()
        thread.join(20)
        assert f"{name}: no such file, or no regular one" in str(seen)
        os.rename(path / name, path / f"{make.__name__}.was")


def error_of(path: Path) -> Exception:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return error.value


def test_a_config_that_is_a_link_to_nothing_is_missed(tmp_path: Path) -> None:
    path, _ = small(tmp_path)
    for name in ("hf_quant_config.json", "config.json"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("nothing")
        refuses(path, f"{name}: no such file")
        (path / name).unlink()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    refuses(tmp_path / "x", "x: no such file or folder")
    refuses(tmp_path, r"no \.safetensors file, found $")
    (tmp_path / "README.md").write_text("")
    refuses(tmp_path, r"no \.safetensors file, found README\.md")
    refuses(tmp_path / "README.md", r"README\.md: truncated or not safetensors")
    write_raw(tmp_path / FILE, {})
    assert_opens_as(tmp_path, Content({}))


def test_odd_names_are_names(tmp_path: Path) -> None:
    names = [
        "",
        " ",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "é\u4e2d\U0001f600",
        "\n",
        "a\0b",
        "x" * 2000,
        "%s{}",
        "-1",
        "None",
    ]
    content = Content({}, {name: torch.full((2,), float(number)) for number, name in enumerate(names)})
    spans = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * number, 8 * number + 8]}
        for number, name in enumerate(names)
    }
    write_raw(tmp_path / FILE, spans, b"".join(tensor.numpy().tobytes() for tensor in content.plain.values()))
    assert_opens_as(tmp_path, content)


def test_empty_tensors_and_headers_of_odd_length_are_read(tmp_path: Path) -> None:
    entries = {
        "a": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "c": {"dtype": "U8", "shape": [3, 0], "data_offsets": [4, 4]},
        "d": {"dtype": "I64", "shape": [1, 1], "data_offsets": [4, 12]},
        "e": {"dtype": "F16", "shape": [0], "data_offsets": [12, 12]},
    }
    tensors = {
        "a": torch.empty(0, 3, dtype=torch.bfloat16),
        "b": torch.tensor(1.5),
        "c": torch.empty(3, 0, dtype=torch.uint8),
        "d": torch.tensor([[-7]]),
        "e": torch.empty(0, dtype=torch.float16),
    }
    data = tensors["b"].numpy().tobytes() + tensors["d"].numpy().tobytes()
    for spaces in range(8):
        write_raw(tmp_path / FILE, json.dumps(entries) + " " * spaces, data)
        assert_opens_as(tmp_path, Content({}, tensors))


# --- pickles -------------------------------------------------------------------------------------------


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    path, content = small(tmp_path / "model")
    ran = tmp_path / "ran"
    (path / name).write_bytes(pickle.dumps({f"{Q}.weight": _Touch(ran)}))
    assert_opens_as(path, content)  # not looked at beside a safetensors file
    (path / FILE).unlink()
    refuses(path, f"{name}: pickles can run code when they are loaded and are not read: save the model as safetensors")
    refuses(path / name, f"{name}: pickles can run code")
    (path / name).rename(path / FILE)  # nor under another name
    refuses(path, f"{FILE}: truncated or not safetensors")
    assert not ran.exists()
    pickle.loads((path / FILE).read_bytes())
    assert ran.exists()


# --- configs -------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not readable as JSON"),
    "half": (b'{"quantization_config": {', "not readable as JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not readable as JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not readable as JSON"),
    "nested deeply": (b'{"a": ' + b"[" * 100_000, "not readable as JSON"),
    "a list": (b"[1]", "a JSON object is expected, got list"),
    "a text": (b'"mxfp8"', "a JSON object is expected, got str"),
    "null": (b"null", "a JSON object is expected, got NoneType"),
}
SAID = ("mxfp8", ["mxfp8"], 8, True)
METHODS = (None, 8, ["mxfp8"], {"mxfp8": 1}, "MXFP8", "mxfp8 ", "")
LISTS: tuple[object, ...] = ("lm_head", {"lm_head": 1}, [1], [["lm_head"]], True, 0)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", "quant_model_description.json"])
def test_a_file_of_bad_json_is_refused_by_name(tmp_path: Path, file: str) -> None:
    path, _ = small(tmp_path)
    for text, found in TEXTS.values():
        (path / file).write_bytes(text)
        refuses(path, f"{file}: {found}")


def test_configs_of_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    path, content = small(tmp_path)
    config = json.loads((path / "config.json").read_text())

    def write(file: str, value: object) -> None:
        (path / file).write_text(json.dumps(value))

    for said in SAID:
        write("config.json", {**config, "quantization_config": said})
        refuses(path, r"config\.json: quantization_config must be an object, got ")
        write("config.json", {"model_type": "llama"})
        write("hf_quant_config.json", {"quantization": said})
        refuses(path, r"hf_quant_config\.json: quantization must be an object, got ")
        (path / "hf_quant_config.json").unlink()
    for method in METHODS:
        write("config.json", {"quantization_config": {**config["quantization_config"], "quant_method": method}})
        refuses(path, "the checkpoint's format is none of modelopt, .*found: quantization_config .*F8_E4M3")
    for ignored in LISTS:
        write("config.json", {"quantization_config": {**config["quantization_config"], "ignored_layers": ignored}})
        refuses(path, "ignored_layers must be a list of names, got ")
    write("config.json", config)
    assert_opens_as(path, content)
