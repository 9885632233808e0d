"""The tokens of the V4 wire format, exactly: the bars are U+FF5C, the joiners U+2581 (V4's encoding/README.md)."""

from __future__ import annotations

from collections.abc import Mapping

BAR = "\uff5c"
BOS = f"<{BAR}begin\u2581of\u2581sentence{BAR}>"
EOS = f"<{BAR}end\u2581of\u2581sentence{BAR}>"
USER = f"<{BAR}User{BAR}>"
ASSISTANT = f"<{BAR}Assistant{BAR}>"
REMINDER = f"<{BAR}latest_reminder{BAR}>"
THINK = "<think>"
END_THINK = "</think>"
DSML = f"{BAR}DSML{BAR}"
"""The one token within the tags of a tool call; brackets and names around it are ordinary text."""
EXTRACTED_URL = f"<{BAR}extracted_url{BAR}>"

TASKS: Mapping[str, str] = {
    name: f"<{BAR}{name}{BAR}>" for name in ("action", "title", "query", "authority", "domain", "read_url")
}
"""Quick instructions: an auxiliary task asked by one token after a context that is cached already."""

CONTROL = (BOS, EOS, USER, ASSISTANT, REMINDER, EXTRACTED_URL, *TASKS.values())
"""Tokens that nobody but the format writes."""
TEXT = (THINK, END_THINK, DSML)
"""Tokens that the model writes and that decoded text shows."""
ALL = (*CONTROL, *TEXT)
FORBIDDEN = (BOS, EOS, *TEXT)
"""What the reasoning and the content of an assistant may not contain (V4's parser)."""
