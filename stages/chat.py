"""`rlhf chat TARGET`: a conversation with one policy of a run, or with two side by side.

What a user types is rendered with the chat template that the policy was trained under; a policy
trained on plain prompts completes each line as it stands. Answers appear token by token. Turn i
draws noise number i under the seed, so that the same seed and turns give the same answers, and two
policies that agree the same text.

    rlhf chat runs/quickstart
"""

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TextIO, TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.codec import PROMPTS_CUT
from pipeline.data.validate import nearest
from pipeline.errors import ConfigError, PipelineError
from pipeline.generation import Sampling, TextStream
from pipeline.models.trunk import Handle
from pipeline.records import Message, PromptText
from stages.targets import Target, fitted

Number = TypeVar("Number", int, float)
HELP = {
    "/help": "this list",
    "/base /sft /ppo": "talk to this policy of the run",
    "/both": "let two policies answer side by side: the two newest, or /both NAME NAME",
    "/clear": "forget the conversation",
    "/system TEXT": "a system message before it; without TEXT none",
    "/temperature X": "of sampling; 0 is greedy",
    "/max N": "longest answer, in tokens",
    "/seed N": "another number draws other answers",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer that is being written",
}


NO_SYSTEM = ""  # of `/system` without a text


@dataclass
class Settings:
    """How answers are drawn and prompts made."""

    temperature: float
    max_new_tokens: int
    seed: int = 1
    system: str | None = None  # None: the run's own, if it has one
    plain: bool = False  # complete the text as it stands, whatever the policy was trained on


@dataclass
class Turn:
    """What the user said, and each policy's answer."""

    user: str
    answers: dict[str, str] = field(default_factory=dict)

    def answer(self, name: str) -> str:
        """The answer of `name`, or another's where it was not asked."""
        return self.answers.get(name) or next(iter(self.answers.values()))


class Chat:
    """The conversation: its turns, who answers, and what is said on the way (`note`)."""

    def __init__(self, target: Target, settings: Settings, note: Callable[[str], None]) -> None:
        self.target = target
        self.settings = settings
        self.note = note
        self.turns: list[Turn] = []
        self.speakers: tuple[str, ...] = target.names[:1]
        self.noted: set[str] = set()

    def ask(self, text: str, hear: Callable[[str, str], None]) -> Turn:
        """The answers of all speakers; `hear` gets (name, piece) while they are written.

        An answer that Ctrl-C stops counts as far as it went.
        """
        turn = Turn(text)
        for name in self.speakers:
            turn.answers[name] = ""

            def heard(piece: str, name: str = name) -> None:
                turn.answers[name] += piece
                hear(name, piece)

            try:
                self._write(name, text, heard)
            except KeyboardInterrupt:
                self.note("(stopped)")
                break
        turn.answers = {name: answer for name, answer in turn.answers.items() if answer}
        if turn.answers:  # templates take no empty turns
            self.turns.append(turn)
        return turn

    def _write(self, name: str, text: str, heard: Callable[[str], None]) -> None:
        settings = self.settings
        handle = fitted(self.target.policy(name), settings.max_new_tokens)
        prompt = self._prompt(name, text, handle)
        if isinstance(prompt, str):
            handle = replace(handle, codec=handle.codec.of_plain_text())
        elif settings.system == NO_SYSTEM:
            handle = replace(handle, codec=handle.codec.without_system_prompt())
        ids = handle.codec.prompt_ids(prompt)
        if handle.codec.counts[PROMPTS_CUT]:
            self._note_once("the conversation is longer than the model reads: its start is cut off")
        sampling = Sampling(
            settings.max_new_tokens, temperature=settings.temperature, seed=settings.seed
        )
        stream = TextStream(handle.codec, conversation=not isinstance(prompt, str))

        def listener(_row: int, token: int) -> None:
            if piece := stream.put(token):
                heard(piece)

        self.target.engine.generate(handle, [ids], [len(self.turns)], sampling, listener)
        if piece := stream.end():
            heard(piece)

    def _prompt(self, name: str, text: str, handle: Handle) -> PromptText:
        if self.settings.plain or not handle.codec.answers_turns:
            if not self.settings.plain:
                self._note_once(
                    f"{name} was trained on plain prompts: each line is completed as it stands"
                )
            return text
        system = self.settings.system
        messages = [Message("system", system)] if system else []
        for turn in self.turns:
            messages += [Message("user", turn.user), Message("assistant", turn.answer(name))]
        return (*messages, Message("user", text))

    def _note_once(self, text: str) -> None:
        if text not in self.noted:
            self.noted.add(text)
            self.note(text)

    # --- commands ---

    def command(self, line: str) -> bool:
        """Do what a line `/NAME ARGUMENTS` says; whether the conversation goes on.

        Raises:
            ConfigError: there is no such command, or its argument is none.
        """
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit"):
            return False
        if name in ("base", "sft", "ppo", "policy"):
            self.choose(name)
        elif name == "both":
            self.choose(*(rest.split() or self.target.names[:2][::-1]), both=True)
        elif name == "clear":
            self.turns.clear()
        elif name == "system":
            self.settings.system = rest or NO_SYSTEM
        elif name == "temperature":
            self.settings.temperature = _number(float, rest, "/temperature 0.7", least=0)
        elif name == "max":
            self.settings.max_new_tokens = _number(int, rest, "/max 256", least=1)
        elif name == "seed":
            self.settings.seed = _number(int, rest, "/seed 1", least=0)
        elif name == "help":
            for usage, about in HELP.items():
                self.note(f"{usage:16} {about}")
        else:
            known = [word[1:] for usage in HELP for word in usage.split() if word[0] == "/"]
            guess = nearest(name, known)
            hint = f"did you mean /{guess}?" if guess else "/help lists them"
            raise ConfigError(f"no such command: /{name}: {hint} (a text that begins so: //...)")
        return True

    def choose(self, *names: str, both: bool = False) -> None:
        """Let these policies answer from now on; they are opened here.

        Raises:
            ConfigError: there is none of such a name, or there is no second one.
        """
        if both and len(set(names)) != 2:
            raise ConfigError(
                f"/both compares two policies; {self.target.resource} has "
                f"{', '.join(self.target.names)}"
            )
        for name in names:
            self.target.policy(name)
        self.speakers = names


