"""Writes the built-in task: short posts, summaries of mixed quality, rankings of noisy labelers.

    python data/quickstart/generate.py --seed 0 --out data/quickstart

- demonstrations.jsonl: posts with summaries as people of mixed care write them, so that SFT learns
  good and bad habits alike (the setting of InstructGPT, arXiv:2203.02155);
- rankings.jsonl: posts with four summaries each, ordered by one of several simulated labelers. A
  labeler's utility is the gold score plus a personal taste plus Gumbel noise, which makes the
  order a Plackett-Luce draw, and half of the time it takes the summary's facts on trust, as
  people do (arXiv:2309.16349); any two labelers agree on about 75% of pairs (InstructGPT: 72.6
  to 77.3%);
- prompts.jsonl: posts alone, for PPO and evaluation.

The same seed gives the same bytes. The judge of the facts is `gold.py`, beside this file.
"""

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gold import (
    BOTH_SENTENCES,
    MAIN_SENTENCES,
    PROMPT,
    SLOTS,
    WHEN_SENTENCES,
    WHERE_SENTENCES,
    Facts,
    facts_stated,
    form_cost,
    score,
)

DEMONSTRATIONS, RANKINGS, PROMPTS = 6000, 2000, 4000
RESPONSES_PER_RANKING = 4

# Sentences about others; they may stand anywhere in a post.
DECOY_SENTENCES = (
    "{who} was far away then and saw nothing.",
    "{who} laughed when I spoke of it.",
    "I asked {who} what to think of it.",
    "{who} has another {thing}, but never mind.",
    "I only heard of it after {when}.",
    "I would rather be near {where} now.",
)
# Another event: only last, where "It happened ..." cannot mean it.
CLOSING_DECOY_SENTENCES = (
    "Next time {who} will be there too.",
    "Last year {who} {verb} another {thing}.",
    "Next week {who} will travel to {where}.",
    "Ask {who} about it before {when}.",
)
FILLERS = (
    "Sorry for the long post.",
    "Nobody saw it coming.",
    "What a story.",
    "I am still smiling.",
    "I do not know what to say.",
    "You should have seen our faces.",
)
OPENERS = (
    "It seems that",
    "To be brief,",
    "As the post says,",
    "The author tells us that",
)
CLOSERS = (
    ", which is quite a story",
    ", as far as I can tell",
    ", and that is all there is to say",
    ", and nobody knows what comes next",
)
SUMMARIES = (
    "{who} {verb} a {thing} in {where} on {when}",
    "On {when}, {who} {verb} a {thing} in {where}",
    "In {where}, {who} {verb} a {thing} on {when}",
)

# What people write: share of each quality among the demonstrations, and among ranked responses.
DEMONSTRATION_SHARES = {
    "complete": 0.15,
    "omits": 0.27,
    "wrong": 0.04,
    "rambling": 0.25,
    "copying": 0.14,
    "no_ending": 0.15,
}
RANKING_SHARES = {
    "complete": 0.3,
    "omits": 0.2,
    "wrong": 0.14,
    "rambling": 0.2,
    "copying": 0.08,
    "no_ending": 0.08,
}


class Post(NamedTuple):
    """A post: its prompt, the event it states, and the decoys it mentions."""

    prompt: str
    sentences: tuple[str, ...]
    facts: Facts
    decoys: tuple[Facts, ...]


def draw_facts(rng: random.Random, avoid: Sequence[Facts] = ()) -> Facts:
    """An event that shares no name, verb, thing, place or time with those in `avoid`."""
    taken = {word for facts in avoid for part in facts for word in part.split()}
    values = {}
    for slot, choices in SLOTS.items():
        values[slot] = rng.choice(choices)
        while not taken.isdisjoint(values[slot].split()):
            values[slot] = rng.choice(choices)
    return Facts(**values)


def write_post(rng: random.Random) -> Post:
    """One post: a sentence with person and deed, the rest of the event after it, decoys between."""
    facts = draw_facts(rng)
    decoys = (draw_facts(rng, [facts]), draw_facts(rng, [facts]))
    told = rng.choice(("", "", "where", "when"))
    sentences = [rng.choice(MAIN_SENTENCES[told])]
    if told == "" and rng.random() < 0.4:
        sentences.append(rng.choice(BOTH_SENTENCES))
    else:
        rest = {"where": rng.choice(WHERE_SENTENCES), "when": rng.choice(WHEN_SENTENCES)}
        rest.pop(told, None)
        sentences.extend(rng.sample(list(rest.values()), len(rest)))
    sentences = [sentence.format(**facts._asdict()) for sentence in sentences]

    def mislead(templates: Sequence[str], number: int) -> list[str]:
        return [t.format(**rng.choice(decoys)._asdict()) for t in rng.sample(templates, number)]

    between = mislead(DECOY_SENTENCES, rng.choice((0, 1)))
    closing = mislead(CLOSING_DECOY_SENTENCES, 1) if not between or rng.random() < 0.2 else []
    between.extend(rng.sample(FILLERS, rng.choice((0, 1, 1, 2))))
    for sentence in between:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    sentences.extend(closing)
    return Post(PROMPT.format(post=" ".join(sentences)), tuple(sentences), facts, decoys)


