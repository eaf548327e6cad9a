"""Factories that are none."""

from __future__ import annotations

number = 3


def needs_an_argument(a: object) -> None:
    pass


def raises() -> None:
    raise RuntimeError("no such checkpoint\nsecond line")


def not_a_pair() -> int:
    return 3


def one_tensor() -> tuple[object, int]:
    return print, 3