def _number(kind: type[Number], text: str, example: str, least: int) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if least <= value < float("inf"):
            return value
    raise ConfigError(f"{text!r} is no number of at least {least}: write {example}")


# --- the terminal ---------------------------------------------------------------------------------


def talk(target: Target, settings: Settings, stage: str | None, stdin: TextIO) -> None:
    """Read lines and answer them until the input ends.

    On a terminal answers stream under a name; from a pipe each line is a turn, and what is printed
    are the answers alone (each under its name where two speak).
    """
    console, aside = Console(highlight=False), Console(stderr=True, highlight=False)
    live = stdin.isatty() and console.is_terminal
    out = console if live else aside
    chat = Chat(target, settings, lambda text: out.print(f"[dim]{escape(text)}[/dim]"))
    chat.choose(stage or target.names[0])
    if live:
        chat.note(f"{target.resource}: {', '.join(target.names)}; /help lists the commands")
    for line in _lines(chat, stdin, live):
        if line.startswith("/") and not line.startswith("//"):
            try:
                if not chat.command(line):
                    return
            except PipelineError as error:
                out.print(f"[bold red]error:[/bold red] {escape(str(error))}")
            continue
        text = line.removeprefix("/") if line.startswith("//") else line
        try:
            _show(chat, text, console, live)
        except PipelineError as error:
            if not live:
                raise
            out.print(f"[bold red]error:[/bold red] {escape(str(error))}")


def _lines(chat: Chat, stdin: TextIO, live: bool) -> Iterator[str]:
    """What the user types, line by line; a line that ends in a backslash goes on in the next."""
    if live:
        with suppress(ImportError):
            import readline  # noqa: F401  (`input` edits with it)
    pending = ""
    while True:
        try:
            if live:
                line = input("... " if pending else f"{' + '.join(chat.speakers)}> ")
            else:
                line = stdin.readline()
                if not line:
                    break
        except EOFError:
            _print("\n")
            break
        except KeyboardInterrupt:
            pending = ""
            _print("\n")
            chat.note("(Ctrl-D or /quit ends)")
            continue
        # A lone surrogate is what a terminal makes of bytes that are no UTF-8.
        line = pending + line.rstrip("\r\n").encode("utf-8", "replace").decode("utf-8")
        if line.endswith("\\"):
            pending = line[:-1] + "\n"
            continue
        pending = ""
        if line.strip():
            yield line
    if pending.strip():
        yield pending.rstrip("\n")


def _show(chat: Chat, text: str, console: Console, live: bool) -> None:
    if len(chat.speakers) == 1:
        chat.ask(text, lambda _name, piece: _print(printable(piece) if live else piece))
        _print("\n")
    elif live:
        with _side_by_side(chat.speakers, console) as hear:
            chat.ask(text, hear)
    else:
        turn = chat.ask(text, lambda _name, _piece: None)
        for name in chat.speakers:
            _print(f"{name}: {turn.answers.get(name, '')}\n")


def _print(text: str) -> None:
    """As it is: rich leaves signs of control out."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _side_by_side(names: Sequence[str], console: Console) -> Iterator[Callable[[str, str], None]]:
    """Two columns that grow."""
    texts = dict.fromkeys(names, "")

    def table() -> Table:
        columns = Table(expand=True)
        for name in names:
            columns.add_column(name, ratio=1)
        columns.add_row(*(Text(texts[name]) for name in names))
        return columns

    with Live(table(), console=console) as screen:  # what exceeds it is shown at the end

        def hear(name: str, piece: str) -> None:
            texts[name] += printable(piece)
            screen.update(table())

        yield hear


def printable(text: str) -> str:
    """Without characters that command a terminal: a model may write any."""
    return "".join(
        sign if sign in "\n\t" or unicodedata.category(sign) != "Cc" else "\ufffd" for sign in text
    )
