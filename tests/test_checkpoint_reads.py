"""Reading tensors one by one: headers are parsed once, changes noticed, and nothing stays open or mapped."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_header, raw, replace_tensors, write_raw
from helpers import assert_same
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mxfp8_ops.checkpoint import CheckpointError, convert, headers, load_into, open_checkpoint
from mxfp8_ops.checkpoint.files import TensorFiles, open_files

FILE = "model.safetensors"
FEW, MANY = 4, 60
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def saved(folder: Path, count: int, of: float = 0) -> dict[str, Tensor]:
    """A file of ``count`` linears, each [32, 64], all elements of which are its number and ``of``."""
    tensors = {f"{number}.weight": torch.full((32, 64), float(number + of)) for number in range(count)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    return tensors


def settle(file: Path, seconds: int = 10**9) -> None:
    """Makes a file as old as most are, by its time."""
    os.utime(file, (seconds, seconds))


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who has parsed a header, each time."""
    found: list[str] = []
    loads = json.loads

    def opening(*args: Any, **kwargs: Any) -> Any:
        found.append("safetensors")
        return safe_open(*args, **kwargs)

    def parsing(text: Any, **kwargs: Any) -> Any:
        if "data_offsets" in str(text):
            found.append("json")
        return loads(text, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("mxfp8_ops.checkpoint") and hasattr(module, "safe_open"):
            monkeypatch.setattr(module, "safe_open", opening)
    monkeypatch.setattr(json, "loads", parsing)
    return found


def read_all(folder: Path) -> None:
    files = open_files(folder)
    for name in files:
        files.read(name)


def load_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    load_into(nn.Sequential(*(nn.Linear(64, 32, bias=False) for _ in checkpoint.files)), checkpoint)


def convert_all(folder: Path) -> None:
    convert(folder, folder.with_name(f"{folder.name}-out"), verify=True)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("work", [read_all, load_all, convert_all])
def test_a_header_is_parsed_as_often_whatever_the_number_of_its_tensors(
    work: Callable[[Path], None], new: bool, tmp_path: Path, parses: list[str]
) -> None:
    counts = []
    for count in (FEW, MANY):
        saved(tmp_path / str(count), count)
        if not new:
            settle(tmp_path / str(count) / FILE)
        parses.clear()
        work(tmp_path / str(count))
        counts.append(sorted(parses))
    assert counts[0] == counts[1]
    assert len(counts[0]) == (4 if work is convert_all else 2)  # by us and by safetensors, of what is written as well


def test_a_header_is_read_again_only_when_the_state_of_its_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, calls = headers._digest, []
    monkeypatch.setattr(headers, "_digest", lambda text: (calls.append(len(text)), digest(text))[1])
    saved(tmp_path, FEW)
    settle(tmp_path / FILE)
    files = open_files(tmp_path)
    for count in (1, 2):
        for name in [*files, *files]:
            files.read(name)
        assert len(calls) == count
        settle(tmp_path / FILE, seconds=10**9 + 1)


# --- files that change between two reads ---------------------------------------------------------------------


def swapped(file: Path) -> None:
    """The same tensors, first and last in each other's place: a header of the same length in a file of the same."""

    def edit(header: dict[str, Any]) -> None:
        first, last = header["0.weight"], header[f"{FEW - 1}.weight"]
        first["data_offsets"], last["data_offsets"] = last["data_offsets"], first["data_offsets"]

    edit_header(file, edit)


def other_dtypes(file: Path) -> None:
    """A header of the same length: float32 becomes int32."""
    header, data = raw(file)
    write_raw(file, json.dumps(header).replace('"F32"', '"I32"'), data)


def replaced(file: Path) -> None:
    """Another file of the same header appears at the place."""
    saved(file.with_name("new"), FEW, of=100)
    (file.with_name("new") / FILE).replace(file)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), "cannot be read: .*truncated or damaged"),
    "longer": (lambda file: os.truncate(file, file.stat().st_size + 1), "cannot be read: .*truncated or damaged"),
    "emptied": (lambda file: file.write_bytes(b""), "cannot be read: .*truncated or not safetensors"),
    "removed": (Path.unlink, "cannot be read: .*no such file"),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), "cannot be read: .*no regular one"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "cannot be read: .*no regular one"),
    "not safetensors": (lambda file: file.write_bytes(b"x" * 2000), "cannot be read: .*a header of"),
    "no such tensor": (lambda file: replace_tensors(file, {"3.weight": None}), r"3\.weight cannot be read"),
    "other shape": (
        lambda file: replace_tensors(file, {"3.weight": torch.zeros(64, 32)}),
        r"3\.weight .* has become F32 \[64, 32\]: the file has changed",
    ),
    "other dtype at the same time": (
        lambda file: (other_dtypes(file), settle(file)),
        r"3\.weight .* has become I32 \[32, 64\]: the file has changed",
    ),
    "other dtype": (other_dtypes, r"3\.weight .* has become I32 \[32, 64\]: the file has changed"),
}
TAKEN: dict[str, tuple[Callable[[Path], object], float]] = {
    "replaced": (replaced, 103),
    "written again": (lambda file: saved(file.parent, FEW, of=100), 103),
    "in another order": (swapped, 0),
    "with a tensor more": (lambda file: replace_tensors(file, {"-1.weight": torch.ones(5)}), 3),
    "touched": (os.utime, 3),
}


