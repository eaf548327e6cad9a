"""Running mxfp8-inspect in this process, and checking its JSON."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema
import torch

import lowering
from lowering.inspect import cli

SCHEMA = json.loads((Path(lowering.__file__).parent / "inspect" / "schema.json").read_text())


def run(*args: object) -> tuple[int, str, str]:
    """Exit status, standard output without what varies, standard error."""
    torch._dynamo.reset()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main([*map(str, args)])
    return status, plain(out.getvalue()), err.getvalue()


def plain(text: str) -> str:
    text = re.sub(r"\d+\.\d+( s|%)", r"?\1", text).replace(torch.__version__, "VERSION").replace("─", "-")
    return "\n".join(line.rstrip() for line in text.splitlines())


def validate(report: lowering.Report) -> Any:
    document = json.loads(report.to_json())
    jsonschema.validate(document, SCHEMA)
    return document
