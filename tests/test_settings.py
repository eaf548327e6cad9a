"""The load-time flag: its words, its two variables, and what a change does to compiled graphs."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable

import pytest
import torch
from helpers import assert_same, exact_linear_inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import mxfp8_ops
from mxfp8_ops import settings

FIRST, SECOND = "MXFP8_DEQUANT_AT_LOAD", "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD"
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def every_case(words: tuple[str, ...]) -> list[str]:
    cases = {case(word) for word in words for case in (str.lower, str.upper, str.title)}
    return sorted(cases | {"tRuE" if words is ON else "fAlSe"})


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("word", "meaning"), [*((word, True) for word in every_case(ON)), *((word, False) for word in every_case(OFF))]
)
def test_a_word_means_the_same_in_any_case(
    name: str, word: str, meaning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, word)
    assert settings.dequant_at_load() is meaning


def test_unset_is_neither_on_nor_off() -> None:
    assert settings.dequant_at_load() is None


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize("word", ["", " 1", "1 ", "2", "-1", "y", "enabled", "None", "true,false"])
def test_any_other_word_is_an_error_that_names_the_variable(
    name: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, word)
    expected = f"{name} must be 1/true/yes/on or 0/false/no/off, got {word!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        settings.dequant_at_load()


@pytest.mark.parametrize(
    ("name", "setting"),
    [("MXFP8_AUTOTUNE", settings.autotune), ("MXFP8_DEPENDENT_LAUNCH", settings.dependent_launch)],
)
def test_what_is_off_by_default_understands_the_same_words(
    name: str, setting: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setting() is False
    for word in (*ON, *OFF):
        monkeypatch.setenv(name, word)
        assert setting() is (word in ON)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"^{name} must be 1/true/yes/on or 0/false/no/off, got '2'$"):
        setting()


@pytest.mark.parametrize("words", itertools.product((None, "on", "off"), repeat=3), ids=str)
def test_what_is_launched_depends_on_three_variables_and_on_nothing_where_none_is_set(
    words: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MXFP8_KERNELS", "MXFP8_AUTOTUNE", "MXFP8_DEPENDENT_LAUNCH")
    for name, word in zip(names, words, strict=True):
        if word is not None:
            monkeypatch.setenv(name, word)
    alone = settings.kernels(), settings.autotune(), settings.dependent_launch()
    assert settings.launch() == (None if words == (None, None, None) else alone)
    for name in names:
        with monkeypatch.context() as context:
            context.setenv(name, "perhaps")
            with pytest.raises(ValueError, match=f"^{name} must be"):
                settings.launch()


@pytest.mark.parametrize(("first", "second"), [("on", "off"), ("off", "on"), ("on", "nonsense")])
def test_the_second_variable_counts_only_while_the_first_is_unset(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FIRST, first)
    monkeypatch.setenv(SECOND, second)
    assert settings.dequant_at_load() is (first == "on")
    monkeypatch.delenv(FIRST)
    monkeypatch.setenv(SECOND, "off" if first == "on" else "on")
    assert settings.dequant_at_load() is (first != "on")


def test_a_bad_first_variable_is_not_hidden_by_a_good_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST, "maybe")
    monkeypatch.setenv(SECOND, "on")
    with pytest.raises(ValueError, match=f"^{FIRST} must be"):
        settings.dequant_at_load()


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("word", ["on", "off", "nonsense"])
def test_the_keyword_beats_the_environment(override: bool, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST, word)
    assert settings.dequant_at_load(override) is override


@pytest.mark.parametrize("override", [0, 1, "on", "", 1.0, [], torch.tensor(True)])
def test_a_keyword_that_is_no_bool_is_a_type_error(override: object) -> None:
    with pytest.raises(TypeError, match="dequant_at_load must be True, False or None, got"):
        settings.dequant_at_load(override)  # type: ignore[arg-type]


# --- compiled graphs -----------------------------------------------------------------------------------


class Counted:
    """A compiled ``mxfp8_ops.linear`` that knows how often it was compiled, and that its answers are right."""

    def __init__(self) -> None:
        self.counter = CompileCounter()
        self.x, self.weight, self.scale, self.bias = exact_linear_inputs(5, 7, 96, torch.float32)
        self.expected = mxfp8_ops.linear(self.x, self.weight, self.scale, self.bias)
        self.function = torch.compile(self.linear, backend=self.counter, fullgraph=True)

    def linear(self, x: Tensor) -> Tensor:
        return mxfp8_ops.linear(x, self.weight, self.scale, self.bias)

    def compilations(self) -> int:
        assert_same(self.function(self.x), self.expected)
        return self.counter.frame_count


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_flipping_the_flag_compiles_again_once_for_each_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    assert [counted.compilations(), counted.compilations()] == [1, 1]
    monkeypatch.setenv(name, "1")
    assert [counted.compilations(), counted.compilations()] == [2, 2]
    monkeypatch.setenv(name, "0")
    assert [counted.compilations(), counted.compilations()] == [3, 3]
    monkeypatch.delenv(name)
    assert counted.compilations() == 3  # the first graph is still there
    monkeypatch.setenv(name, "1")
    assert counted.compilations() == 3


@pytest.mark.parametrize("call", ["dequant", "quantize"])
def test_the_other_functions_are_guarded_on_the_flag_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale, _ = exact_linear_inputs(5, 7, 96, torch.float32)
    functions = {"dequant": lambda: mxfp8_ops.dequant(weight, scale), "quantize": lambda: mxfp8_ops.quantize(x)[0]}
    counter = CompileCounter()
    compiled = torch.compile(functions[call], backend=counter, fullgraph=True)
    compiled()
    monkeypatch.setenv(FIRST, "1")
    assert_same(compiled(), functions[call]())
    assert counter.frame_count == 2


def test_other_variables_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    counted.compilations()
    for name in ("MXFP8_OPS_TEST_UNRELATED", "MXFP8_DEQUANT", FIRST.lower()):
        monkeypatch.setenv(name, "1")
        assert os.environ[name] == "1"
        assert counted.compilations() == 1


def test_invalidate_compiled_compiles_again_every_time() -> None:
    counted = Counted()
    for expected in (1, 2, 3, 4):
        assert [counted.compilations(), counted.compilations()] == [expected, expected]
        settings.invalidate_compiled()


def test_flag_is_not_parsed_by_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FIRST, "nonsense")
    assert Counted().compilations() == 1
