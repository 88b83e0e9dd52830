"""The data report (data.json) on the screen: what was kept, and what was left out, by reason."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.data.corpus import KINDS


def data_table(report: Mapping[str, Any], examples: bool = False) -> Group:
    """A table of `Corpus.report`, one row a dataset, then its notes.

    With `examples`, the first row left out for each reason follows, with file and line.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("data", no_wrap=True)
    table.add_column("format", overflow="fold")
    for title in ("rows", "train", "held out", "left out"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    kinds = [kind for kind in KINDS if kind in report]
    for kind in kinds:
        dataset = report[kind]
        counts = {reason: entry["count"] for reason, entry in dataset["left_out"].items()}
        table.add_row(
            kind,
            escape(dataset["format"]),
            f"{dataset['rows']:,}",
            f"{dataset['kept']['train']:,}",
            f"{dataset['kept']['held_out']:,}",
            f"{sum(counts.values()):,}",
            escape("\n".join(f"{count:,} x {reason}" for reason, count in counts.items())),
        )
    lines = [line for kind in kinds for line in _lines(kind, report[kind], examples)]
    return Group(table, *(Text(line, style="dim") for line in lines))


def _lines(kind: str, dataset: Mapping[str, Any], examples: bool) -> Iterator[str]:
    for note in dataset["notes"]:
        yield f"{kind}: {note}"
    if not examples:
        return
    for reason, entry in dataset["left_out"].items():
        first = entry["examples"][0]
        yield f"{kind}: {reason}, first at {first['origin']}: {first['detail']}"
