"""How many tokens a step that reads prompts may hold, so that it does not take too long; learnt from the steps before it.

Whoever decodes in the step waits for its end, and a step that nobody wants any more can be broken off only between two layers. How long a
thousand tokens take differs by a factor of a thousand between a small model on many cores and a large one on two busy ones, so the time is
measured, not guessed. The limit begins low; from step to step it at most doubles or loses a quarter, as a step is more often slow by a
hiccup of the machine than fast by chance.
"""

from __future__ import annotations

FIRST_TOKENS = 256
LEAST_TOKENS = 32  # smaller steps cost nearly as much
MOST_GROWTH, MOST_LOSS = 2.0, 0.25


class StepPace:
    """`limit_tokens` is for the next step; `note` tells how long the last one took."""

    def __init__(self, longest_step_ns: int, most_tokens: int) -> None:
        """`most_tokens`: never more than that, however fast it goes."""
        self._longest_step_ns = longest_step_ns
        self._most_tokens = most_tokens
        self.limit_tokens = min(FIRST_TOKENS, most_tokens)

    def note(self, token_count: int, duration_ns: int) -> None:
        """A step that read prompts computed these tokens. A much smaller one than the limit says little, unless it took too long."""
        if 2 * token_count < self.limit_tokens and duration_ns <= self._longest_step_ns:
            return
        fitting = token_count * self._longest_step_ns // max(duration_ns, 1)
        lowest = max(int(self.limit_tokens * (1 - MOST_LOSS)), min(LEAST_TOKENS, self._most_tokens))
        highest = min(int(self.limit_tokens * MOST_GROWTH), self._most_tokens)
        self.limit_tokens = min(max(fitting, lowest), highest)
