"""Small tokenizers of the three forms, trained on the spot."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from polyphase.text import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was not amused, and said so.",
    "Où est la bibliothèque ? Größe, Übermut, señor; naïve café.",
    "日本語のテキスト、漢字とかな。🙂🙃 family: 👨‍👩‍👧‍👦 done",
    "def function(argument): return {argument: 'value'}  # comment\n\n\tindent",
] * 4
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    )
    inner.add_tokens(["<think>", "→ arrow"])  # added, not special, one of them outside the byte alphabet
    return inner


def metaspace() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *SPECIAL], show_progress=False))
    return inner


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: no pre-tokenizer, a space put in front, and bytes for what the vocabulary lacks."""
    trained = metaspace()
    vocab: dict[str, int] = {"<unk>": 0, "<|end|>": 1}
    vocab.update({f"<0x{byte:02X}>": 2 + byte for byte in range(256)})
    for piece in sorted(trained.get_vocab()):
        if piece.isascii() or piece.startswith("▁"):
            vocab.setdefault(piece, len(vocab))
    vocab.setdefault("▁", len(vocab))
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    inner.add_special_tokens(["<|end|>"])
    return inner


MAKERS = {"byte-level": byte_level, "metaspace": metaspace, "byte-fallback": byte_fallback}


@pytest.fixture(scope="session")
def tokenizers_by_form() -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_json(make().to_str().encode()) for name, make in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def tokenizer(request: pytest.FixtureRequest, tokenizers_by_form: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_form[request.param]
