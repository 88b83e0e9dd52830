"""`rlhf generate TARGET PROMPTS`: a policy's responses to the prompts of a file, as JSON lines.

Rows are in the order of the prompts and written at once, when all are there. Response j to prompt i
draws noise of its own under the seed: the same seed gives the same text, whatever the batch size
and however many responses are asked for.

    rlhf generate runs/quickstart prompts.jsonl --out responses.jsonl
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.codec import PROMPTS_CUT
from pipeline.data.conversations import as_messages
from pipeline.data.detect import choose_format, read_record
from pipeline.data.formats import FORMATS
from pipeline.data.readers import Location, read_prompt_rows
from pipeline.data.validate import REMEDIES, RowFault, check_row
from pipeline.errors import ConfigError, DataError
from pipeline.generation import Sampling
from pipeline.models.trunk import Handle
from pipeline.progress import ProgressBar
from pipeline.records import Prompt
from pipeline.rewards import Completions, RewardSource
from pipeline.runfolder import json_line, write_text_atomic
from stages.targets import Target, fitted

STANDARD = "-"  # stdin and stdout, as file names
ROWS_AT_A_TIME = 128  # prompts between two steps of the bar
# The j-th response to prompt i draws noise number i + j * APART, however many prompts there are.
APART = 1 << 32


@dataclass(frozen=True)
class Request:
    """What is asked for, apart from the model."""

    prompts: str  # a file, a Hub dataset, or `-`
    out: str = STANDARD
    responses: int = 1  # to each prompt
    best_of: int | None = None  # the one of highest score of so many
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.best_of is not None and self.responses > 1:
            raise ConfigError(
                f"--best-of {self.best_of} chooses one response, but --n is {self.responses}: ask "
                "for one of the two"
            )
        same = self.out == self.prompts or (
            Path(self.out).exists() and Path(self.out).resolve() == Path(self.prompts).resolve()
        )
        if self.out != STANDARD and same:
            raise ConfigError(f"--out {self.out} is the file of the prompts: name another")

    @property
    def drawn(self) -> int:
        """Responses drawn for each prompt."""
        return self.best_of or self.responses


def generate_file(
    target: Target, stage: str | None, request: Request, sampling: Sampling, console: Console
) -> None:
    """Write the responses; the bar and remarks go to `console`.

    Raises:
        DataError: the prompts cannot be read; a row that cannot be used is named.
        ConfigError: what is asked for contradicts itself.
    """
    if request.drawn > 1 and (sampling.temperature == 0 or sampling.num_beams > 1):
        raise ConfigError(
            f"{request.drawn} responses a prompt would all be the same: greedy decoding and beams "
            "draw nothing. Raise --temperature and leave --beams out, or ask for one"
        )
    prompts = list(islice(_prompts(request.prompts, console), request.limit))
    handle = fitted(target.policy(stage), sampling.max_new_tokens)
    rewards = target.rewards() if request.best_of is not None else None
    rows: list[dict[str, Any]] = []
    with ProgressBar(console, "responses", len(prompts)) as bar:
        for start in range(0, len(prompts), ROWS_AT_A_TIME):
            part = prompts[start : start + ROWS_AT_A_TIME]
            drawn = _draw(target, handle, part, start, request.drawn, sampling)
            rows += _rows(part, drawn, rewards, request)
            bar.step(start + len(part))
    if cut := handle.codec.counts[PROMPTS_CUT]:
        longest = handle.codec.max_prompt_tokens
        console.print(f"{cut} prompts were cut to their last {longest} tokens", highlight=False)
    text = "".join(map(json_line, rows))
    if request.out == STANDARD:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text_atomic(Path(request.out), text)
        console.print(f"{len(rows)} responses in {request.out}", highlight=False, soft_wrap=True)


def _prompts(resource: str, console: Console) -> Iterator[Prompt]:
    """The prompts of a file (stdin: JSON lines, or one prompt a line), in order."""
    if resource != STANDARD:
        yield from _read(resource, console)
        return
    text = sys.stdin.read()
    suffix = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"stdin{suffix}"
        write_text_atomic(file, text)
        yield from _read(str(file), console)


def _read(resource: str, console: Console) -> Iterator[Prompt]:
    notes: dict[str, None] = {}
    rows = list(read_prompt_rows(Location("PROMPTS", resource), notes))
    if not rows:
        raise DataError(f"{resource} is empty: it has no prompts")
    row_format = FORMATS[choose_format(rows, "prompts", "auto", "PROMPTS", resource)]
    for origin, row in rows:
        try:
            record = read_record(check_row(row), row_format, "prompts", origin, notes)
        except RowFault as fault:
            remedy = REMEDIES[fault.reason]
            raise DataError(f"{origin}: {fault.reason}: {fault.detail}. {remedy}") from None
        assert isinstance(record, Prompt)
        yield record
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _draw(
    target: Target,
    handle: Handle,
    prompts: Sequence[Prompt],
    start: int,
    count: int,
    sampling: Sampling,
) -> Completions:
    """`count` responses to each prompt, next to one another; `start` is the first one's number."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    ids = [handle.codec.prompt_ids(prompt.prompt) for prompt in prompts]
    prompt_ids = [row for row in ids for _ in range(count)]
    indices = [start + i + j * APART for i in range(len(prompts)) for j in range(count)]
    written = target.engine.generate(handle, prompt_ids, indices, sampling)
    return Completions.decode(
        handle.codec, repeated, prompt_ids, written.response_ids, written.ended
    )


def _rows(
    prompts: Sequence[Prompt], drawn: Completions, rewards: RewardSource | None, request: Request
) -> Iterator[dict[str, Any]]:
    """Rows of the output; columns of the prompts that have one of their names get `prompt_`."""
    scores = None if rewards is None else rewards.score(drawn)
    for i, prompt in enumerate(prompts):
        chosen = list(range(i * request.drawn, (i + 1) * request.drawn))
        if scores is not None:
            chosen = [max(chosen, key=scores.__getitem__)]  # the first of those tied for best
        for place, row in enumerate(chosen):
            text = prompt.prompt if isinstance(prompt.prompt, str) else as_messages(prompt.prompt)
            own: dict[str, Any] = {
                "prompt": text,
                "response": drawn.texts[row],
                "ended": drawn.ended[row],
                "tokens": len(drawn.completion_ids[row]),
            }
            if request.responses > 1:
                own["sample"] = place
            if scores is not None:
                own["score"] = scores[row]
            yield own | {
                f"prompt_{name}" if name in own else name: value
                for name, value in prompt.columns.items()
            }
