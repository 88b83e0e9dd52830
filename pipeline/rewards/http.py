"""A scorer behind an address as a reward source; docs/rewards.md has the protocol."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, TrainingError
from pipeline.json_http import JsonServer, ServerFault
from pipeline.reward_config import HttpEntry
from pipeline.rewards.source import Completions, as_messages, checked, columns_of, rows_text


class HttpReward:
    """Posts responses in parts of `batch_rows`, `concurrency` of them at a time."""

    def __init__(self, entry: HttpEntry) -> None:
        """Reads the secret; nothing is sent.

        Raises:
            ConfigError: `auth_env` names no variable, or `ca_file` holds no certificates.
        """
        self.entry = entry
        parts = urlsplit(entry.http)
        self.name = parts.hostname or ""
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._secret = auth_secret(entry)
        bearer = self._secret if entry.auth_header is None else None
        headers = {entry.auth_header: self._secret} if entry.auth_header and self._secret else {}
        self._server = JsonServer(
            f"{parts.scheme}://{parts.netloc}",
            api_key=bearer,
            headers=headers,
            ca_file=entry.ca_file,
            timeout_seconds=entry.timeout_seconds,
            retries=entry.retries,
        )

    def score(self, completions: Completions) -> list[float]:
        """See `RewardSource`."""
        size, count = self.entry.batch_rows, len(completions)
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        pool = ThreadPoolExecutor(self.entry.concurrency)
        try:
            scores = list(pool.map(lambda rows: self._ask(completions, rows), parts))
        finally:
            pool.shutdown(cancel_futures=True)
        return checked(self.name, [score for part in scores for score in part], completions)

    async def score_async(self, completions: Completions) -> list[float]:
        """The same in a thread, while others use the event loop."""
        return await asyncio.to_thread(self.score, completions)

    def _ask(self, completions: Completions, rows: Sequence[int]) -> list[Any]:
        try:
            answer = self._server.post(self.path, self._body(completions.take(rows)))
        except ServerFault as fault:
            answer = str(fault).removeprefix(f"POST {self._server.url}{self.path}: ")
            raise self._fault(answer, completions, rows) from fault
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            text = answer if isinstance(answer, str) else repr(answer)
            raise self._fault(
                f'it answered {text[:200]!r}, not JSON of the form {{"scores": [...]}}',
                completions, rows,
            )  # fmt: skip
        wrong = [score for score in scores if type(score) not in (int, float)]
        if wrong:
            raise self._fault(f"it answered the score {wrong[0]!r}, no number", completions, rows)
        if len(scores) != len(rows):
            raise self._fault(
                f"it answered {len(scores)} scores for {len(rows)} completions", completions, rows
            )
        return scores

    def _body(self, part: Completions) -> dict[str, Any]:
        columns, wanted = columns_of(part.prompts), self.entry.columns
        if wanted is not None:
            columns = {name: columns.get(name, [None] * len(part)) for name in wanted}
        return {
            "prompts": [
                prompt.prompt if isinstance(prompt.prompt, str) else as_messages(prompt)
                for prompt in part.prompts
            ],
            "completions": list(part.texts),
            "ended": [bool(ended) for ended in part.ended],
            "columns": columns,
        }

    def _fault(self, what: str, completions: Completions, rows: Sequence[int]) -> TrainingError:
        message = f"reward {self.name} ({self.entry.http}): {what} ({rows_text(completions, rows)})"
        # A server may send back what it was sent.
        return TrainingError(message.replace(self._secret, "***") if self._secret else message)


def auth_secret(entry: HttpEntry) -> str | None:
    """The secret of the auth header. Raises ConfigError where its variable is not set."""
    if entry.auth_env is None:
        return None
    secret = os.environ.get(entry.auth_env, "").strip()
    if not secret or not secret.isprintable():
        state = "not set" if not secret else "no single line of text"
        raise ConfigError(
            f"the environment variable {entry.auth_env}, which holds the secret for {entry.http} "
            f"(auth_env), is {state}: export it before the run"
        )
    return secret
