"""The kinds of failure that are ours to name. Everything else is a builtin."""

from __future__ import annotations


class RecipeError(ValueError):
    """The recipe, an override or an input is wrong. The message names field, value, expectation and remedy."""


class EngineStopped(RuntimeError):
    """The engine generates no more: closed, preempted or broken. What it has drawn is in its journal, if it has one."""


class SandboxError(RuntimeError):
    """The sandbox machinery failed. Never the payload's fault, so never scored."""


class SandboxUnavailable(SandboxError):
    """No such substrate can run on this machine; the message says what to install."""


class SandboxLost(SandboxError):
    """A box that was open is gone: agent, channel, host or daemon. Never a result, never a reward."""


class Unsupported(SandboxError):
    """This substrate cannot do what was asked; there is no silent downgrade."""


class JudgeError(RuntimeError):
    """The judge failed or could not be read. The rollout stays unscored; it does not get 0.0."""


class UnreadableReply(JudgeError):
    """A judge answered, but with nothing that counts as a verdict. Another seed may give a reply that does."""

    def __init__(self, message: str, reply: str = "") -> None:
        super().__init__(message)
        self.reply = reply
        """What it said, as far as it is known."""


class Preempted(KeyboardInterrupt):
    """The run was told by SIGTERM to stop, to be resumed later: what is under way is put away rather than removed."""
