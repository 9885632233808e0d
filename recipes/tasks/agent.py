"""File errands in a sandbox, done through a shell: what must be written is known only after looking.

The policy runs a command by ending its turn with a ```bash block; the output comes back in a ``tool`` message. A
turn without a block ends the episode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.types import Message, SandboxSpec, Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id
from recipes.tasks.words import WORDS

NAMES = ("red", "blue", "green", "north", "south", "east", "west", "first", "last", "main")
SILENT = "(no output)"
"""What the tool message says when a command prints nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A request, the files it starts from, the commands that look and what they print, and what to write."""

    request: str
    files: Mapping[str, str]
    looks: Sequence[tuple[str, str]]
    target: str
    result: str


def copy_word(rng: random.Random, max_words: int) -> Errand:
    """Write the word that another file names."""
    source, target = _file_names(rng, 2)
    word = rng.choice(WORDS)
    return Errand(
        request=f"Write the word named in {source} to {target}.",
        files={source: f"The word is {word}"},
        looks=[(f"cat {source}", f"The word is {word}")],
        target=target,
        result=word,
    )


def follow_pointer(rng: random.Random, max_words: int) -> Errand:
    """Write the word in the file that another file names."""
    start, middle, target = _file_names(rng, 3)
    word = rng.choice(WORDS)
    return Errand(
        request=f"Find the file named in {start} and write its word to {target}.",
        files={start: f"See {middle}", middle: f"The word is {word}"},
        looks=[(f"cat {start}", f"See {middle}"), (f"cat {middle}", f"The word is {word}")],
        target=target,
        result=word,
    )


def join_words(rng: random.Random, max_words: int) -> Errand:
    """Write the words of two files on one line."""
    one, two, target = _file_names(rng, 3)
    words = rng.sample(WORDS, 2)
    lines = [f"The word is {word}" for word in words]
    return Errand(
        request=f"Write the words named in {one} and {two} to {target}.",
        files=dict(zip((one, two), lines, strict=True)),
        looks=[(f"cat {one} {two}", "\n".join(lines))],
        target=target,
        result=" ".join(words),
    )


def count_words(rng: random.Random, max_words: int) -> Errand:
    """Write how many words a file has."""
    source, target = _file_names(rng, 2)
    words = rng.sample(WORDS, rng.randint(1, max_words))
    return Errand(
        request=f"Count the words in {source} and write the number to {target}.",
        files={source: " ".join(words)},
        looks=[(f"cat {source}", " ".join(words))],
        target=target,
        result=str(len(words)),
    )


ERRANDS: tuple[Callable[[random.Random, int], Errand], ...] = (copy_word, follow_pointer, join_words, count_words)

EXPLANATION = (
    "You work in a folder through a shell. To run a command, end your message with\n"
    "```bash\n<command>\n```\nand its output comes back. When you are done, reply without a block."
)
"""A system message for models that read English."""


@dataclass(frozen=True)
class AgentTasks(DrawnTasks):
    """File errands. ``info["expected_files"]`` maps a path to the text that must be in it at the end."""

    errands: tuple[Callable[[random.Random, int], Errand], ...] = ERRANDS
    max_words: int = 5
    """Longest list that ``count_words`` asks to count."""
    system: str | None = None
    """A system message, such as ``EXPLANATION``."""

    def draw(self, rng: random.Random) -> SolvedTask:
        errand = rng.choice(self.errands)(rng, self.max_words)
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        task = Task(
            id=problem_id("agent", errand.request, sorted(errand.files.items())),
            domain="agent",
            prompt=(*system, {"role": "user", "content": errand.request}),
            sandbox=SandboxSpec(files={path: f"{text}\n".encode() for path, text in errand.files.items()}),
            info={"expected_files": {errand.target: f"{errand.result}\n"}},
        )
        return SolvedTask(task=task, solution=transcript(errand))


def transcript(errand: Errand) -> tuple[Message, ...]:
    """The conversation that does an errand: look, write, finish."""
    said: list[Message] = []
    for command, output in (*errand.looks, (f"echo {errand.result} > {errand.target}", SILENT)):
        said.append({"role": "assistant", "content": f"```bash\n{command}\n```"})
        said.append({"role": "tool", "content": output})
    return (*said, {"role": "assistant", "content": "Done."})


def _file_names(rng: random.Random, count: int) -> list[str]:
    return [f"{name}.txt" for name in rng.sample(NAMES, count)]
