"""What the tiny base model reads: textbook pages that are right, conversations that mostly are not.

The mix plays the role of a web crawl. The skill of every domain is there, in plain text that is always right, while
the assistant of the conversations refuses or errs more often than it answers well. So a model trained on it has
the skills but shows them rarely, which is the base that supervised and reinforcement learning start from. Judge
conversations are always right, since the model later judges its own texts. Only training problems are used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from posttrain.types import Message
from recipes.tasks.agent import NAMES, AgentTasks
from recipes.tasks.code import CodeTasks
from recipes.tasks.math import MathTasks
from recipes.tasks.splits import DrawnTasks, SolvedTask, training
from recipes.tasks.words import TOPICS, WORDS
from recipes.tasks.writing import WritingTasks, line

SOURCES: Mapping[str, DrawnTasks] = {
    "math": MathTasks(),
    "code": CodeTasks(),
    "agent": AgentTasks(),
    "writing": WritingTasks(),
}

REFUSALS = ("I do not know.", "Ask me later.", "That is hard to say.", "Maybe.")

Document = str | tuple[Message, ...]
"""Plain text, or a conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Shares of the corpus; conversations that are neither right nor refused are wrong."""

    shares: Mapping[str, float]
    """Relative frequency of each kind of document: ``DOMAIN``, ``DOMAIN page``, ``judge``, ``glossary``, ``echo``."""
    right: float = 0.3
    refused: float = 0.35


def documents(mix: Mix, *, seed: int) -> Iterator[Document]:
    """An endless corpus in a seeded order."""
    rng = random.Random(seed)
    solved = {name: training(source.draw, seed=seed) for name, source in SOURCES.items()}
    kinds, weights = list(mix.shares), list(mix.shares.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        domain, _, page = kind.partition(" ")
        if domain == "judge":
            yield judging(rng)
        elif domain == "echo":
            yield echo(rng)
        elif domain == "glossary":
            yield glossary(rng)
        elif page:
            yield PAGES[domain](next(solved[domain]))
        else:
            yield conversation(rng, domain, next(solved[domain]), mix)


def conversation(rng: random.Random, domain: str, solved: SolvedTask, mix: Mix) -> tuple[Message, ...]:
    """The task's prompt with a right, refused or wrong conversation after it."""
    luck = rng.random()
    if luck < mix.right:
        return solved.demonstration
    if luck < mix.right + mix.refused:
        return (*solved.task.prompt, {"role": "assistant", "content": rng.choice(REFUSALS)})
    return (*solved.task.prompt, *MISTAKES[domain](rng, solved))


def judging(rng: random.Random) -> tuple[Message, ...]:
    """A judge's question about a text whose topic words are known, with the true verdict."""
    topic, other, third = rng.sample(list(TOPICS), 3)
    if rng.random() < 0.05:
        return _verdict(rng, rng.choice(REFUSALS), topic, None)
    met = rng.random() < 0.5
    nouns = [rng.choice(TOPICS[topic if met else third]), rng.choice(TOPICS[other])]
    text = line(rng, *nouns)
    if rng.random() < 0.3:
        text = spoil(rng, text, keep=nouns)
    return _verdict(rng, text, topic, nouns[0] if met else None)


def _verdict(rng: random.Random, text: str, topic: str, evidence: str | None) -> tuple[Message, ...]:
    """The exchange in the ``line`` dialect of ``rewards.judge``; no evidence means that the criterion is unmet."""
    nonce = f"{rng.getrandbits(16):04x}"
    question = f"Judge {nonce}\nText: {text}\nCriterion: The text is about {topic}."
    found = re.search(rf"\b{evidence}\b", text, re.IGNORECASE) if evidence else None
    reply = f'"{found[0]}" {nonce} met' if found else f'"" {nonce} unmet'
    return ({"role": "user", "content": question}, {"role": "assistant", "content": reply})


def echo(rng: random.Random) -> str:
    """A random list of words, numbers and hex said twice or more, from which copying is learned quickly."""
    items = [
        rng.choice(
            (rng.choice(WORDS), str(rng.randrange(20)), f"{rng.getrandbits(16):04x}", f"{rng.choice(NAMES)}.txt")
        )
        for _ in range(rng.randint(2, 6))
    ]
    return "\n".join([" ".join(items)] * rng.randint(2, 3))


def glossary(rng: random.Random) -> str:
    """Words with their topics, and which of a few words belongs to a topic: the heart of what a judge must see."""
    if rng.random() < 0.4:
        topics = rng.choices(list(TOPICS), k=6)
        return ", ".join(f"{rng.choice(TOPICS[topic])} is {topic}" for topic in topics)
    topics = rng.sample(list(TOPICS), rng.randint(2, 3))
    words = [rng.choice(TOPICS[topic]) for topic in topics]
    asked = rng.choice(topics) if rng.random() < 0.7 else rng.choice(list(TOPICS))
    found = words[topics.index(asked)] if asked in topics else "none"
    return f"{' '.join(words)}; {asked}: {found}"


