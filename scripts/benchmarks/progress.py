"""Results as they come: under a bar of rich on a terminal, else as plain lines."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Reporter:
    """Prints lines at once. ``total`` is how many there will be."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def start(self, section: str) -> None:
        """A section begins, with compiling and with making weights."""

    def result(self, text: str) -> None:
        self.done += 1
        print(f"[{self.done:>{len(str(self.total))}}/{self.total}] {text}", flush=True)


class RichReporter(Reporter):
    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(total)
        self._progress: Any = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, section: str) -> None:
        self._progress.update(self._task, description=section)

    def result(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._progress.advance(self._task)


def reporter(total: int) -> Reporter:
    if sys.stdout.isatty():
        try:
            return RichReporter(total)
        except ImportError:
            pass
    return Reporter(total)
