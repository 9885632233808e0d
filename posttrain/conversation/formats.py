"""Which form conversations have for a tokenizer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from posttrain.conversation.chat import ChatFormat
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.vocabulary import CHAT_FORMAT
from posttrain.protocols import ConversationFormat


def open_format(tokenizer: PreTrainedTokenizerBase) -> ConversationFormat:
    """The V4 format for a tokenizer that was prepared for it, else its chat template. ``RecipeError``."""
    if tokenizer.init_kwargs.get(CHAT_FORMAT) == "v4":
        return V4Format(tokenizer)
    return ChatFormat(tokenizer)
