"""What compute-sanitizer writes: read, judged, and as a page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cell
from .tools import Finished

ROOT = Path(__file__).parent.parent.parent
FOUND = 99
"""The tool's exit status where the worker succeeds and yet there are errors."""
LINES = 30
"""Of a report that are shown."""
METHOD = (
    "Every GPU kernel on small problems, with N and K that fill no tile. Every tensor is an allocation of its own, and",
    "every result is compared with the reference.",
)

RACES = (
    "racecheck follows neither an mbarrier at which one thread arrives for its four warps after a barrier among them,",
    "nor the way in which Triton hands values to specialised warps: written at lines of `kernel` or `warp_specialize`,",
    "read there or where they are used. The first is how consumers of `skinny` add up their sums: store, barrier,",
    "arrive; wait, load. Pairs of lines that are neither are races.",
)
"""How to read its report."""

_DONE = re.compile(r"^sanitize: (\d+) cases are right$", re.MULTILINE)
_SUMMARY = re.compile(
    r"^=+ (ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed[^\n]*)[ \r]*$", re.MULTILINE
)
_RACE = re.compile(r"Race reported between (\w+) access at \S+ in (\S+)")
_OTHER = re.compile(r"and (\w+) access at \S+ in (\S+) \[(\d+) hazards?\]")


@dataclass(frozen=True)
class Finding:
    """What came of a tool. ``verdict`` is "clean", "errors", "out of time", "worker failed" or "tool failed";
    ``cases`` and ``errors`` are None where nobody said how many.
    """

    tool: str
    verdict: str
    cases: int | None
    errors: int | None
    summary: str
    seconds: float
    report: Sequence[str]

    def cells(self) -> list[str]:
        numbers = ("?" if each is None else str(each) for each in (self.cases, self.errors))
        return [self.tool, self.verdict, *numbers, self.summary or "none", f"{self.seconds:.0f}"]


def judged(tool: str, finished: Finished) -> Finding:
    """Errors come first, as an illegal access makes the worker fail, too."""
    output = finished.output.replace(f"{ROOT}/", "")
    done, summary = _DONE.search(output), _SUMMARY.search(output)
    errors = int(summary[2] or summary[3]) if summary else None
    if errors or finished.status == FOUND:
        verdict = "errors"
    elif finished.status is None:
        verdict = "out of time"
    elif done is None:
        verdict = "worker failed"
    else:
        verdict = "clean" if summary and finished.status == 0 else "tool failed"
    lines = output.splitlines()
    reports = [line for line in lines if line.startswith("====")]
    found = [*races(reports), *reports][:LINES]
    # What was found until then comes first, also where no verdict was reached.
    shown = {"clean": [], "errors": found}.get(verdict, [*found, *lines[-LINES:]][:LINES])
    cases = int(done[1]) if done else None
    return Finding(tool, verdict, cases, errors, summary[1] if summary else "", finished.seconds, shown)


def races(reports: Sequence[str]) -> Iterator[str]:
    """The lines of source that racecheck sees race, and how often, the most frequent first."""
    hazards: Counter[str] = Counter()
    first = ""
    for line in reports:
        one, other = _RACE.search(line), _OTHER.search(line)
        if one:
            first = f"{one[1]} in {one[2]}"
        if other:
            hazards[f"{first}, {other[1]} in {other[2]}"] += int(other[3])
    yield from (f"{pair}: {count} hazards" for pair, count in hazards.most_common())


def page(found: Sequence[Finding], device: str, versions: str) -> str:
    names = ("tool", "verdict", "cases", "errors", "summary", "seconds")
    lines = [f"# {device}, compute-sanitizer", "", versions, "", *METHOD, ""]
    lines += cell.table(names, (each.cells() for each in found))
    for each in found:
        if each.report:
            note = [*RACES, ""] if each.tool == "racecheck" else []
            lines += ["", f"## {each.tool}", "", *note, "```", *each.report, "```"]
    return "\n".join(lines) + "\n"
