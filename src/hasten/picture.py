"""Where the picture lies among what attends together."""

from __future__ import annotations

from typing import Any

from hasten.method import Refused


class Picture:
    """A sequence of `tokens` places, found again after words were joined to it: whoever sees the network's calls of
    `torch.cat` notes them, and asks when the attention runs."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self._alike = tokens, False
        self._joined: dict[int, int] = {}  # length of words and picture together -> where the picture begins

    def note(self, tensors: Any, dim: int = 0, **_: Any) -> None:
        """Joint attention puts the two sequences together: in which order is the network's own affair."""
        if len(tensors) == 2:
            first, second = (t.shape[dim] for t in tensors)
            if self.tokens in (first, second):
                self._joined[first + second] = 0 if first == self.tokens else first
                self._alike = first == second

    def start(self, queries: int, keys: int) -> int | None:
        """Where it begins in a self-attention of so many; None where words alone are attended to, or a window.

        Raises:
            Refused: words and picture are of one length, so that nothing tells which is which.
        """
        start = 0 if queries == self.tokens else self._joined.get(queries)
        if keys != queries or start is None:
            return None
        if queries > self.tokens and self._alike:
            raise Refused(
                f"{self.tokens} places and as many words: which come first cannot be told; change one of them"
            )
        return start
