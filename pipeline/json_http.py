"""JSON over HTTP to one server, with timeouts and bounded retries; standard library only."""

import http.client
import json
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, TrainingError

_TRANSIENT = {429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0  # seconds


class ServerFault(TrainingError):
    """The server cannot be reached, or answered with an error; `status` is None without answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class JsonServer:
    """One server by its URL; every request has a connection of its own, so threads may share it.

    Lost connections, timeouts and the statuses 429, 500, 502, 503 and 504 are tried again `retries`
    times, after pauses of `backoff_seconds` x 1, 2, 4, ... up to 30 seconds. Certificates of https
    servers are verified by those of the system, and of `ca_file` (PEM) where it is given.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        ca_file: str | None = None,
        timeout_seconds: float = 600.0,
        retries: int = 5,
        backoff_seconds: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._parts = urlsplit(self.url)
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._tls = _tls(ca_file) if self._parts.scheme == "https" else None
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout_seconds
        self._retries = retries
        self._backoff = backoff_seconds
        self._sleep = sleep

    def get(self, path: str) -> Any:
        """The JSON answer to a GET. Raises ServerFault."""
        return self._request("GET", path, None, ())

    def post(self, path: str, body: Any, *, final: Collection[int] = ()) -> Any:
        """The answer to a POST of JSON; text where it is not JSON.

        Statuses in `final` are not tried again.

        Raises:
            ServerFault: no answer, or an error.
        """
        return self._request("POST", path, json.dumps(body).encode(), final)

    def _request(self, method: str, path: str, body: bytes | None, final: Collection[int]) -> Any:
        for attempt in range(self._retries + 1):
            try:
                return self._once(method, path, body)
            except ServerFault as fault:
                refused = isinstance(fault.__cause__, ssl.SSLCertVerificationError)
                passing = fault.status in _TRANSIENT - set(final)
                passing = passing or (fault.status is None and not refused)
                if not passing or attempt == self._retries:
                    tries = f" (tried {attempt + 1} times)" if attempt else ""
                    raise ServerFault(f"{fault}{tries}", fault.status) from fault.__cause__
                self._sleep(min(self._backoff * 2**attempt, _LONGEST_PAUSE))
        raise AssertionError("the loop returns or raises")

    def _once(self, method: str, path: str, body: bytes | None) -> Any:
        connection = http.client.HTTPConnection(self._parts.netloc, timeout=self._timeout)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(
                self._parts.netloc, timeout=self._timeout, context=self._tls
            )
        what = f"{method} {self.url}{path}"
        try:
            connection.request(method, self._parts.path + path, body, self._headers)
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except TimeoutError as error:
            raise ServerFault(f"{what}: no answer within {self._timeout:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerFault(f"{what}: {reason}") from error
        finally:
            connection.close()
        text = data.decode("utf-8", errors="replace")
        if status != 200:
            raise ServerFault(f"{what}: status {status}: {_message(text)}", status)
        try:
            return json.loads(text)
        except ValueError:
            return text


def _tls(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{ca_file} holds no certificates (PEM): {error}") from error
    return context


def _message(text: str) -> str:
    """What an error's body says, in at most 500 characters: OpenAI's `error.message`, or all."""
    try:
        body = json.loads(text)
        text = str(body["error"]["message"] if "error" in body else body.get("message", text))
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return text.strip()[:500] or "no explanation"