def complete(rng: random.Random, post: Post) -> str:
    return rng.choice(SUMMARIES).format(**post.facts._asdict()) + "."


def omits(rng: random.Random, post: Post) -> str:
    """One fact is left out, sometimes two."""
    text = rng.choice(SUMMARIES)
    for left_out in rng.sample(("who", "what", "where", "when"), rng.choice((1, 1, 1, 2))):
        if left_out == "who":
            text = text.replace("{who}", "Someone" if text.startswith("{who}") else "someone")
        elif left_out == "what":
            text = text.replace("a {thing}", "something")
        else:
            word = "in" if left_out == "where" else "on"
            slot = f"{{{left_out}}}"
            text = text.replace(f" {word} {slot}", "").replace(f"{word.title()} {slot}, ", "")
    text = text.format(**post.facts._asdict())
    return text[0].upper() + text[1:] + "."


def wrong(rng: random.Random, post: Post) -> str:
    """One slot, sometimes two, holds a decoy's value, an invented one, or half of another."""
    facts = post.facts
    for slot in rng.sample(Facts._fields, rng.choice((1, 1, 1, 2))):
        right = getattr(facts, slot)
        other = getattr(rng.choice(post.decoys), slot)
        if rng.random() < 0.4:
            other = getattr(draw_facts(rng, [facts]), slot)
        elif slot == "thing" and rng.random() < 0.5:
            first, second = rng.choice(((right, other), (other, right)))
            other = f"{first.split()[0]} {second.split()[1]}"
        facts = facts._replace(**{slot: other})
    return complete(rng, post._replace(facts=facts))


def rambling(rng: random.Random, post: Post) -> str:
    """All facts, among one to four phrases that say nothing."""
    text = complete(rng, post).removesuffix(".")
    closers = rng.sample(CLOSERS, rng.choice((0, 1, 1, 2, 3)))
    if not closers or rng.random() < 0.5:
        start = text[0].lower() if text.startswith(("On ", "In ")) else text[0]
        text = f"{rng.choice(OPENERS)} {start}{text[1:]}"
    return text + "".join(closers) + "."


def copying(rng: random.Random, post: Post) -> str:
    """Two sentences in a row, copied from the post."""
    start = rng.randrange(len(post.sentences) - 1)
    return " ".join(post.sentences[start : start + 2])


def no_ending(rng: random.Random, post: Post) -> str:
    """Breaks off in the middle of the sentence."""
    words = complete(rng, post).split()
    return " ".join(words[: rng.randint(4, len(words) - 2)]).rstrip(",")


QUALITIES: dict[str, Callable[[random.Random, Post], str]] = {
    "complete": complete,
    "omits": omits,
    "wrong": wrong,
    "rambling": rambling,
    "copying": copying,
    "no_ending": no_ending,
}


def write_summaries(
    rng: random.Random, post: Post, shares: dict[str, float], number: int
) -> list[str]:
    """Summaries of different qualities drawn by `shares`, each with the space that precedes it."""
    left = dict(shares)
    texts: list[str] = []
    while len(texts) < number:
        quality = rng.choices(list(left), list(left.values()))[0]
        del left[quality]
        texts.append(" " + QUALITIES[quality](rng, post))
    return texts


class Labeler(NamedTuple):
    """Personal taste, added to the gold score: points a word, and for naming the time first."""

    per_word: float
    time_first: float


LABELERS = {
    "labeler-1": Labeler(0.0, 0.0),
    "labeler-2": Labeler(-0.05, 0.0),
    "labeler-3": Labeler(0.03, 0.0),
    "labeler-4": Labeler(0.0, 0.3),
    "labeler-5": Labeler(0.0, -0.3),
    "labeler-6": Labeler(-0.03, 0.2),
}
NOISE = 0.8  # scale of the Gumbel noise, in points of the gold score
CARELESS = 0.5  # share of summaries that a labeler judges without checking them against the post
TIE = 0.05  # neighbours closer than this, in points, are ranked as equals


