"""Text to token ids and back. One promise matters most: `encode` never yields a control token.

Control tokens mark turns, calls and results. If text could spell one, a tool result holding "<|im_end|>" would end the
turn it stands in (prompt injection), so text always becomes ordinary tokens and only a dialect places control tokens.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase


class Tokenizer(Protocol):
    """Ordinary text <-> ids, and control tokens by name."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Every control token: its text -> its id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary tokens only, whatever the text spells."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of some ids; broken UTF-8 becomes U+FFFD and ids outside the vocabulary are skipped."""
        ...

    def special_id(self, name: str) -> int: ...


def _without_lone_surrogates(text: str) -> str:
    # a str may hold half of a surrogate pair (from "\ud800" in JSON); no tokenizer can encode it
    return text.encode("utf-8", "replace").decode("utf-8")


class ByteTokenizer:
    """The compact tokenizer of the tiny models: one token a byte, plus the marks of the tiny dialect.

    Example: encode("<end>") -> [60, 101, 110, 100, 62], five bytes; special_id("<end>") -> 257.
    """

    SPECIALS = ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<result>", "<call>", "<arg>")
    """Ids 256..263. <end> ends an assistant turn, <result> opens a tool's answer."""
    RESERVED = 8
    """Ids 264..271 have no meaning yet; they keep the vocabulary a multiple of 16."""

    def __init__(self) -> None:
        names = [*self.SPECIALS, *(f"<reserved_{i}>" for i in range(self.RESERVED))]
        self.control_ids: Mapping[str, int] = {name: 256 + i for i, name in enumerate(names)}
        self.vocab_size = 256 + len(names)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, token_ids: Iterable[int]) -> str:
        return bytes(i for i in token_ids if 0 <= i < 256).decode("utf-8", "replace")

    def special_id(self, name: str) -> int:
        return _special_id(self.control_ids, name)


class HfTokenizer:
    """A transformers tokenizer (of the `tokenizers` backend) that keeps the promise above."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        from tokenizers import Tokenizer as Backend

        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no `tokenizers` backend; convert it to a fast tokenizer")
        self.hf = tokenizer
        # Our own copy: `encode_special_tokens` is a switch on the shared object that other callers flip back.
        self._backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        # Added tokens of pure white space are spelling, not control.
        self.added_tokens: Mapping[str, AddedToken] = {
            token.content: token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()
        }
        self.control_ids: Mapping[str, int] = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        self._control = frozenset(self.control_ids.values())
        # not the number of tokens: ids may have gaps
        self.vocab_size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @staticmethod
    def load(folder: str | Path) -> "HfTokenizer":
        """From a checkpoint or tokenizer folder; nothing is downloaded."""
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise ValueError(f"no tokenizer folder at {str(folder)!r}")
        return HfTokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))

    def encode(self, text: str) -> list[int]:
        return self._encode_as_text(_without_lone_surrogates(text))

    def _encode_as_text(self, text: str) -> list[int]:
        # The switch covers tokens added as special only; "<think>" and "<tool_call>" often are not, and a vocabulary
        # of whole words may hold any of them. Halving until no control token is left splits every such word.
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._control.isdisjoint(ids):
            return ids
        if len(text) < 2:
            raise ValueError(f"this tokenizer encodes the text {text!r} as a control token")
        middle = len(text) // 2
        return self._encode_as_text(text[:middle]) + self._encode_as_text(text[middle:])

    def decode(self, token_ids: Iterable[int]) -> str:
        known = [i for i in token_ids if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special_tokens=False)

    def special_id(self, name: str) -> int:
        return _special_id(self.control_ids, name)

    def end_ids(self, folder: str | Path) -> tuple[int, ...]:
        """Every id that ends a turn: the tokenizer's, and all of the folder's generation_config.json (often more)."""
        found: list[int | None] = [self.hf.eos_token_id]  # type: ignore[list-item]
        generation = Path(folder) / "generation_config.json"
        if generation.is_file():
            eos = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
            found += eos if isinstance(eos, list) else [eos]
        ends = tuple(dict.fromkeys(i for i in found if i is not None))
        if not ends:
            raise ValueError(f"{str(folder)!r} names no end-of-turn token (eos_token)")
        return ends


def _special_id(control_ids: Mapping[str, int], name: str) -> int:
    try:
        return control_ids[name]
    except KeyError:
        raise ValueError(f"no control token {name!r}; there are {', '.join(control_ids)}") from None
