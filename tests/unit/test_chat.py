"""`rlhf chat`: a pipe, a terminal, commands, history, and two policies side by side."""

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.records import Message
from stages.chat import Chat, Settings, printable
from stages.targets import Target, fitted
from tests.unit.tiny_policies import generated, make_run, rlhf

ROOT = Path(__file__).parents[2]
KOREAN = "노란 우산을 잃어버렸다 😀"
LINES = ["a red lamp", KOREAN, "Anna lost two keys"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policies were trained on plain prompts."""
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policies were trained on conversations."""
    return make_run(tmp_path_factory.mktemp("talkers"), conversations=True)


def chat_with(folder: Path, **settings: object) -> tuple[Chat, list[str]]:
    """A chat with what it notes."""
    notes: list[str] = []
    values = {"temperature": 1.0, "max_new_tokens": 12, **settings}
    return Chat(Target(str(folder), "cpu"), Settings(**values), notes.append), notes  # type: ignore[arg-type]


def answers(folder: Path, stage: str, *prompts: object) -> list[str]:
    """What `rlhf generate` writes for each prompt, as the first of its file."""
    found = []
    for prompt in prompts:
        (row,) = generated(folder, "-", "--stage", stage, stdin=json.dumps({"prompt": prompt}))
        found.append(str(row["response"]))
    return found


# --- a pipe ---------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_answered_as_generate_answers(run: Path, tmp_path: Path) -> None:
    lines = ["a red lamp", KOREAN, "POST: two keys.\nTL;DR:"]
    stdin = "\n".join([lines[0], "", lines[1], "POST: two keys.\\", "TL;DR:"])
    done = rlhf("chat", run, stdin=stdin)
    # Generated from one file: line i is turn i and draws its noise.
    stdin = "".join(json.dumps({"prompt": line}) + "\n" for line in lines)
    rows = generated(run, "-", stdin=stdin)
    assert [row["prompt"] for row in rows] == lines
    assert done.stdout == "".join(f"{row['response']}\n" for row in rows)
    assert "ppo was trained on plain prompts" in done.stderr


def test_both_show_what_each_policy_generates(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(LINES), encoding="utf-8")
    done = rlhf("chat", run, stdin="/both\n" + "\n".join(LINES))
    sft, ppo = (generated(run, tmp_path / "p.txt", "--stage", name) for name in ("sft", "ppo"))
    assert sft != ppo
    assert done.stdout == "".join(
        f"sft: {one['response']}\nppo: {other['response']}\n"
        for one, other in zip(sft, ppo, strict=True)
    )


def test_commands_of_a_pipe(run: Path) -> None:
    (sft,) = answers(run, "sft", "x y")
    done = rlhf("chat", run, stdin="/sft\nx y\n/quit\nnot any more\n")
    assert done.stdout == f"{sft}\n"
    assert rlhf("chat", run, "--stage", "sft", stdin="x y\n").stdout == f"{sft}\n"
    done = rlhf(
        "chat", run, stdin="/sfft\n/max none\n/temperature -1\n/both ppo ppo\n/base\n/help\n"
    )
    assert done.stdout == ""
    for message in (
        "no such command: /sfft: did you mean /sft?",
        "'none' is no number of at least 1: write /max 256",
        "'-1' is no number of at least 0: write /temperature 0.7",
        "/both compares two policies;",
        "has no policy 'base': there is ppo and sft",
        "/clear           forget the conversation",
    ):
        assert message in " ".join(done.stderr.split()).replace("/clear ", "/clear" + " " * 11)


@pytest.mark.parametrize("form", ["ppo/artifact", "export/adapter", "export/merged", "export"])
def test_every_form_of_a_policy_talks(run: Path, form: str) -> None:
    line = ("--temperature", 0, "--max-new-tokens", 6)
    expected = rlhf("chat", run, *line, stdin=KOREAN + "\n").stdout
    assert expected.strip()
    assert rlhf("chat", run / form, *line, stdin=KOREAN + "\n").stdout == expected


@pytest.mark.parametrize("target", ["none/here", "", "tiny/reward"])
def test_what_is_no_policy_is_refused(run: Path, target: str) -> None:
    done = rlhf("chat", run.parent / target, stdin="hello\n", code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bytes_that_are_no_text_do_not_end_it(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "chat", str(run), "--device", "cpu"],
        cwd=ROOT,
        input=b"caf\xe9\n" + KOREAN.encode() + b"\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    rows = generated(run, "-", stdin=f"caf\ufffd\n{KOREAN}\n")
    assert done.stdout.decode() == "".join(f"{row['response']}\n" for row in rows)


def test_a_run_folder_cannot_have_its_models_code_run(tmp_path: Path, run: Path) -> None:
    """It may come from elsewhere: only who types the command can say so."""
    shutil.copytree(run, tmp_path / "tiny")
    path = tmp_path / "tiny/config.yaml"
    text = path.read_text()
    path.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert path.read_text() != text
    assert not Target(str(tmp_path / "tiny"), "cpu").store.section.trust_remote_code
    asked = Target(str(tmp_path / "tiny"), "cpu", trust_code=True)
    assert asked.store.section.trust_remote_code


# --- the conversation -----------------------------------------------------------------------------


def test_the_history_is_rendered_and_each_policy_has_its_own(talker: Path) -> None:
    chat, _ = chat_with(talker, system="Be kind.")
    chat.choose("sft", "ppo", both=True)
    first = chat.ask("Hi", lambda *_: None)
    assert first.answers.keys() == {"sft", "ppo"}
    for name in ("sft", "ppo"):
        handle = fitted(chat.target.policy(name), 12)
        prompt = chat._prompt(name, "And you?", handle)
        assert prompt == (
            Message("system", "Be kind."),
            Message("user", "Hi"),
            Message("assistant", first.answers[name]),
            Message("user", "And you?"),
        )
    # What the model reads is the template's text of that conversation.
    text = handle.codec.tokenizer.decode(handle.codec.prompt_ids(prompt))
    answer = first.answers["ppo"]
    assert text == (
        f"\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: {answer}\n\nHuman: And you?\n\nAssistant:"
    )
    chat.command("/clear")
    chat.command("/system")
    assert chat._prompt("ppo", "x", handle) == (Message("user", "x"),)
    chat.settings.plain = True
    assert chat._prompt("ppo", "x", handle) == "x"


def test_a_first_turn_is_what_generate_answers_to_the_conversation(talker: Path) -> None:
    done = rlhf("chat", talker, stdin=f"{KOREAN}\n")
    prompt = [{"role": "user", "content": KOREAN}]
    assert done.stdout == answers(talker, "ppo", prompt)[0] + "\n"
    plain = rlhf("chat", talker, "--plain", stdin=f"{KOREAN}\n")
    assert plain.stdout == answers(talker, "ppo", KOREAN)[0] + "\n"
    assert done.stderr == plain.stderr == ""


def test_a_long_conversation_loses_its_start_and_says_so_once(talker: Path) -> None:
    chat, notes = chat_with(talker)
    for _ in range(3):
        chat.ask("word " * 120, lambda *_: None)
    assert notes == ["the conversation is longer than the model reads: its start is cut off"]
    assert len(chat.turns) == 3


def test_an_answer_that_is_stopped_counts_as_far_as_it_went(talker: Path) -> None:
    chat, notes = chat_with(talker)
    pieces: list[str] = []

    def hear(_name: str, piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    turn = chat.ask("Hi", hear)
    assert turn.answers == {"ppo": "".join(pieces)} and len(pieces) == 3
    assert chat.turns == [turn] and notes == ["(stopped)"]
    again = chat.ask("Go on", lambda *_: None)  # the engine is fit to go on
    assert len(again.answers["ppo"]) > 0


def test_settings_by_command(talker: Path) -> None:
    chat, _ = chat_with(talker)
    for line in ("/temperature 0.5", "/max 7", "/seed 3", "/system Be brief. 짧게"):
        assert chat.command(line)
    assert chat.settings == Settings(0.5, 7, 3, "Be brief. 짧게")
    with pytest.raises(ConfigError, match=r"'1\.5' is no number of at least 1"):
        chat.command("/max 1.5")
    with pytest.raises(ConfigError, match="'inf' is no number"):
        chat.command("/temperature inf")
    assert not chat.command("/quit")


def test_what_a_model_writes_commands_no_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b안😀") == "a\ufffd[2Jb\ufffd\ufffd\n\tc\ufffd안😀"


# --- a terminal -----------------------------------------------------------------------------------


def _in_a_terminal_of_its_own() -> None:
    """So that Ctrl-C reaches it, also where tests run in the background, which ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`rlhf chat` under a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stages", "chat", *arguments],
            cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_in_a_terminal_of_its_own,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "100", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        os.close(self.ours)

    def until(self, text: str) -> str:
        """What is shown up to `text`, from where the last call ended."""
        shown = b""
        end = time.monotonic() + 60
        while text.encode() not in shown:
            assert time.monotonic() < end, shown.decode("utf-8", "replace")
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    shown += os.read(self.ours, 4096)
                except OSError:  # its side is closed
                    break
        return shown.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def test_a_terminal_streams_edits_and_ends(run: Path) -> None:
    (sft,), (ppo,) = answers(run, "sft", KOREAN), answers(run, "ppo", KOREAN)
    with Terminal(str(run), "--device", "cpu") as terminal:
        assert "ppo, sft; /help lists the commands" in terminal.until("ppo> ")
        # Three letters taken back: of Korean, one each.
        terminal.type("우산을" + "\x7f" * 3 + KOREAN + "\n")
        assert printable(ppo) in terminal.until("ppo> ")
        terminal.type("/clear\n")
        terminal.until("ppo> ")
        terminal.type("\x03")
        assert "(Ctrl-D or /quit ends)" in terminal.until("ppo> ")
        terminal.type("/both\n")
        terminal.until("sft + ppo> ")
        terminal.type(KOREAN + "\n")
        shown = terminal.until("sft + ppo> ")
        assert "sft" in shown and "ppo" in shown and "│" in shown
        # Cells wrap: of both texts the first letters that stand on one line.
        for text in (sft, ppo):
            assert printable(text).split("\n")[0].strip()[:6] in shown
        terminal.type("\x04")
        terminal.until("nothing more")
        assert terminal.process.wait(30) == 0