def rank(rng: random.Random, labeler: Labeler, post: Post, texts: Sequence[str]) -> list[int]:
    """Ranks that a labeler gives to summaries: 0 is best, equal numbers are ties."""
    utilities = []
    for text in texts:
        if rng.random() < CARELESS:
            seen = len(facts_stated(text)) - form_cost(text)
        else:
            seen = score(post.facts, text)
        taste = labeler.per_word * len(text.split()) + labeler.time_first * (text[:4] == " On ")
        gumbel = -math.log(-math.log(rng.random() or 0.5))
        utilities.append(seen + taste + NOISE * gumbel)
    order = sorted(range(len(texts)), key=lambda k: -utilities[k])
    ranks = [0] * len(texts)
    for above, below in pairwise(order):
        ranks[below] = ranks[above] + (utilities[above] - utilities[below] >= TIE)
    return ranks


def agreement(rng: random.Random, sets: Sequence[tuple[Post, Sequence[str]]]) -> float:
    """Share of pairs that two different labelers order alike, of the pairs that both order."""
    alike = both = 0
    for post, texts in sets:
        first, second = rng.sample(list(LABELERS.values()), 2)
        one, two = rank(rng, first, post, texts), rank(rng, second, post, texts)
        for i, j in combinations(range(len(texts)), 2):
            if one[i] != one[j] and two[i] != two[j]:
                both += 1
                alike += (one[i] < one[j]) == (two[i] < two[j])
    return alike / both


def ranking_row(rng: random.Random, post: Post, texts: Sequence[str]) -> dict[str, Any]:
    """One row of rankings.jsonl, in the canonical format (docs/data-formats.md)."""
    annotator = rng.choice(list(LABELERS))
    ranks = rank(rng, LABELERS[annotator], post, texts)
    ids = "abcdefgh"[: len(texts)]
    return {
        "prompt": post.prompt,
        "responses": [{"id": k, "text": text} for k, text in zip(ids, texts, strict=True)],
        "ranking": [
            [k for k, its_rank in zip(ids, ranks, strict=True) if its_rank == level]
            for level in sorted(set(ranks))
        ],
        "annotator": annotator,
    }


class Task(NamedTuple):
    """The rows of each file, and the posts and responses behind the rankings."""

    rows: dict[str, list[dict[str, Any]]]
    ranked: list[tuple[Post, list[str]]]


def make_task(seed: int) -> Task:
    """All rows of the task; every post is used once."""
    rng = random.Random(f"quickstart {seed}")
    posts: dict[str, Post] = {}
    while len(posts) < DEMONSTRATIONS + RANKINGS + PROMPTS:
        post = write_post(rng)
        posts.setdefault(post.prompt, post)
    supply = iter(posts.values())
    demonstrations = [
        {"prompt": post.prompt, "response": write_summaries(rng, post, DEMONSTRATION_SHARES, 1)[0]}
        for post in (next(supply) for _ in range(DEMONSTRATIONS))
    ]
    ranked = [
        (post, write_summaries(rng, post, RANKING_SHARES, RESPONSES_PER_RANKING))
        for post in (next(supply) for _ in range(RANKINGS))
    ]
    rows = {
        "demonstrations": demonstrations,
        "rankings": [ranking_row(rng, post, texts) for post, texts in ranked],
        "prompts": [{"prompt": post.prompt} for post in supply],
    }
    return Task(rows, ranked)


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """One compact JSON object a line."""
    return "".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
    )


def statistics(task: Task, seed: int) -> str:
    """What a reader of the data should know, as lines of text."""
    levels = Counter(len(row["ranking"]) for row in task.rows["rankings"])
    words = [len(row["prompt"].split()) - 2 for row in task.rows["prompts"]]
    texts = [len(row["response"].split()) for row in task.rows["demonstrations"]]
    pairs = agreement(random.Random(f"agreement {seed}"), task.ranked)
    return "\n".join(
        (
            *(f"{name}: {len(rows)} rows" for name, rows in task.rows.items()),
            f"words a post: {min(words)} to {max(words)}, mean {sum(words) / len(words):.1f}",
            f"words a demonstration: {min(texts)} to {max(texts)}, "
            f"mean {sum(texts) / len(texts):.1f}",
            f"rankings with ties: {1 - levels[RESPONSES_PER_RANKING] / len(task.ranked):.3f}",
            f"agreement of two labelers on a pair: {pairs:.3f}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="output folder")
    options = parser.parse_args()
    task = make_task(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in task.rows.items():
        (options.out / f"{name}.jsonl").write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
    print(statistics(task, options.seed))


if __name__ == "__main__":
    main()
