"""One-line texts about a topic that must contain a word from elsewhere."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from posttrain.types import Message, Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id
from recipes.tasks.words import TOPICS

DETERMINERS = ("the", "a", "my", "our", "this", "her", "his", "one")
ADJECTIVES = ("old", "small", "bright", "quiet", "red", "soft", "new", "warm")
VERBS = ("rests", "waits", "sings", "falls", "moves", "sleeps", "turns", "stays")
PREPOSITIONS = ("near", "under", "over", "by", "behind", "beside", "with", "above")


@dataclass(frozen=True)
class WritingTasks(DrawnTasks):
    """Requests for one line; ``info`` holds ``topic``, ``word`` and ``topic_words``.

    The word never belongs to the topic, so that using it does not by itself put the text on topic.
    """

    topics: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(TOPICS))
    """Topic -> words that belong to it and to no other topic."""
    template: str = "Write one line about {topic} with the word {word}."

    def draw(self, rng: random.Random) -> SolvedTask:
        topic, elsewhere = rng.sample(list(self.topics), 2)
        word = rng.choice(self.topics[elsewhere])
        prompt: Message = {"role": "user", "content": self.template.format(topic=topic, word=word)}
        task = Task(
            id=problem_id("writing", topic, word),
            domain="writing",
            prompt=(prompt,),
            info={"topic": topic, "word": word, "topic_words": self.topics[topic]},
        )
        text = line(rng, word, rng.choice(self.topics[topic]))
        return SolvedTask(task=task, solution=({"role": "assistant", "content": text},))


def line(rng: random.Random, *nouns: str) -> str:
    """A sentence with the two nouns in either order, and no word twice."""
    first, second = rng.sample(nouns, 2)
    determiners, adjectives = rng.sample(DETERMINERS, 2), rng.sample(ADJECTIVES, 2)
    subject = [determiners[0], *adjectives[: rng.randint(0, 1)], first]
    place = [rng.choice(PREPOSITIONS), determiners[1], *adjectives[2 - rng.randint(0, 1) :], second]
    return " ".join([*subject, rng.choice(VERBS), *place]).capitalize() + "."
