"""A scorer behind an address: a server on this machine that answers, is slow, refuses or lies."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, TrainingError
from pipeline.not_finite import NotFinite
from pipeline.records import Message, Prompt
from pipeline.reward_config import HttpEntry
from pipeline.rewards import Completions, HttpReward
from tests.scorer import CERTIFICATE, Scorer, lengths


def reward_of(scorer: Scorer, **options: Any) -> HttpReward:
    source = HttpReward(HttpEntry.model_validate({"http": scorer.url, "retries": 0} | options))
    source._server._sleep = lambda seconds: None
    return source


@pytest.fixture(params=[{}], ids=[""])
def scorer(request: pytest.FixtureRequest) -> Iterator[Scorer]:
    made = Scorer(**request.param)
    yield made
    made.server.shutdown()
    made.server.server_close()


TLS = pytest.mark.parametrize("scorer", [{"tls": True}], indirect=True, ids=["tls"])


def batch(count: int = 3) -> Completions:
    prompts = [Prompt("q", {"answer": row, "other": None}, f"p.jsonl:{row + 1}") for row in
               range(count)]  # fmt: skip
    texts = ["a" * (row + 1) for row in range(count)]
    return Completions(prompts, [[1]] * count, [[2]] * count, texts, [True] * count)


def test_the_protocol(scorer: Scorer) -> None:
    conversation = (Message("system", "s"), Message("user", "안녕"))
    mixed = Completions(
        [Prompt("plain", {"a": 1}), Prompt(conversation, {"b": [2]})],
        [[1], [1]], [[2], [2]], ["x", "yy"], [True, False],
    )  # fmt: skip
    assert reward_of(scorer, http=f"{scorer.url}?version=2").score(mixed) == [1.0, 2.0]
    assert scorer.asked == [
        {
            "prompts": [
                "plain",
                [{"role": "system", "content": "s"}, {"role": "user", "content": "안녕"}],
            ],
            "completions": ["x", "yy"],
            "ended": [True, False],
            "columns": {"a": [1, None], "b": [None, [2]]},
        }
    ]
    assert scorer.paths == ["/score?version=2"]


def test_parts_come_back_in_order_whoever_is_first(scorer: Scorer) -> None:
    def answer(body: dict[str, Any], _: Any) -> tuple[int, bytes]:
        time.sleep(0.1 if len(body["completions"][0]) == 1 else 0)  # the first part is the last
        return 200, lengths(body)

    scorer.answer = answer
    reward = reward_of(scorer, batch_rows=3, concurrency=2, columns=["answer"])
    assert reward.score(batch(10)) == list(range(1, 11))
    assert sorted(len(body["completions"]) for body in scorer.asked) == [1, 3, 3, 3]
    assert all(body["columns"].keys() == {"answer"} for body in scorer.asked)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [1, 2]}', "answered 2 scores for 3 completions"),
        (b'{"scores": [1, null, 3]}', "answered the score None, no number"),
        (b'{"scores": [1, "NaN", 3]}', "answered the score 'NaN', no number"),
        (b'{"scores": [1, true, 3]}', "answered the score True, no number"),
        (b"<html>busy</html>", r"answered '<html>busy</html>', not JSON of the form"),
        (b'{"score": [1]}', r"answered \"\{'score': \[1\]\}\", not JSON of the form"),
        (b"[1, 2, 3]", "not JSON of the form"),
    ],
)
def test_answers_that_are_none_name_the_source_and_rows(
    scorer: Scorer, body: bytes, message: str
) -> None:
    scorer.answer = lambda asked, _: (200, body)
    with pytest.raises(TrainingError, match=message) as fault:
        reward_of(scorer).score(batch())
    text = str(fault.value)
    assert text.startswith(f"reward localhost ({scorer.url}): it answered ")
    assert text.endswith("(rows 0 to 2, prompts at p.jsonl:1, p.jsonl:2, p.jsonl:3)")


def test_a_score_that_is_not_finite_leaves_its_row(scorer: Scorer) -> None:
    scorer.answer = lambda asked, _: (200, b'{"scores": [1, NaN, Infinity]}')
    with pytest.raises(NotFinite, match="reward localhost returned nan for 2 of 3") as fault:
        reward_of(scorer).score(batch())
    assert [row["row"] for row in fault.value.rows] == [1, 2]


def test_the_part_at_fault_is_named(scorer: Scorer) -> None:
    def answer(body: dict[str, Any], _: Any) -> tuple[int, bytes]:
        if body["columns"]["answer"][0] == 4:
            return 400, b'{"error": {"message": "too long"}}'
        return 200, lengths(body)

    scorer.answer = answer
    message = r"status 400: too long \(rows 4 to 5, prompts at p\.jsonl:5, p\.jsonl:6\)"
    with pytest.raises(TrainingError, match=message):
        reward_of(scorer, batch_rows=2, concurrency=1).score(batch(9))
    assert len(scorer.asked) < 5  # what had not begun was not asked


def test_busy_servers_and_lost_connections_are_asked_again(scorer: Scorer) -> None:
    def answer(body: dict[str, Any], handler: Any) -> tuple[int, bytes]:
        if len(scorer.asked) == 1:
            return 503, b"later"
        if len(scorer.asked) == 2:
            return 429, b"slowly"
        if len(scorer.asked) == 3:  # dies in the middle of its answer
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"scores": [1')
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            return 0, b""
        return 200, lengths(body)

    scorer.answer = answer
    assert reward_of(scorer, retries=3).score(batch()) == [1, 2, 3]
    scorer.asked.clear()
    with pytest.raises(TrainingError, match=r"status 429: slowly \(tried 2 times\)"):
        reward_of(scorer, retries=1).score(batch())


def test_a_slow_server_is_given_up(scorer: Scorer) -> None:
    done = threading.Event()
    scorer.answer = lambda asked, _: (done.wait(20), (200, b"{}"))[1]
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"no answer within 0\.2 seconds .*rows 0 to 2"):
        reward_of(scorer, timeout_seconds=0.2).score(batch())
    assert time.monotonic() - began < 5
    done.set()


def test_nobody_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    reward = HttpReward(HttpEntry(http=f"http://127.0.0.1:{port}", retries=0))
    with pytest.raises(TrainingError, match="refused"):
        reward.score(batch())


# --- secrets ---


def test_the_secret_is_sent_and_never_said(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_KEY", "s3cret\n")
    assert reward_of(scorer, auth_env="SCORER_KEY").score(batch()) == [1, 2, 3]
    assert scorer.headers[-1]["Authorization"] == "Bearer s3cret"
    assert reward_of(scorer, auth_env="SCORER_KEY", auth_header="X-Key").score(batch()) == [1, 2, 3]
    assert scorer.headers[-1]["X-Key"] == "s3cret" and "Authorization" not in scorer.headers[-1]
    scorer.answer = lambda asked, handler: (401, b"no: " + handler.headers["X-Key"].encode())
    with pytest.raises(TrainingError, match=r"status 401: no: \*\*\*") as fault:
        reward_of(scorer, auth_env="SCORER_KEY", auth_header="X-Key", retries=3).score(batch())
    assert len(scorer.asked) == 3  # what is refused is not asked again
    assert "s3cret" not in str(fault.value)


@pytest.mark.parametrize(("value", "state"), [("", "not set"), ("a\nb", "no single line")])
def test_a_secret_that_is_not_there(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, value: str, state: str
) -> None:
    monkeypatch.setenv("SCORER_KEY", value)
    with pytest.raises(ConfigError, match=f"variable SCORER_KEY, .* is {state}"):
        reward_of(scorer, auth_env="SCORER_KEY")


# --- TLS ---


@TLS
def test_a_certificate_is_verified(scorer: Scorer) -> None:
    with pytest.raises(TrainingError, match=r"(?i)certificate") as fault:
        reward_of(scorer, retries=5).score(batch())
    assert "tried" not in str(fault.value) and scorer.asked == []
    assert reward_of(scorer, ca_file=CERTIFICATE).score(batch()) == [1, 2, 3]


@TLS
def test_a_certificate_of_another_host_is_refused(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: own("127.0.0.1", *rest))
    other = scorer.url.replace("localhost", "other.example")
    with pytest.raises(TrainingError, match=r"(?i)mismatch"):
        reward_of(scorer, http=other, ca_file=CERTIFICATE).score(batch())


def test_a_file_without_certificates(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=r"empty\.pem holds no certificates"):
        reward_of(scorer, http="https://localhost/", ca_file=str(tmp_path / "empty.pem"))
