"""Writing checkpoints: files that any reader takes, folders that appear whole, runs that go on when killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dialects import WRITERS, random_content
from helpers import assert_same
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxfp8_ops.checkpoint import convert, open_checkpoint
from mxfp8_ops.checkpoint.converting import converter, writing
from mxfp8_ops.checkpoint.converting.shards import Shard, index, split
from mxfp8_ops.checkpoint.files import open_files
from mxfp8_ops.checkpoint.headers import TensorInfo

ROOT = Path(__file__).parent.parent
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Part:
    """Tensors of one element size, as the writer takes them."""

    tensors: tuple[Tensor, ...]
    outputs: tuple[TensorInfo, ...]


def part(name: str, *tensors: Tensor) -> Part:
    infos = [TensorInfo(f"{name}.{i}", NAMES[t.dtype], tuple(t.shape), Path()) for i, t in enumerate(tensors)]
    return Part(tensors, tuple(infos))


def random_part(name: str, dtype: torch.dtype, *shapes: Sequence[int]) -> Part:
    sizes = [torch.empty(shape, dtype=dtype).nbytes for shape in shapes]
    data = [torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8) for size in sizes]
    return part(name, *(raw.view(dtype).view(tuple(shape)) for raw, shape in zip(data, shapes, strict=True)))


def written(folder: Path, parts: Sequence[Part], most: int) -> list[Shard[Part]]:
    shards = split(parts, most)
    with writing.drafting(folder, "fingerprint", force=False) as draft:
        for shard in shards:
            draft.write(shard, lambda each: (each.tensors, {}))
        for name, content in index(shards).items():
            writing.write_json(draft.folder / name, content)
        draft.publish()
    return shards


# --- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_files_of_any_tensors_are_read_by_safetensors(tmp_path: Path, most: int) -> None:
    folder, choose = tmp_path / "out", random.Random(most)
    parts = []
    for number in range(20):
        shapes = [[choose.randrange(6) for _ in range(choose.randrange(4))] for _ in range(1 + number % 2)]
        parts.append(random_part(f"part{number}", choose.choice(list(NAMES)), *shapes))
    shards = written(folder, parts, most)
    found = {}
    for shard in shards:
        with safe_open(folder / shard.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for each in parts:
        for info, tensor in zip(each.outputs, each.tensors, strict=True):
            assert_same(found.pop(info.name), tensor)
    assert not found
    assert len(open_files(folder)) == sum(len(shard.tensors) for shard in shards)


def test_every_tensor_starts_at_a_multiple_of_its_element_size() -> None:
    parts = [
        random_part("odd", torch.uint8, [3]),
        random_part("wide", torch.int64, [1]),
        random_part("b", torch.bool, [1]),
    ]
    (shard,) = split([*parts, random_part("half", torch.bfloat16, [1])], 1000)
    header = shard.header()
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    entries = json.loads(header[8:])
    assert [entries[info.name]["data_offsets"] for info in shard.tensors] == [[0, 8], [8, 10], [10, 13], [13, 14]]


def test_shards_keep_to_the_limit_and_to_the_order() -> None:
    parts = [random_part(str(i), torch.uint8, [size]) for i, size in enumerate((40, 40, 40, 500, 10))]
    shards = split(parts, 100)
    assert [[each.outputs[0].name for each in shard.parts] for shard in shards] == [
        ["0.0", "1.0"],
        ["2.0"],
        ["3.0"],
        ["4.0"],
    ]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [shard.name for shard in split(parts, 1000)] == ["model.safetensors"]
    assert index(split(parts, 1000)) == {}
    ((name, content),) = index(shards).items()
    assert name == "model.safetensors.index.json"
    assert content["metadata"] == {"total_size": 630}
    assert content["weight_map"]["3.0"] == "model-00003-of-00004.safetensors"


def test_a_tensor_that_is_not_as_announced_stops_the_shard(tmp_path: Path) -> None:
    announced = part("x", torch.zeros(4))
    with (
        pytest.raises(ValueError, match=r"x\.0 was to be F32 \[4\], but is torch.float32 \[5\] now"),
        writing.drafting(tmp_path / "out", "", force=False) as draft,
    ):
        draft.write(Shard("model.safetensors", (announced,)), lambda each: ((torch.zeros(5),), {}))
    assert list(tmp_path.iterdir()) == []


# --- folders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MXFP8 checkpoint of a few hundred kilobytes, with a tokenizer."""
    folder = WRITERS["quark"](tmp_path_factory.mktemp("source") / "quark", random_content(), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_the_same_run_twice_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(source, tmp_path / name, max_shard_bytes=20_000)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


KILLED_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
from mxfp8_ops.checkpoint import convert
from mxfp8_ops.checkpoint.converting import writing

source, old, expected, target = map(Path, sys.argv[1:])


def kill_at(moment):
    left = [moment]

    def count():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
        if changes or (event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            count()

    def counted(tensor, original=writing._bytes):
        count()
        return original(tensor)

    writing._bytes = counted
    sys.addaudithook(audit)


def in_a_process(moment):
    process = os.fork()
    if not process:
        if moment is not None:
            kill_at(moment)
        os._exit(convert(source, target, max_shard_bytes=24_000, force=True).resumed)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


killed = resumed = 0
while True:
    for folder in (target, target.with_name(target.name + ".partial")):
        shutil.rmtree(folder, ignore_errors=True)
    if killed % 2:
        shutil.copytree(old, target)
    if in_a_process(killed) >= 0:
        break
    if target.exists():
        assert content(target) in (content(old), content(expected)), killed
    resumed += in_a_process(None)
    assert content(target) == content(expected), killed
    killed += 1
print(killed, resumed)
"""


def test_a_run_killed_at_any_moment_leaves_nothing_by_halves_and_is_resumed_to_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    """Every second time there is an older checkpoint, to be replaced."""
    small = WRITERS["fp8-1x32"](tmp_path / "source", random_content(layers={"a": (32, 64), "b": (300, 64)}))
    (small / "tokenizer.json").write_text("{}")
    convert(small, tmp_path / "expected", max_shard_bytes=24_000)
    convert(source, tmp_path / "old")
    folders = [str(tmp_path / name) for name in ("source", "old", "expected", "target")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_EVERYWHERE, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed > 20
    assert resumed > 20


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any) -> None:
    """A run that ends with an error after some tensors."""
    calls = iter(range(1000))

    def failing(tensor: Tensor, original: Any = writing._bytes) -> Any:
        if next(calls) == after:
            raise OSError("the disk is gone")
        return original(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_bytes", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            convert(source, target, max_shard_bytes=20_000, **options)


def test_other_options_or_another_source_start_anew(source: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out"
    interrupted(source, target, monkeypatch, after=6)
    partial = tmp_path / "out.partial" / "checkpoint"
    assert list(partial.glob("*.safetensors"))
    assert convert(source, target, "mxfp8", max_shard_bytes=20_000).resumed == 0
    assert open_checkpoint(target).format.name == "mxfp8"
    interrupted(source, target, monkeypatch, after=6, force=True)
    index_file = source / "model.safetensors.index.json"
    shard = source / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(index_file.stat().st_atime_ns, shard.stat().st_mtime_ns + 1))
    assert convert(source, target, max_shard_bytes=20_000, force=True).resumed == 0
    interrupted(source, target, monkeypatch, after=6, force=True)
    assert convert(source, target, max_shard_bytes=20_000, force=True).resumed > 0


def test_a_finished_shard_that_was_cut_off_is_written_again(source: Path, tmp_path: Path, monkeypatch) -> None:
    interrupted(source, tmp_path / "out", monkeypatch, after=9)
    shards = sorted((tmp_path / "out.partial" / "checkpoint").glob("*.safetensors"))
    os.truncate(shards[0], shards[0].stat().st_size - 1)
    assert convert(source, tmp_path / "out", max_shard_bytes=20_000, verify=True).resumed == len(shards) - 1


def test_a_target_that_exists_stays_without_force_and_is_replaced_with_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(source, target)
    before = content(target)
    with pytest.raises(FileExistsError, match=r"out exists: choose another folder, or --force"):
        convert(source, target, "mxfp8")
    assert content(target) == before
    (target / "of the old one").touch()
    convert(source, target, "mxfp8", force=True)
    assert open_checkpoint(target).format.name == "mxfp8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (target / "of the old one").exists()


def test_force_replaces_no_folder_that_is_not_a_checkpoint(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is not replaced: it is no folder with a checkpoint"):
            convert(source, tmp_path / name, force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "all of it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]


def test_what_was_to_be_replaced_is_back_when_no_run_goes_on(source: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out"
    convert(source, target, "mxfp8")
    before = content(target)

    def failing(old: Path, new: Path, rename: Any = os.rename) -> None:
        if new == target:
            raise OSError("killed")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="killed"):
            convert(source, target, force=True)
    assert not target.exists()
    with pytest.raises(FileExistsError, match="out exists"):
        convert(source, target, "fp8-1x32")
    assert content(target) == before


def test_a_folder_of_somebody_else_where_the_draft_would_be_stays(source: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "out.partial" / "checkpoint" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("all of it")
    (tmp_path / "out.partial" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"out\.partial is where .*out would be written: move it away"):
        convert(source, tmp_path / "out")
    assert thesis.read_text() == "all of it"
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_run_copied_and_the_source_has_no_more_is_gone(
    source: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupted(source, tmp_path / "out", monkeypatch, after=6)
    draft = tmp_path / "out.partial" / "checkpoint"
    (draft / "1_Pooling").mkdir()
    (draft / "merges.txt").touch()
    assert convert(source, tmp_path / "out", max_shard_bytes=20_000).resumed > 0
    convert(source, tmp_path / "expected", max_shard_bytes=20_000)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert not (tmp_path / "out" / "1_Pooling").exists()


def test_a_resumed_run_reports_all_layers(source: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"format": "unquantized", "dtype": torch.float16}
    interrupted(source, tmp_path / "out", monkeypatch, after=4, **options)
    resumed = convert(source, tmp_path / "out", max_shard_bytes=20_000, **options)
    whole = convert(source, tmp_path / "expected", max_shard_bytes=20_000, **options)
    assert resumed.resumed > 0
    assert resumed.rows == whole.rows
    assert any(row.snr_db is not None for row in whole.rows)


def test_an_empty_folder_is_free(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert len(open_checkpoint(tmp_path / "out")) == 3


def test_source_and_target_must_be_apart(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "out", source.parent, tmp_path / "link"):
        with pytest.raises(ValueError, match="must be a folder apart from the source"):
            convert(source, target, force=True)
    with pytest.raises(ValueError, match="must be a folder apart from the source"):
        convert(source / "model.safetensors.index.json", source, force=True)


def test_a_second_run_into_the_same_target_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with writing.drafting(target, "", force=False) as draft:
        (draft.folder / "model-1.safetensors").touch()
        with pytest.raises(RuntimeError, match=r"another process is writing .*out: wait for it, or end it"):
            convert(source, target)
        assert list(draft.folder.iterdir())
    convert(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(OSError, match=r"[\d,]+ bytes are to be written, 999 are free"):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_meanwhile_does_not_become_a_target(source: Path, tmp_path: Path, monkeypatch) -> None:
    folder = WRITERS["quark"](tmp_path / "source", random_content())

    def touched(*args: Any) -> None:
        os.utime(folder / "model.safetensors", (1, 1))

    monkeypatch.setattr(converter, "check_output", touched)
    with pytest.raises(ValueError, match="has changed while it was read"):
        convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- memory --------------------------------------------------------------------------------------------------


MEASURED = """
import sys
from pathlib import Path
import torch
from mxfp8_ops.checkpoint import convert


def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024


torch.set_num_threads(1)  # each has memory of its own
source, target, warm = sys.argv[1:]
convert(source, warm, only=["layers.0.0"])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
convert(source, target, verify=True)
print(memory("VmHWM") - before)
"""


def test_memory_is_bounded_by_a_tensor_whatever_the_checkpoint(tmp_path: Path) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the high-water mark of memory cannot be reset here")
    (tmp_path / "source").mkdir()
    for file in range(2):
        weights = {f"layers.{file}.{i}.weight": torch.randn(1024, 2048).bfloat16() for i in range(12)}
        save_file(weights, tmp_path / "source" / f"part{file}.safetensors")
    folders = [str(tmp_path / name) for name in ("source", "target", "warm")]
    at_once = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed goes back to the system
    environment = os.environ | at_once | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32, f"{done.stdout} MB for weights of 4 MB, 96 MB of them"