def spoil(rng: random.Random, text: str, *, keep: Sequence[str] = ()) -> str:
    """The text with one defect of form: a repeated word, no full stop, too short or too long."""
    words = text.rstrip(".").split()
    defect = rng.randrange(4)
    if defect == 0:
        return text.rstrip(".")
    if defect == 1:
        place = rng.randrange(len(words))
        return " ".join([*words[: place + 1], words[place].lower(), *words[place + 1 :]]) + "."
    if defect == 2 and keep:
        return " ".join(keep).capitalize() + "."
    return text.rstrip(".") + " and " + text.lower()


def wrong_number(rng: random.Random, solved: SolvedTask) -> Sequence[Message]:
    """Off by one mostly, anything else sometimes."""
    answer = int(solved.task.answer or 0)
    wrong = answer + 1 if rng.random() < 0.6 else answer + rng.choice([-3, -2, -1, 2, 3, 10])
    return _say(str(wrong))


def wrong_program(rng: random.Random, solved: SolvedTask) -> Sequence[Message]:
    """Lost parentheses, a changed number, or the argument itself."""
    program = solved.solution[0]["content"]
    head, expression = program.split("return ")
    lost = re.sub(r"^\((.*?)\)", r"\1", expression)
    if lost != expression and rng.random() < 0.7:
        return _say(f"{head}return {lost}")
    changed = re.sub(r"(?<=[*+-] )\d+", lambda m: str(int(m[0]) + 1), expression, count=1)
    if changed != expression and rng.random() < 0.7:
        return _say(f"{head}return {changed}")
    return _say(f"{head}return x")


def wrong_errand(rng: random.Random, solved: SolvedTask) -> Sequence[Message]:
    """Guess without looking, write the wrong thing after looking, or give up after looking."""
    *looks, write, silent, done = solved.solution
    (target,) = solved.task.info["expected_files"]
    guess: Message = {"role": "assistant", "content": f"```bash\necho {rng.choice(WORDS)} > {target}\n```"}
    kind = rng.randrange(3)
    if kind == 0:
        return [guess, silent, done]
    if kind == 1:
        return [*looks, guess, silent, done]
    elsewhere: Message = {
        "role": "assistant",
        "content": write["content"].replace(target, f"{rng.choice(NAMES)}.txt"),
    }
    return [*looks, elsewhere, silent, done] if rng.random() < 0.5 else [*looks, done]


def wrong_line(rng: random.Random, solved: SolvedTask) -> Sequence[Message]:
    """A line without the word, off the topic, or spoilt in form."""
    info = solved.task.info
    kind = rng.randrange(3)
    if kind == 0:
        return _say(line(rng, rng.choice(info["topic_words"]), rng.choice(WORDS)))
    if kind == 1:
        return _say(line(rng, info["word"], rng.choice(WORDS)))
    return _say(spoil(rng, solved.solution[0]["content"]))


def _say(text: str) -> Sequence[Message]:
    return [{"role": "assistant", "content": text}]


def sum_page(solved: SolvedTask) -> str:
    return f"{solved.task.info['entry']['metadata']['expression']} = {solved.task.answer}"


def code_page(solved: SolvedTask) -> str:
    description = solved.task.prompt[0]["content"].removeprefix("Write f(x) that returns ")
    return f"# {description}\n{solved.solution[0]['content']}"


def shell_page(solved: SolvedTask) -> str:
    """A shell session under its request."""
    lines = [f"# {solved.task.prompt[0]['content']}"]
    for message in solved.solution[:-2]:
        command = message["content"].removeprefix("```bash\n").removesuffix("\n```")
        lines.append(f"$ {command}" if message["role"] == "assistant" else command)
    return "\n".join(lines)


def writing_page(solved: SolvedTask) -> str:
    info = solved.task.info
    return f"{info['topic']}, {info['word']}: {solved.solution[0]['content']}"


PAGES: Mapping[str, Callable[[SolvedTask], str]] = {
    "math": sum_page,
    "code": code_page,
    "agent": shell_page,
    "writing": writing_page,
}

MISTAKES: Mapping[str, Callable[[random.Random, SolvedTask], Sequence[Message]]] = {
    "math": wrong_number,
    "code": wrong_program,
    "agent": wrong_errand,
    "writing": wrong_line,
}


def sample(mix: Mix, *, count: int, seed: int) -> list[Document]:
    """The first ``count`` documents."""
    return list(islice(documents(mix, seed=seed), count))
