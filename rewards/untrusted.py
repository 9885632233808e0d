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
    | </?(?:think|thinking|tool_calls?|tool_response|tool_sep|tools?|function_calls?|invoke|parameter|arg_key|arg_value
         |score|answer|verdict|system|user|assistant|human|observation|start_of_turn|end_of_turn|start_of_image
         |bos|eos|eod|eot|pad|unk|mask|sop|eop|eoh|eoa|s
         |bos_token|eos_token|extra_id_\d+|reserved_\d+|special_\d+|unused\d+|tokens_unused_\d+
         |response|rubric|criterion|criteria|conversation)(?:\s[^<>\n]{0,80})?/?>
    | </?(?:function|parameter)=[^<>\n]{0,80}>             # Qwen3-Coder's calls
    | </?(?:seed|minimax):[^<>\n]{0,80}>                   # Seed-OSS and MiniMax
    | \]~[!b]?\[?b?\] | \[e~\[                             # MiniMax turns
    | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|THINK|ARGS|CALL_ID|gMASK
         |RESULT)\]                                        # Llama 2, Mistral, GLM, Prometheus
    | <</?SYS>>
    | ^[ \t]*\#{2,4}[ \t]*(?:Instruction|Input|Response|System|User|Human|Assistant)[ \t]*(?::|$)
    | \#{1,6}[ \t]*Final[ ]Score\b
    | ^[ \t]*(?:Human|Assistant|User|System)[ \t]*:        # plain-text chat formats
    | \\boxed\b
    | \[\[[A-Za-z0-9.]{1,4}\]\]
    | \bGRADE\s*:
    | "(?:verdicts?|n|nonce|criteria_met|score|rating|grade)"\s*:
    | \bJudge\s+[0-9a-f]{4,32}\b
    | (?:^|\s)(?:Criterion|Text)\s*:
    | \b[0-9a-f]{4,32}\s+(?:met|unmet|cannot_assess)\b
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)

# Not of category Cf, yet drawn as nothing: fillers, joiners and variation selectors, which also carry hidden text.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
_SUSPICIONS = {
    "override": re.compile(
        r"\b(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:instructions?|rules?|above|previous|prompt|criteri\w+|rubric)\b",
        re.IGNORECASE,
    ),
    "addresses_judge": re.compile(
        r"\b(?:dear|note\s+to(?:\s+the)?|attention|as\s+(?:a|the))\s+(?:judge|grader|evaluator|reviewer|rater)\b|\bsystem\s+note\b",
        re.IGNORECASE,
    ),
    "asks_for_verdict": re.compile(
        r"\b(?:judge|grade|mark|rate|score|count|consider)\s+(?:this|it|me|the\s+(?:response|reply|answer))\b[^.:\n]{0,30}"
        r"\b(?:as\s+)?(?:met|correct|full|perfect|highly|pass(?:ed)?|1\.0|10)\b|\b(?:answer|counts?\s+as)\s+(?:met|correct)\b",
        re.IGNORECASE,
    ),
    "claims_to_meet": re.compile(
        r"\b(?:meets?|satisf(?:y|ies)|fulfil?ls?)\s+(?:the|all|every|each)\s+(?:\w+\s+)?(?:criteri\w+|rubrics?|requirements?)\b"
        r"|\b10\s*/\s*10\b|\b(?:verified|approved)\s+by\s+(?:a\s+)?(?:human|judge|expert)",
        re.IGNORECASE,
    ),
}

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
    shown = visible(text)
    # Those that choose between two looks of an emoji are in ordinary texts, too.
    total = len(text) - len(shown) - sum(map(text.count, "\ufe0e\ufe0f"))
    while True:
        shown, count = _RESERVED.subn(_inert, shown)
        if count == 0:
            return JudgeView(shown, total)
        total += count


def visible(text: str) -> str:
    """The text without characters that nobody sees: zero-width, bidirectional, tags, fillers, variation selectors, and
    halves of surrogate pairs, which no tokenizer takes."""
    return _UNSEEN.sub("", "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cs")))


def suspicions(text: str) -> tuple[str, ...]:
    """Names of the kinds of plea in a text that want something of its judge. For logs and for people: a response may
    speak so in good faith, and nothing is taken off for it."""
    shown = visible(text)
    return tuple(name for name, pattern in _SUSPICIONS.items() if pattern.search(shown))


def _inert(match: re.Match[str]) -> str:
    """The marker's words, joined by hyphens so that the result cannot match again."""
    lead = " " if match.group()[:1].isspace() else ""
    return f"{lead}({'-'.join(_WORD.findall(match.group()))})"
