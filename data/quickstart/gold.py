"""The facts of the built-in task's posts, and the judge in code that checks a summary against them.

A post states one event (who, what, where, when) among sentences about other people, things, places
and times. The sentences that state the event come from `FACT_SENTENCES`; `facts_of` inverts them,
so the judge needs nothing but the prompt's text and no dataset carries the answers.

`gold` follows TRL's reward-function convention. Evaluation alone uses it; no stage trains on it.

    score = facts right (0 to 4)
            - facts about which something else is said (0 to 4)
            - 0.25 for each word more than the shortest complete summary has
            - 1 if the text does not end with . ! or ?, or the model never ended it

clipped to [-4, 4]. "Anna lost a red bicycle in Oslo on Monday." scores 4 when all of
it is true, 3 without one fact, 2 with one fact wrong; the empty text scores -1.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

NAMES = tuple(
    "Anna Boris Carla Deniz Emeka Farid Greta Hana Ivan Jun Kofi Lena Mina Noor Omar Petra Quinn "
    "Rosa Sora Tariq Uma Vera Wanda Yusuf Aida Bruno Chen Dora Elif Felix Gita Hugo Ines Jonas "
    "Kira Luca Maya Nils Olga Pablo".split()
)
VERBS = tuple(
    "lost found sold bought painted repaired dropped borrowed cleaned packed rented wrapped".split()
)
ADJECTIVES = tuple(
    "red blue green white small heavy wooden broken yellow round cheap silver".split()
)
NOUNS = tuple(
    "bicycle lamp camera guitar wallet chair mirror carpet clock suitcase kettle drum tent vase "
    "ladder helmet basket blanket bottle bucket candle coat cup desk fan fork hammer hat jacket "
    "kite pillow plate puppet radio ring scarf".split()
)
PLACES = tuple(
    "Oslo Lima Cairo Paris Tokyo Delhi Quito Dublin Lagos Seoul Rome Boston Hanoi Prague Havana "
    "Berlin Accra Athens Bergen Busan Dakar Geneva Kyiv Lisbon Madrid Manila Milan Nairobi".split()
)
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
THINGS = tuple(" ".join(pair) for pair in product(ADJECTIVES, NOUNS))

PROMPT = "POST: {post}\nTL;DR:"

# Sentences that name the person and the deed, by what else they tell.
MAIN_SENTENCES = {
    "": (
        "My friend {who} {verb} a {thing}.",
        "Guess what, my cousin {who} {verb} a {thing}.",
        "This is about my friend {who}, who {verb} a {thing}.",
        "Believe it or not, my friend {who} {verb} a {thing}.",
    ),
    "where": (
        "My friend {who} {verb} a {thing} in {where}.",
        "This is how, in {where}, my cousin {who} {verb} a {thing}.",
    ),
    "when": (
        "My friend {who} {verb} a {thing} on {when}.",
        "This is how, on {when}, my cousin {who} {verb} a {thing}.",
    ),
}
# Sentences that tell the rest.
WHERE_SENTENCES = (
    "It happened in {where}.",
    "All this took place in {where}.",
    "We were in {where} when it happened.",
)
WHEN_SENTENCES = (
    "It happened on {when}.",
    "All this took place on {when}.",
    "It was late on {when} when it happened.",
)
BOTH_SENTENCES = (
    "It happened in {where} on {when}.",
    "All this took place on {when} in {where}.",
)
FACT_SENTENCES = (
    *(sentence for group in MAIN_SENTENCES.values() for sentence in group),
    *WHERE_SENTENCES,
    *WHEN_SENTENCES,
    *BOTH_SENTENCES,
)

BEST, WORST = 4.0, -4.0
SHORTEST = 9  # words of a complete summary: WHO VERB a ADJECTIVE NOUN in WHERE on WHEN
WORD_COST = 0.25
NO_END_COST = 1.0


class Facts(NamedTuple):
    """One event: `who` `verb` a `thing` at `where` on `when`."""

    who: str
    verb: str
    thing: str
    where: str
    when: str


SLOTS: dict[str, tuple[str, ...]] = {
    "who": NAMES,
    "verb": VERBS,
    "thing": THINGS,
    "where": PLACES,
    "when": DAYS,
}


def _one_of(words: Sequence[str]) -> str:
    return "(?:" + "|".join(words) + ")"


@lru_cache(maxsize=1)
def _fact_patterns() -> tuple[re.Pattern[str], ...]:
    groups = {slot: f"(?P<{slot}>{_one_of(words)})" for slot, words in SLOTS.items()}
    return tuple(
        re.compile(sentence.replace(".", r"\.").format(**groups)) for sentence in FACT_SENTENCES
    )


def sentences_of(prompt: str) -> list[str]:
    """The sentences of a prompt's post."""
    head, tail = PROMPT.split("{post}")
    return re.split(r"(?<=[.!?]) ", prompt.removeprefix(head).removesuffix(tail))


