"""A worker without a model: the torch engine's scheduler, block pool and prefix cache, with step times of a model on an accelerator.

In come `Submit`s, out go `StepReport`s, after as much time as the imagined machine would take (`timing`), with tokens that follow from
the prompt alone (`tokens`). `machine` is the engine without time of its own, for simulations; `engine` lets it run on an event loop. The
plane loads no torch and no weights, so that fleets of hundreds run where there is not one accelerator.
"""

from polyphase.engines.mock.settings import MockSettings

__all__ = ["MockSettings"]
