"""Counts the rows of one dataset: read, kept, left out by reason with the first examples."""

from collections import Counter
from typing import Any

from pipeline.config import DataSection
from pipeline.data.validate import REMEDIES, Reason, RowFault, excerpt
from pipeline.errors import DataError

EXAMPLES_PER_REASON = 3


class Tally:
    """What became of the rows of one dataset; `label` names it in messages."""

    def __init__(self, label: str, data: DataSection) -> None:
        self.label = label
        self.rows = 0
        self.left_out: dict[str, dict[str, Any]] = {}
        self._bad: Counter[Reason] = Counter()
        self._data = data

    def bad(self, origin: str, row: Any, fault: RowFault) -> None:
        """Count a bad row, or refuse it with `data.on_bad_row: refuse`.

        Raises:
            DataError: bad rows are refused.
        """
        remedy = REMEDIES[fault.reason]
        if self._data.on_bad_row == "refuse":
            raise DataError(
                f"{origin}: {fault.reason}: {fault.detail}. {remedy} "
                "(data.on_bad_row: skip leaves such rows out and counts them.)"
            )
        self._bad[fault.reason] += 1
        self.leave_out(fault.reason, origin, fault.detail, row)

    def leave_out(self, reason: str, origin: str, detail: str, row: Any) -> None:
        """Count a row that is not kept; the first few of each reason are shown."""
        entry = self.left_out.setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES_PER_REASON:
            entry["examples"].append({"origin": origin, "detail": detail, "row": excerpt(row)})

    def check(self) -> None:
        """Refuse the dataset if too large a share of its rows is bad.

        Raises:
            DataError: more than `data.max_bad_fraction`.
        """
        bad, limit = self._bad.total(), self._data.max_bad_fraction
        if bad <= limit * self.rows:
            return
        lines = []
        for reason, count in self._bad.most_common():
            first = self.left_out[reason]["examples"][0]
            lines.append(
                f"  {count} x {reason}. First at {first['origin']}: {first['detail']}. "
                f"{REMEDIES[reason]}"
            )
        raise DataError(
            f"{self.label}: {bad} of {self.rows} rows are bad ({bad / self.rows:.1%}), more than "
            f"data.max_bad_fraction {limit:g} allows:\n"
            + "\n".join(lines)
            + "\nMend the rows, or raise data.max_bad_fraction to go on without them."
        )
