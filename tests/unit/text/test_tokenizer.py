from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyphase.core.errors import ConfigurationError
from polyphase.text import Tokenizer
from polyphase.text.tokenizer import PieceForm


def test_the_form_is_read_from_the_decoder(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    forms = {name: tokenizer.form for name, tokenizer in tokenizers_by_form.items()}
    assert forms == {"byte-level": PieceForm.BYTE_LEVEL, "metaspace": PieceForm.TEXT, "byte-fallback": PieceForm.BYTE_FALLBACK}


def test_a_text_survives_the_way_there_and_back(tokenizer: Tokenizer) -> None:
    text = "The lazy dog said so."
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(max_size=60))
def test_byte_level_and_byte_fallback_lose_nothing(tokenizers_by_form: dict[str, Tokenizer], text: str) -> None:
    tokenizer = tokenizers_by_form["byte-level"]
    ids = tokenizer.encode(text)
    if not any(tokenizer.is_special(i) for i in ids):
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) or b"" for i in ids) == text.encode()


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    inner = tokenizers_by_form["byte-level"]._inner
    data = json.loads(inner.to_str())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|end|>",
    }
    cut = Tokenizer.from_json(json.dumps(data).encode())
    text = "The quick brown fox jumps over the lazy dog."
    assert cut.encode(text) == tokenizers_by_form["byte-level"].encode(text)


def test_what_single_ids_stand_for(tokenizers_by_form: dict[str, Tokenizer]) -> None:
    fallback = tokenizers_by_form["byte-fallback"]
    assert fallback.token_bytes(2 + 0xE2) == b"\xe2"
    assert fallback.token_text(2 + 0xE2) == "\ufffd"
    assert fallback.fallback_byte(2 + 0xE2) == 0xE2
    space = fallback.token_id("▁")
    assert space is not None
    assert fallback.token_text(space) == " "
    byte_level = tokenizers_by_form["byte-level"]
    arrow = byte_level.token_id("→ arrow")
    assert arrow is not None
    assert byte_level.token_text(arrow) == "→ arrow"
    assert byte_level.token_bytes(100_000) is None
    assert byte_level.token_bytes(-1) is None
    assert byte_level.token_text(2**40) == ""


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b'{"model": {"type": "NoSuch"}}'])
def test_a_broken_file_is_a_configuration_error(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        Tokenizer.from_json(data)
