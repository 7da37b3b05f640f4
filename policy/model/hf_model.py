"""Any transformers causal language model behind the surface of our own: slow but right.

Sequences are right-padded, sorted by length and never packed, for transformers' recurrent layers leak state between
packed sequences. Each cache slot is a transformers cache of its own, stepped alone.
"""

import copy
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import PolicyConfig
from policy.import_guard import mend_imports
from policy.model.checkpoint_io import load_model, read_config
from policy.model.hybrid import HybridModel, HybridOutput
from policy.model.hybrid_config import MODEL_TYPES, PRESETS
from policy.model.model import PolicyModel
from policy.model.packing import similar_lengths

PADDED_TOKENS = 8192
"""Most tokens of one right-padded batch, padding included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfShape:
    """What is asked of a transformers config."""

    vocab_size: int
    num_experts: int = 0
    """Always 0: routes are neither reported nor replayed."""


class HfCache:
    """One transformers cache per slot."""

    def __init__(self, config: Any, *, num_slots: int, max_tokens: int) -> None:
        self._config = config
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.lengths = [0] * num_slots
        self.slots = [self._empty() for _ in range(num_slots)]

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(vars(layer)) for slot in self.slots for layer in slot.layers)

    def reset(self, slot: int) -> None:
        self.slots[slot] = self._empty()
        self.lengths[slot] = 0

    def copy(self, source: int, target: int) -> None:
        self.slots[target] = copy.deepcopy(self.slots[source])
        self.lengths[target] = self.lengths[source]


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


class HfModel(PolicyModel[HfCache]):
    """`PolicyModel` on a transformers model; its weights keep their transformers names."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config = HfShape(vocab_size=inner.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the transformers model, without a prefix of ours."""
        return self.inner.named_parameters(*args, **kwargs)

    def forward(
        self,
        token_ids: Tensor,
        sequence_starts: Tensor,
        *,
        cache: HfCache | None = None,
        slots: list[int] | None = None,
        routed_experts: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> HybridOutput:
        """As `HybridModel.forward`; replaying routes is refused."""
        if routed_experts is not None:
            raise ValueError("a transformers model cannot replay routed_experts")
        sequences = list(token_ids.split(sequence_starts.diff().tolist()))
        if cache is None:
            logits = self._padded(sequences)
        elif slots is None or len(slots) != len(sequences) or len(set(slots)) != len(slots):
            raise ValueError(f"a cached pass of {len(sequences)} sequences needs as many different slots, got {slots}")
        else:
            logits = torch.cat([self._continue(ids, cache, slot) for ids, slot in zip(sequences, slots, strict=True)])
        return HybridOutput(logits=logits if logits_at is None else logits[logits_at], routed_experts=None)

    def _padded(self, sequences: list[Tensor]) -> Tensor:
        """Logits (T, V) in the order of the sequences."""
        by_sequence: dict[int, Tensor] = {}
        for group in similar_lengths([len(ids) for ids in sequences], max_padded=PADDED_TOKENS):
            ids = nn.utils.rnn.pad_sequence([sequences[i] for i in group], batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(sequences[i]) for i in group], batch_first=True)
            logits = self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
            by_sequence |= {i: logits[row, : len(sequences[i])] for row, i in enumerate(group)}
        return torch.cat([by_sequence[i] for i in range(len(sequences))]).float()

    @torch.no_grad()
    def _continue(self, token_ids: Tensor, cache: HfCache, slot: int) -> Tensor:
        if cache.lengths[slot] + len(token_ids) > cache.max_tokens:
            raise ValueError(
                f"slot {slot} would hold {cache.lengths[slot] + len(token_ids)} tokens, at most {cache.max_tokens}"
            )
        logits = self.inner(input_ids=token_ids[None], past_key_values=cache.slots[slot], use_cache=True).logits
        cache.lengths[slot] += len(token_ids)
        return logits[0].float()

    def decode(self, token_ids: Tensor, cache: HfCache) -> HybridOutput:
        """One token (B,) for each of the first B slots."""
        rows = [self._continue(token_ids[slot : slot + 1], cache, slot) for slot in range(len(token_ids))]
        return HybridOutput(logits=torch.cat(rows), routed_experts=None)

    def new_cache(self, num_slots: int, max_tokens: int) -> HfCache:
        return HfCache(self.inner.config, num_slots=num_slots, max_tokens=max_tokens)

    def refresh_decode_weights(self) -> None:
        """Nothing is derived from the weights here."""


def load_policy_model(config: PolicyConfig, *, seed: int) -> PolicyModel:
    """The network that a `PolicyConfig` describes, fp32.

    kind "hybrid": the preset with its overrides and random weights drawn from `seed`. kind "hf": the checkpoint at
    `path`, as our own model where its architecture is ours, else as transformers' model. Raises ValueError naming what
    is unknown.
    """
    if config.kind == "hybrid":
        if config.preset not in PRESETS:
            near = difflib.get_close_matches(config.preset, PRESETS, n=1, cutoff=0)[0]
            raise ValueError(f"policy.preset={config.preset!r}, allowed: {', '.join(PRESETS)}; nearest: {near!r}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HybridModel(PRESETS[config.preset].override(config.overrides))
    if config.kind != "hf":
        raise ValueError(f"policy.kind={config.kind!r}, allowed: 'hybrid', 'hf'")
    if not config.path:
        raise ValueError("policy.kind='hf' needs policy.path, a transformers checkpoint folder")
    if read_config(Path(config.path)).get("model_type") in MODEL_TYPES:
        return load_model(config.path)
    mend_imports()  # beside a CUDA build of torchvision, transformers' models cannot be imported
    from transformers import AutoModelForCausalLM

    return HfModel(AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32, local_files_only=True).eval())
