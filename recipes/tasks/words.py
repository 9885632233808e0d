"""Topics and the words that belong to them, shared by the agent and the writing tasks and by the tiny corpus."""

from __future__ import annotations

from collections.abc import Mapping

TOPICS: Mapping[str, tuple[str, ...]] = {
    "the sea": ("wave", "boat", "fish", "sand", "shell", "tide", "gull", "harbor"),
    "the garden": ("rose", "seed", "leaf", "soil", "bee", "root", "fern", "tulip"),
    "the kitchen": ("bread", "soup", "pan", "oven", "spoon", "cake", "kettle", "plate"),
    "winter": ("snow", "ice", "frost", "coat", "sled", "scarf", "glove", "skate"),
    "music": ("song", "drum", "harp", "choir", "tune", "flute", "bell", "piano"),
    "the night": ("moon", "star", "owl", "dream", "candle", "bat", "pillow", "comet"),
    "the city": ("street", "bus", "tram", "tower", "shop", "bridge", "crowd", "taxi"),
    "the farm": ("cow", "barn", "hay", "goat", "hen", "mill", "pig", "tractor"),
    "school": ("book", "pencil", "desk", "chalk", "lesson", "ruler", "map", "teacher"),
    "health": ("doctor", "nurse", "pill", "bandage", "fever", "clinic", "cough", "tooth"),
    "sport": ("ball", "goal", "team", "race", "medal", "coach", "stadium", "racket"),
    "money": ("coin", "bank", "wallet", "price", "tax", "loan", "safe", "salary"),
    "the forest": ("pine", "deer", "fox", "moss", "wolf", "bear", "acorn", "hunter"),
}

WORDS: tuple[str, ...] = tuple(word for words in TOPICS.values() for word in words)