@lru_cache(maxsize=65536)
def facts_of(prompt: str) -> Facts:
    """The event that a post states, read back from its sentences.

    Raises:
        ValueError: the text is not a post of the built-in task.
    """
    found: dict[str, str] = {}
    for sentence in sentences_of(prompt):
        for pattern in _fact_patterns():
            if match := pattern.fullmatch(sentence):
                found.update(match.groupdict())
    if missing := set(Facts._fields) - set(found):
        raise ValueError(
            f"the gold judge finds no {', '.join(sorted(missing))} in {prompt[:80]!r}: it reads "
            "posts of the built-in task only; remove it from the config for other data"
        )
    return Facts(**found)


# Phrases that state a fact (a bag of words states none), and the words that mention one.
_PHRASES = {
    "who": re.compile(rf"\b({_one_of(NAMES)})(?:, who)? {_one_of(VERBS)}\b"),
    "what": re.compile(rf"\b({_one_of(VERBS)} a {_one_of(ADJECTIVES)} {_one_of(NOUNS)})\b"),
    "where": re.compile(rf"\b[Ii]n ({_one_of(PLACES)})\b"),
    "when": re.compile(rf"\b[Oo]n ({_one_of(DAYS)})\b"),
}
_WORDS = {
    "who": frozenset(NAMES),
    "what": frozenset((*VERBS, *ADJECTIVES, *NOUNS)),
    "where": frozenset(PLACES),
    "when": frozenset(DAYS),
}


def facts_stated(text: str) -> dict[str, list[str]]:
    """What a text states, true or not, for each of who, what, where and when that it states."""
    stated = {kind: phrase.findall(text) for kind, phrase in _PHRASES.items()}
    return {kind: values for kind, values in stated.items() if values}


def facts_right(facts: Facts, text: str) -> set[str]:
    """Which of who, what, where and when the text states as the post does."""
    true = {
        "who": facts.who,
        "what": f"{facts.verb} a {facts.thing}",
        "where": facts.where,
        "when": facts.when,
    }
    return {kind for kind, values in facts_stated(text).items() if true[kind] in values}


def facts_wrong(facts: Facts, text: str) -> set[str]:
    """For which of who, what, where and when the text mentions another than the post's event."""
    words = set(re.findall(r"\w+", text))
    own = {facts.who, facts.verb, *facts.thing.split(), facts.where, facts.when}
    return {kind for kind, vocabulary in _WORDS.items() if words & vocabulary - own}


def form_cost(text: str, ended: bool = True) -> float:
    """What a text loses by its form, whatever it says: needless words, no ending."""
    excess = max(0, len(text.split()) - SHORTEST)
    unended = not (ended and text.rstrip().endswith((".", "!", "?")))
    return WORD_COST * excess + NO_END_COST * unended


def score(facts: Facts, text: str, ended: bool = True) -> float:
    """Gold score of one summary, in [-4, 4]; see the head of this file."""
    balance = len(facts_right(facts, text)) - len(facts_wrong(facts, text))
    return min(BEST, max(WORST, balance - form_cost(text, ended)))


def _plain(text: str | Sequence[Mapping[str, str]]) -> str:
    """The text itself, or the contents of a conversation's turns."""
    return text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)


def gold(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    ended: Sequence[bool] | None = None,
    **columns: Any,
) -> list[float]:
    """Score completions by code that knows the facts; the text alone decides, and `ended`.

    Args:
        prompts: posts of the built-in task (`facts_of` reads them), N of them.
        completions: the summaries to judge, any text, N of them.
        completion_ids: not used; part of TRL's convention.
        ended: whether the model ended each completion itself; without it the text decides.
        columns: not used; part of TRL's convention.

    Returns:
        N scores in [-4, 4], higher is better.

    Raises:
        ValueError: a prompt is not a post of the built-in task.
    """
    ends = [True] * len(completions) if ended is None else ended
    return [
        score(facts_of(_plain(prompt)), _plain(completion), bool(end))
        for prompt, completion, end in zip(prompts, completions, ends, strict=True)
    ]
