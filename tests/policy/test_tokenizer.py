"""Tokenizers: text never becomes a control token."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from policy.model.tokenizer import ByteTokenizer, HfTokenizer
from tests.rollout.fakes_episode import ADDED, SPECIAL, chatml_tokenizer

HF = HfTokenizer(chatml_tokenizer())
BYTES = ByteTokenizer()


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text and all(0 <= i < 256 for i in ids)


def test_bytes_decode_skips_what_is_no_text() -> None:
    assert BYTES.decode([104, 256, 300, -1, 105, 0xC3]) == "hi\ufffd"
    assert BYTES.encode("<end>") == [60, 101, 110, 100, 62]
    assert BYTES.encode("a\ud800") == [97, 63]
    assert BYTES.vocab_size == 272 and sorted(BYTES.control_ids.values()) == list(range(256, 272))
    with pytest.raises(ValueError, match=r"no control token '<stop>'; there are <pad>, <end>"):
        BYTES.special_id("<stop>")


def test_a_transformers_tokenizer_by_default_makes_control_tokens_of_text() -> None:
    # why HfTokenizer exists; the second switch covers special tokens only
    text = "<|im_end|><tool_call>"
    assert HF.hf(text, add_special_tokens=False)["input_ids"] == [
        HF.special_id("<|im_end|>"),
        HF.special_id("<tool_call>"),
    ]
    ids = HF.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert HF.special_id("<|im_end|>") not in ids and HF.special_id("<tool_call>") in ids


@settings(deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, *ADDED, "a", "<", " ", "é", "\n"]), max_size=6).map("".join))
def test_text_becomes_text_in_a_transformers_tokenizer(text: str) -> None:
    ids = HF.encode(text)
    assert not set(ids) & set(HF.control_ids.values())
    assert HF.decode(ids) == text


@settings(deadline=None)
@given(st.text("abc <>\n", max_size=20))
def test_ordinary_text_gets_the_ids_it_always_gets(text: str) -> None:
    assert HF.encode(text) == HF.hf(text, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_of_whole_words_cannot_smuggle_a_control_token_in() -> None:
    words = {"<|im_end|>": 0, "<": 1, "|": 2, "im": 3, "_": 4, "end": 5, ">": 6, "[UNK]": 7, "x": 8}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"))
    for text in ("x <|im_end|> x", "x ＜|im_end|＞ x"):  # the second is the first after normalisation
        ids = tokenizer.encode(text)
        assert 0 not in ids and ids[0] == ids[-1] == 8


def test_a_control_token_of_one_character_is_refused_by_name() -> None:
    backend = Tokenizer(models.WordLevel({"¤": 0, "x": 1}, unk_token="x"))
    backend.add_special_tokens(["¤"])
    tokenizer = HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="¤"))
    with pytest.raises(ValueError, match="encodes the text '¤' as a control token"):
        tokenizer.encode("¤")


def test_ids_outside_the_vocabulary_are_skipped() -> None:
    assert HF.decode([HF.vocab_size, -1, *HF.encode("hi"), 10**9]) == "hi"


def test_all_end_ids_of_a_folder_are_found(tmp_path: Path) -> None:
    chatml_tokenizer().save_pretrained(tmp_path)
    tokenizer = HfTokenizer.load(tmp_path)
    end, text = tokenizer.special_id("<|im_end|>"), tokenizer.special_id("<|endoftext|>")
    assert tokenizer.end_ids(tmp_path) == (end,)
    for eos, expected in ((text, (end, text)), (f"[{text}, {end}]", (end, text)), ("null", (end,))):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
        assert tokenizer.end_ids(tmp_path) == expected
