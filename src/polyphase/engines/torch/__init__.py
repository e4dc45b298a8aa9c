"""The embedded engine: transformers' model classes over a paged KV cache of our own, on the CPU and on CUDA.

In come `Submit`s, out go `StepReport`s. A step packs the new tokens of many sequences into one forward pass; `scheduler` decides
which, from counts alone; `attention` reads and writes the cache; `sampling` chooses the tokens; `engine` drives them. Importing this
plane does not import torch; loading an engine does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polyphase.engines.torch.settings import TorchSettings

if TYPE_CHECKING:
    from polyphase.engines.torch.engine import TorchEngine

__all__ = ["TorchSettings", "load_torch_engine"]


def load_torch_engine(settings: TorchSettings) -> TorchEngine:
    """Load a model and allocate its KV cache.

    Raises: ModelLoadError if the model is missing, broken or of a kind that this engine would compute wrongly; ConfigurationError if
        memory or settings do not suffice.
    Owner: the caller closes the engine.
    """
    from polyphase.engines.torch.place import check_place

    check_place(settings.model)  # the next import takes seconds
    from polyphase.engines.torch.assembly import assemble

    return assemble(settings)
