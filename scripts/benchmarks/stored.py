"""Runs that were stored: read, and several of them put together, so that a part can be measured again alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .options import FORMAT, Record

IDENTITY = ("n", "k", "m", "column", "mode", "variant", "batch", "run", "way")
"""Entries that say what a record is of; one of the same section with equal ones replaces it."""
SAME = ("device", "torch", "triton", "transformers", "switches", "level", "threads")
"""What runs must have in common, as far as they tell, for their results to stand on one page."""


def load(paths: Sequence[Path], sections: Sequence[str]) -> Record:
    """The data of stored runs of a benchmark that has these sections, in their order: of each record the latest.

    Its entry ``sources`` has, by section, the environments of the runs that it is from, unless that is the first.

    Raises:
        OSError: a file cannot be read. ValueError: it holds something else, or runs do not belong together.
    """
    runs = [_load(path, sections) for path in paths]
    for run, path in zip(runs, paths, strict=True):
        _check_same(runs[0], run, path)
    joined = runs[0] | {"sections": {}, "sources": {}}
    for section in sections:
        if any(section in run["sections"] for run in runs):
            joined["sections"][section], sources = _join(runs, section)
            if sources not in ([], [runs[0]["environment"]]):
                joined["sources"][section] = sources
    return joined


def _join(runs: Sequence[Record], section: str) -> tuple[list[Record], list[Record]]:
    """Of a section the latest records, in the order of their first ones, and the environments that they are from."""
    latest = {_key(record): (i, record) for i, run in enumerate(runs) for record in run["sections"].get(section, ())}
    last = max((i for i, _ in latest.values()), default=0)
    # A failure counts as long as no later run has the section.
    counted = [(i, record) for i, record in latest.values() if "failed" not in record or i == last]
    used = sorted({i for i, _ in counted})
    found = (runs[i].get("sources", {}).get(section, [runs[i]["environment"]]) for i in used)
    return [record for _, record in counted], [environment for each in found for environment in each]


def origin(run: Record, section: str) -> Iterator[str]:
    """A paragraph for the page of a run: from which runs a section is, unless it is what the header says."""
    sources = run.get("sources", {}).get(section)
    if sources:
        yield ""
        yield "Measured by " + ", and by ".join(f"`{each['command']}` ({each['date']})" for each in sources) + "."


def _load(path: Path, sections: Sequence[str]) -> Record:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("sections"), dict):
        raise ValueError(f"{path} is not a run of this benchmark (format {FORMAT})")
    if not set(data["sections"]) <= set(sections):
        raise ValueError(f"{path} is a run of another benchmark, with the sections {', '.join(data['sections'])}")
    return data


def _check_same(first: Record, run: Record, path: Path) -> None:
    one, other = first["environment"], run["environment"]
    different = [name for name in SAME if name in one and name in other and one[name] != other[name]]
    if different:
        found = ", ".join(f"{name} {other[name]} instead of {one[name]}" for name in different)
        raise ValueError(f"{path} cannot stand on one page with the run before it: {found}")


def _key(record: Record) -> tuple[object, ...]:
    return record.get("job"), *(record.get(name) for name in IDENTITY)
