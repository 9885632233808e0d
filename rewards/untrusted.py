"""What a judge gets to see of a text written by a policy under training.

The graded text may imitate the judge's own protocol: chat-template specials, thinking tags, verdicts, look-alikes of
the nonce line. In the judge's view these are turned into inert words; the rollout itself is never changed. What this
does not cover is persuasion in plain language, which the evidence check and calibration have to catch.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_RESERVED = re.compile(
    r"""
      </?[|\uff5c][^<>\n]{0,80}>                           # <|im_start|>, DeepSeek's full-width specials, DSML tags
    | </?(?:think|thinking|tool_calls?|tool_response|tools?|function_calls?|invoke|parameter|score|answer|verdict
         |system|user|assistant|start_of_turn|end_of_turn|bos|eos|s)(?:\s[^<>\n]{0,80})?>
    | \[/?INST\] | <</?SYS>>
    | \\boxed\b
    | \[\[[A-Za-z0-9]{1,3}\]\]
    | \bGRADE\s*:
    | "(?:verdicts?|n|nonce|criteria_met)"\s*:
    | \bJudge\s+[0-9a-f]{4,32}\b
    | (?:^|\s)(?:Criterion|Text)\s*:
    | \b[0-9a-f]{4,32}\s+(?:met|unmet|cannot_assess)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class JudgeView:
    """A text made safe to show to a judge, and how many reserved markers it held."""

    text: str
    num_neutralised: int


def judge_view(text: str) -> JudgeView:
    """Drop invisible characters and turn every reserved marker into plain words, ``<think>`` into ``(think)``.

    Repeats until nothing is left to replace, since removing one marker may join the halves of another; it ends because
    every replacement takes away a bracket, colon, quote, backslash or blank that all markers need.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    total = len(text) - len(visible)
    while True:
        visible, count = _RESERVED.subn(_inert, visible)
        if count == 0:
            return JudgeView(visible, total)
        total += count


def _inert(match: re.Match[str]) -> str:
    """The marker's words, joined by hyphens so that the result cannot match again."""
    lead = " " if match.group()[:1].isspace() else ""
    return f"{lead}({'-'.join(_WORD.findall(match.group()))})"