def opened(folder: Path, new: bool) -> TensorFiles:
    """Files of which one tensor has been read; their headers have Python's spaces."""
    saved(folder, FEW)
    edit_header(folder / FILE, lambda header: header.update(__metadata__={"format": "pt"}))
    if not new:
        settle(folder / FILE)
    files = open_files(folder)
    assert_same(files.read("3.weight"), torch.full((32, 64), 3.0))
    return files


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_longer_what_it_was_is_refused_at_the_next_read(case: str, new: bool, tmp_path: Path) -> None:
    edit, found = REFUSED[case]
    files = opened(tmp_path, new)
    edit(tmp_path / FILE)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=found) as error:
            files.read("3.weight")
        assert FILE in str(error.value)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("case", TAKEN)
def test_a_file_with_the_same_tensor_elsewhere_gives_what_is_there_now(case: str, new: bool, tmp_path: Path) -> None:
    edit, value = TAKEN[case]
    files = opened(tmp_path, new)
    edit(tmp_path / FILE)
    for _ in range(2):
        assert_same(files.read("3.weight"), torch.full((32, 64), float(value)))


def test_a_changed_file_is_parsed_once_more_and_not_for_each_tensor(tmp_path: Path, parses: list[str]) -> None:
    files = opened(tmp_path, new=False)
    swapped(tmp_path / FILE)
    parses.clear()
    for name in [*files, *files]:
        files.read(name)
    assert sorted(parses) == ["json", "safetensors"]


