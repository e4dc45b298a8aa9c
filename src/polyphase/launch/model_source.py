"""What a person means by MODEL: the model that comes with Polyphase, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polyphase
from polyphase.core.errors import ConfigurationError

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class ModelSource:
    location: str  # a folder, or a name on the hub
    served_name: str


def resolve_model(text: str, package_folder: Path = Path(polyphase.__file__).parent) -> ModelSource:
    """`demo` is the shipped model, also where there is a folder of that name: that one is `./demo`.

    Raises: ConfigurationError if it can be neither.
    """
    if text == DEMO:
        return ModelSource(str(demo_folder(package_folder)), DEMO)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(f"the folder {text} holds no model: it has no config.json")
        return ModelSource(str(path.absolute()), path.resolve().name)
    if path.exists():
        raise ConfigurationError(f"{text} is a file; name the folder that holds config.json, tokenizer.json and the weights")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ConfigurationError(f"there is no model folder {text}; name a folder, a model on the hub such as Qwen/Qwen3-0.6B, or demo")
    return ModelSource(text, text)


def demo_folder(package_folder: Path) -> Path:
    """In an installed package beside the code, in a source checkout under models/."""
    for folder in (package_folder / "demo_model", package_folder.parents[1] / "models" / "demo"):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigurationError(
        f"the demo model is missing from this installation (looked beside {package_folder}); name another model, such as Qwen/Qwen3-0.6B"
    )
