"""Factories that are none."""

from __future__ import annotations

number = 3


def needs_an_argument(a: object) -> None:
    pass


def raises() -> None:
    raise RuntimeError("no such checkpoint\nsecond line")


def exits() -> None:
    raise SystemExit(0)


def three_things() -> tuple[int, int, int]:
    return 1, 2, 3


def no_model() -> tuple[int, tuple[()]]:
    return 1, ()


def not_a_pair() -> int:
    return 3


def one_tensor() -> tuple[object, int]:
    return print, 3