@pytest.mark.parametrize(("edit", "found"), [(other_dtypes, "has become I32"), (swapped, None)])
def test_a_change_that_leaves_size_and_times_as_they_were_is_noticed(
    edit: Callable[[Path], None], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    always = headers.State(1, 2, 3, now, now)
    monkeypatch.setattr(headers.State, "of", lambda file: always._replace(size=os.fstat(file.fileno()).st_size))
    files = opened(tmp_path, new=True)
    edit(tmp_path / FILE)
    if found is None:
        assert_same(files.read("3.weight"), torch.full((32, 64), 0.0))
    else:
        with pytest.raises(CheckpointError, match=found):
            files.read("3.weight")


def test_a_file_that_is_cut_off_at_the_last_moment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = opened(tmp_path, new=False)

    def cut(header: headers.Header, file: Any) -> bool:
        os.truncate(tmp_path / FILE, header.starts["3.weight"] + 10)
        return True

    monkeypatch.setattr(headers.Header, "is_of", cut)
    with pytest.raises(CheckpointError, match=r"3\.weight cannot be read"):
        files.read("3.weight")


# --- what stays behind ---------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@linux
def test_nothing_stays_open_or_mapped_while_a_checkpoint_is_in_use(tmp_path: Path) -> None:
    saved(tmp_path, MANY)
    before = descriptors()
    files = open_files(tmp_path)
    kept = [files.read(name) for name in files]
    kept += [files.read(name, slice(0, 8), slice(32, 64)) for name in files]
    assert descriptors() == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(kept) == 2 * MANY


@linux
def test_nothing_stays_open_or_mapped_after_an_error(tmp_path: Path) -> None:
    files = opened(tmp_path, new=False)
    before = descriptors()
    other_dtypes(tmp_path / FILE)
    with pytest.raises(CheckpointError):
        files.read("3.weight")
    os.truncate(tmp_path / FILE, 100)
    with pytest.raises(CheckpointError):
        files.read("3.weight")
    assert descriptors() == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_was_read_stays_when_the_file_changes(tmp_path: Path) -> None:
    files = opened(tmp_path, new=False)
    whole, part = files.read("3.weight"), files.read("3.weight", slice(0, 8), slice(0, 32))
    (tmp_path / FILE).write_bytes(b"\xff" * (tmp_path / FILE).stat().st_size)
    assert_same(whole, torch.full((32, 64), 3.0))
    assert_same(part, torch.full((8, 32), 3.0))


@pytest.mark.parametrize("new", [True, False])
def test_threads_that_read_at_once_get_the_right_bytes(new: bool, tmp_path: Path) -> None:
    tensors = saved(tmp_path, MANY)
    if not new:
        settle(tmp_path / FILE)
    files = open_files(tmp_path)
    start = threading.Barrier(4)

    def read(number: int) -> list[tuple[str, Tensor]]:
        names = list(files)[number:] + list(files)[:number]
        start.wait(20)
        return [(name, files.read(name)) for _ in range(5) for name in names]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, range(0, MANY, MANY // 4)):
            for name, tensor in found:
                assert_same(tensor, tensors[name])


def test_threads_that_read_while_a_file_is_replaced_get_the_old_or_the_new_bytes(tmp_path: Path) -> None:
    files = opened(tmp_path, new=False)
    done = threading.Event()

    def read() -> set[float]:
        found = set()
        while not done.is_set():
            found |= set(files.read("3.weight").flatten().tolist())
        return found

    saved(tmp_path / "a", FEW)
    saved(tmp_path / "b", FEW)
    swapped(tmp_path / "b" / FILE)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(40):
            other = tmp_path / "other"
            other.write_bytes((tmp_path / "ab"[number % 2] / FILE).read_bytes())
            other.replace(tmp_path / FILE)
        done.set()
        assert set.union(*(reader.result() for reader in readers)) <= {0.0, 3.0}


# --- values --------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (5, 6), (2, 3, 4), (0, 3), (3, 0)]


@pytest.mark.parametrize("spaces", [0, 3])
@pytest.mark.parametrize("dtype", headers.DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it_wherever_it_begins(
    dtype: str, spaces: int, tmp_path: Path
) -> None:
    size = headers.DTYPES[dtype].itemsize
    entries, end = {}, 0
    for number, shape in enumerate(SHAPES):
        start, end = end, end + math.prod(shape) * size
        entries[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries)
    data = torch.arange(end).remainder(2 if dtype == "BOOL" else 251).to(torch.uint8).numpy().tobytes()
    write_raw(tmp_path / FILE, text + " " * (spaces - len(text) % 8 + 8), data)
    files = open_files(tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        for name, info in files.items():
            whole = file.get_tensor(name).clone()
            found = files.read(name)
            assert_same(found.view(-1).view(torch.uint8), whole.view(-1).view(torch.uint8))
            assert (found.dtype, found.shape) == (whole.dtype, info.shape)
            parts = [slice(min(1, length), max(1, length - 1)) for length in info.shape[-2:]]
            for part in (parts, parts[-1:], [slice(None)] * len(parts)):
                some = files.read(name, *part)
                expected = whole[(..., *part)].contiguous()
                assert (some.dtype, some.shape) == (expected.dtype, expected.shape)
                assert some.is_contiguous()
                assert_same(some.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_dtype_of_parts_of_bytes_is_refused(dtype: str, tmp_path: Path) -> None:
    bits = {"F4": 4}.get(dtype, 6)
    write_raw(tmp_path / FILE, {"a": {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, 8 * bits]}}, bytes(8 * bits))
    with pytest.raises(CheckpointError, match=f"a cannot be read: {dtype} is no dtype that can be read"):
        open_files(tmp_path).read("a")


def test_a_default_device_does_not_change_where_values_are(tmp_path: Path) -> None:
    tensors = saved(tmp_path, FEW) | {"empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / FILE)
    files = open_files(tmp_path)
    with torch.device("meta"):
        found = {name: files.read(name) for name in files}
        part = files.read("3.weight", slice(0, 8), slice(0, 32))
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert_same(part, torch.full((8, 32), 3.0))
