"""Tuning kernels, without a device: times are made up."""

# ruff: noqa: E402 (without Triton there is nothing to import, and nothing to test)

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")


from mxfp8_ops.gpu import tune


class Bench:
    """Made-up times: a configuration is (name, microseconds); what is negative does not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.capturing = False
        self.runs: list[tuple[str, float]] = []
        self.clock = 0.0
        bench = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = bench.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return (end.time - self.time) / 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(tune, "_device_name", lambda index: "some device")
        monkeypatch.setattr(tune, "_flusher", lambda: self.flush)
        monkeypatch.setattr(tune, "_chosen", {})
        monkeypatch.setattr(tune, "_warned", set())
        monkeypatch.setenv("MXFP8_AUTOTUNE", "1")
        monkeypatch.setenv("MXFP8_CACHE_DIR", str(folder))

    def flush(self) -> None:
        self.clock += 1e6

    def run(self, config: tuple[str, float]) -> None:
        self.runs.append(config)
        if config[1] < 0:
            raise RuntimeError("out of resource: shared memory")
        self.clock += config[1]

    def best(self, key: Any = (64, 128), candidates: Any = None, default: Any = ("default", 5.0)) -> Any:
        candidates = CANDIDATES if candidates is None else candidates
        return tune.best("family", key, candidates, default, self.run)

    def restart(self) -> None:
        """What another process would start with."""
        tune._chosen.clear()
        tune._warned.clear()
        self.runs.clear()


CANDIDATES = [("slow", 9.0), ("broken", -1.0), ("fast", 2.0), ("default", 5.0)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path / "cache")


def stored(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def test_the_fastest_configuration_that_runs_is_taken_and_remembered(bench: Bench) -> None:
    assert bench.best() == ("fast", 2.0)
    assert bench.runs.count(("broken", -1.0)) == 1
    measured = len(bench.runs)
    assert bench.best() == ("fast", 2.0)
    assert len(bench.runs) == measured


def test_the_median_counts_not_the_luckiest_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: tuple[str, float]) -> None:
        lucky = config[0] == "slow" and len(bench.runs) == 3
        bench.run((config[0], 0.1) if lucky else config)

    assert tune.best("family", 1, [("slow", 9.0)], ("default", 5.0), run) == ("default", 5.0)
    assert ("slow", 0.1) in bench.runs


def test_the_default_is_measured_even_if_it_is_no_candidate(bench: Bench) -> None:
    assert bench.best(candidates=[("slow", 9.0)]) == ("default", 5.0)
    assert ("default", 5.0) in bench.runs


@pytest.mark.parametrize("word", [None, "0", "off"])
def test_without_the_flag_nothing_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch, word: str | None) -> None:
    bench.best()
    bench.runs.clear()
    monkeypatch.delenv("MXFP8_AUTOTUNE")
    if word is not None:
        monkeypatch.setenv("MXFP8_AUTOTUNE", word)
    assert bench.best() == ("default", 5.0)
    assert bench.best("another problem") == ("default", 5.0)
    assert bench.runs == []


def test_capturing_a_graph_measures_nothing_and_uses_what_is_known(bench: Bench) -> None:
    bench.best("known")
    bench.runs.clear()
    bench.capturing = True
    assert bench.best("known") == ("fast", 2.0)
    assert bench.best("new") == ("default", 5.0)
    assert bench.runs == []
    bench.capturing = False
    assert bench.best("new") == ("fast", 2.0)


def test_if_nothing_runs_the_default_is_used_and_nothing_stored(bench: Bench, tmp_path: Path) -> None:
    for _ in range(2):
        assert bench.best(candidates=[("broken", -1.0)], default=("default", -5.0)) == ("default", -5.0)
    assert len(bench.runs) == 2
    assert stored(tmp_path) == []


def test_another_process_reads_what_one_has_measured(bench: Bench, tmp_path: Path) -> None:
    bench.best()
    bench.restart()
    assert bench.best() == ("fast", 2.0)
    assert bench.runs == []
    [path] = stored(tmp_path)
    assert list(json.loads(path.read_text())["microseconds"].values()) == [5.0, 9.0, 2.0]
    assert list(path.parent.iterdir()) == [path], "no unfinished files"


def other_key(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"key": (64, 256)}


def other_candidates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"candidates": [*CANDIDATES, ("newer", 3.0)]}


def other_package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("mxfp8_ops.__version__", "99")
    return {}


def other_torch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(torch, "__version__", "99")
    return {}


def other_triton(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(triton, "__version__", "99")
    return {}


def other_device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(tune, "_device_name", lambda index: "another device")
    return {}


@pytest.mark.parametrize("other", [other_key, other_candidates, other_package, other_torch, other_triton, other_device])
def test_what_was_measured_for_another_problem_does_not_count(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: Callable[[pytest.MonkeyPatch], dict[str, Any]]
) -> None:
    bench.best()
    bench.restart()
    assert bench.best(**other(monkeypatch)) == ("fast", 2.0)
    assert bench.runs != []
    assert len(stored(tmp_path)) == 2


def cut(text: str) -> str:
    return text[: len(text) // 2]


def no_chosen(text: str) -> str:
    return json.dumps({"problem": json.loads(text)["problem"]})


def unknown_chosen(text: str) -> str:
    return json.dumps({**json.loads(text), "chosen": "nobody"})


def other_problem(text: str) -> str:
    return text.replace("some device", "another device")


@pytest.mark.parametrize("spoil", [cut, no_chosen, unknown_chosen, other_problem, lambda text: "[]", lambda text: ""])
def test_a_spoiled_file_is_one_warning_and_is_measured_and_written_again(
    bench: Bench, tmp_path: Path, spoil: Callable[[str], str]
) -> None:
    bench.best()
    [path] = stored(tmp_path)
    text = path.read_text()
    path.write_text(spoil(text))
    bench.restart()
    with pytest.warns(UserWarning, match="cache of tuned configurations is ignored") as caught:
        assert bench.best() == ("fast", 2.0)
    assert len(caught) == 1
    assert bench.runs != []
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_one_warning_however_many_problems(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MXFP8_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be") as caught:
        results = [bench.best(key) for key in (1, 2, 1)]
    assert results == [("fast", 2.0)] * 3
    assert len(caught) == 1


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MXFP8_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tune.folder() == tmp_path / ".cache/mxfp8_ops/tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, its specification says
    assert tune.folder() == tmp_path / ".cache/mxfp8_ops/tuning"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tune.folder() == Path("/xdg/mxfp8_ops/tuning")
    monkeypatch.setenv("MXFP8_CACHE_DIR", "~/own")
    assert tune.folder() == tmp_path / "own/tuning"


def test_threads_measure_a_problem_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_load", lambda problem: None)  # not because they find it on disk
    results: list[Any] = []
    started = threading.Barrier(4)

    def run(config: tuple[str, float]) -> None:
        time.sleep(0.001)  # lets the others see that nothing is known yet
        bench.run(config)

    def work() -> None:
        started.wait()
        results.append(tune.best("family", 1, CANDIDATES, ("default", 5.0), run))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("fast", 2.0)] * 4
    assert bench.runs.count(("broken", -1.0)) == 1


def test_processes_that_write_and_read_the_same_file_never_meet_half_of_it(tmp_path: Path) -> None:
    program = (
        "import sys, warnings\n"
        "from mxfp8_ops.gpu import tune\n"
        "warnings.simplefilter('error')\n"
        "names = [str(i) * 5000 for i in range(10)]\n"
        "problem = tune._problem('family', 1, 'device', names)\n"
        "for i in range(300):\n"
        "    tune._store(problem, names[i % 10], {})\n"
        "    assert tune._load(problem) in names\n"
    )
    environment = {**os.environ, "MXFP8_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "tuning").iterdir())) == 1


def test_no_warning_where_nothing_is_wrong(bench: Bench) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.best()
        bench.restart()
        bench.best()
