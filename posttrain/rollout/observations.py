"""What a policy reads of what happened in its box, never more than it can bear."""

from __future__ import annotations

from posttrain.types import ExecResult, ExecStatus


def describe(result: ExecResult, *, max_chars: int) -> str:
    """What the policy reads after a command: its output, and how it ended unless it ended well."""
    text = (result.stdout + result.stderr).decode("utf-8", errors="replace").removesuffix("\n")
    text = clip(text, max_chars) or "(no output)"
    if result.status is not ExecStatus.EXITED:
        return f"{text}\n(killed: {result.status})"
    return text if result.exit_code == 0 else f"{text}\n(exit code {result.exit_code})"


def clip(text: str, max_chars: int) -> str:
    """The text, or its head and tail around a line that says how much is missing."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n({len(text) - 2 * half} characters left out)\n{text[len(text) - half :]}"
