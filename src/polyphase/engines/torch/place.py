"""Whether there is a model at all, in the folder or on the hub; found out before torch is imported.

The hub is asked once, before its own library asks: that one tries for half a minute when nobody answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from polyphase.core.errors import ModelLoadError

TIMEOUT_S = 5.0
ATTEMPTS = 2
PAUSE_S = 0.5


def check_place(model: str) -> None:
    """Raises: ModelLoadError if no model is there, in the folder or on the hub. A hub name has at most one slash."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"the folder {model} holds no model: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise ModelLoadError(f"the folder {model} holds no weights: it has no .safetensors file")
    elif path.exists():
        raise ModelLoadError(f"{model} is a file; a model is a folder with config.json and .safetensors files, or a hub name")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelLoadError(f"there is no folder {model}")
    else:
        check_on_hub(model)


def check_on_hub(model: str) -> None:
    """Return if the model is in the local cache, or the hub has it, or is about to say itself what is wrong. Cost: one small request.

    Raises: ModelLoadError if there is no such model, or nobody answers.
    """
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str):
            return
        _attempt(lambda: huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(model, "config.json"), timeout=TIMEOUT_S))
    except HFValidationError as error:
        raise ModelLoadError(f"{model!r} is neither a folder nor a possible name on the hub, such as Qwen/Qwen3-0.6B") from error
    except GatedRepoError as error:
        raise ModelLoadError(f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model}, and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"there is no folder {model}, and no such model at {constants.ENDPOINT} (for a private one, set HF_TOKEN)"
        ) from error
    except EntryNotFoundError as error:
        raise ModelLoadError(f"{model} at {constants.ENDPOINT} has no config.json: it is not a model that transformers can load") from error
    except HfHubHTTPError:
        return  # rate limits and the hub's own troubles: its library waits for them to pass
    except Exception as error:  # the HTTP library below differs from version to version
        raise ModelLoadError(
            f"there is no folder {model}, it is not in the local cache, and {constants.ENDPOINT} cannot be reached: {error}"
        ) from error


def _attempt(request: Callable[[], Any]) -> None:
    """A second time if nobody answered, as networks have hiccups."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request()
        except (HfHubHTTPError, HFValidationError):
            raise
        except Exception:
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE_S)
        else:
            return
