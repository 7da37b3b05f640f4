"""The hybrid language model of Qwen3.5: Gated DeltaNet layers with a full-attention layer after every third.

Letters: T tokens of the packed pass, N sequences, B slots that decode together, D hidden size, V vocabulary, M sparse
layers, k experts per token. Parameter names are those of transformers' Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM;
with equal weights the logits are equal (tests/policy/test_hybrid.py).

    x <- x + mixer(norm(x));  x <- x + feed_forward(norm(x))          in every layer
    logits = W_head norm(x)                                           W_head is the embedding where tied
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.model.attention import Attention, AttentionDecodeWeights, AttentionStep, rotary_tables
from policy.model.cache import HybridCache, LayerState
from policy.model.gated_delta_net import CHUNK_SIZE, DeltaNetDecodeWeights, DeltaNetState, GatedDeltaNet
from policy.model.hybrid_config import LINEAR, HybridConfig
from policy.model.model import PolicyModel
from policy.model.moe import Mlp, MlpDecodeWeights, MoeDecodeWeights, SparseMoe
from policy.model.norm import RmsNorm
from policy.model.packing import Packing


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridOutput:
    """What one pass gives."""

    logits: Tensor
    """(T or len(logits_at), V) fp32; of a decode step (B, V)."""
    routed_experts: Tensor | None
    """(T, M, k) int64 experts of every token and sparse layer; None for a dense model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """What all layers of one packed pass share."""

    packing: Packing
    rotary: tuple[Tensor, Tensor]
    """cos, sin (T, 1, rotary_dim / 2)."""
    slots: Tensor | None
    """(N,) slot of each sequence; None without a cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDecodeWeights:
    """One layer, merged for single-token steps."""

    mixer: DeltaNetDecodeWeights | AttentionDecodeWeights
    feed_forward: MlpDecodeWeights | MoeDecodeWeights | None
    """None: computed by the module itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWeights:
    """The model's weights, merged for single-token steps."""

    layers: list[LayerDecodeWeights]
    head: Tensor
    """(D, V), the gain of the last norm folded in."""
    parameters: list[nn.Parameter]
    made_from: int
    """Sum of the parameters' version counters, which every in-place change raises."""


class HybridLayer(nn.Module):
    """A token mixer and a feed-forward, each behind a norm and a residual."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        if kind == LINEAR:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.is_linear = kind == LINEAR
        self.mlp = SparseMoe(config) if config.num_experts else Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, step: PackedStep, state: LayerState | None, replay: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (T, D) -> (T, D) and the routes (T, k) of a sparse layer."""
        h = self.input_layernorm(x)
        if self.is_linear:
            x = x + self.linear_attn(h, step.packing, state, step.slots)
        else:
            x = x + self.self_attn(h, step.packing, step.rotary, state)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Mlp):
            return x + self.mlp(h), None
        h, routes = self.mlp(h, replay)
        return x + h, routes

    @torch.no_grad()
    def decode_weights(self) -> LayerDecodeWeights:
        gain = 1 + self.input_layernorm.weight.float()
        return LayerDecodeWeights(
            mixer=self.linear_attn.decode_weights(gain) if self.is_linear else self.self_attn.decode_weights(gain),
            feed_forward=self.mlp.decode_weights(1 + self.post_attention_layernorm.weight.float()),
        )

    def decode(
        self, x: Tensor, weights: LayerDecodeWeights, step: AttentionStep, state: LayerState
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, D) -> (B, D) and the routes (B, k) of a sparse layer."""
        if isinstance(state, DeltaNetState):
            assert isinstance(weights.mixer, DeltaNetDecodeWeights)
            x = self.linear_attn.decode(x, weights.mixer, state)
        else:
            assert isinstance(weights.mixer, AttentionDecodeWeights)
            x = self.self_attn.decode(x, weights.mixer, step, state)
        if weights.feed_forward is None:
            h, routes = self.mlp(self.post_attention_layernorm(x), None)
            return x + h, routes
        normed = F.rms_norm(x, x.shape[1:], None, self.eps)
        if isinstance(self.mlp, Mlp):
            assert isinstance(weights.feed_forward, MlpDecodeWeights)
            return self.mlp.decode(x, normed, weights.feed_forward), None
        assert isinstance(weights.feed_forward, MoeDecodeWeights)
        return self.mlp.decode(x, normed, weights.feed_forward)


class HybridBackbone(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HybridLayer(config, kind) for kind in config.layer_types])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class HybridModel(PolicyModel[HybridCache]):
    """A policy over tokens: packed forward for learning and prefill, slot-wise decode for sampling.

    Example: two sequences of 3 and 2 tokens: model(token_ids, torch.tensor([0, 3, 5])).logits -> (5, V).
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config: HybridConfig = config
        self.model = HybridBackbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._decode: DecodeWeights | None = None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Matrices N(0, initializer_range^2); norms, A_log and dt_bias keep what their modules start with."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)

    @property
    def layers(self) -> list[HybridLayer]:
        return cast("list[HybridLayer]", list(self.model.layers))  # ModuleList does not say what it holds

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """(V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        token_ids: Tensor,
        sequence_starts: Tensor,
        *,
        cache: HybridCache | None = None,
        slots: list[int] | None = None,
        routed_experts: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> HybridOutput:
        """One pass over packed sequences; nothing crosses from one to the next.

        token_ids (T,); sequence_starts (N + 1,) cumulative offsets, the last one T. With a cache, sequence i continues
        the conversation in slots[i], whose state advances; no gradient is kept then. `routed_experts` (T, M, k) replays
        recorded routes (-1 = unknown). `logits_at` limits the logits to these rows.
        """
        past = self._past(token_ids, sequence_starts, cache, slots)
        if routed_experts is not None:
            self._check_replay(routed_experts, token_ids.shape[0])
        packing = Packing.create(
            sequence_starts.tolist(),
            past,
            slots,
            kernel=self.config.linear_conv_kernel_dim,
            chunk_size=CHUNK_SIZE,
            device=self.device,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x, routes = self._run_layers(token_ids, packing, cache, routed_experts)
            x = x if logits_at is None else x.index_select(0, logits_at)
            logits = F.linear(self.model.norm(x), self.head).float()
        if cache is not None and slots is not None:
            for slot, length in zip(slots, packing.lengths, strict=True):
                cache.lengths[slot] += length
        return HybridOutput(logits=logits, routed_experts=routes)

    def _run_layers(
        self, token_ids: Tensor, packing: Packing, cache: HybridCache | None, replay: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embedding and all layers: (T, D) and the routes (T, M, k)."""
        x = F.embedding(token_ids, self.model.embed_tokens.weight)
        step = PackedStep(
            packing=packing,
            rotary=rotary_tables(packing.positions, self.config.rotary_dim, self.config.rope_theta, x.dtype),
            slots=None if packing.slots is None else torch.tensor(packing.slots, device=x.device),
        )
        chosen = []
        for i, layer in enumerate(self.layers):
            x, routes = layer(
                x, step, None if cache is None else cache.layers[i], None if replay is None else replay[:, i]
            )
            chosen.append(routes)
        return x, torch.stack(chosen, 1) if self.config.num_experts else None

    def _past(
        self, token_ids: Tensor, sequence_starts: Tensor, cache: HybridCache | None, slots: list[int] | None
    ) -> list[int]:
        """Tokens already held by each sequence's slot."""
        num_sequences = sequence_starts.shape[0] - 1
        if int(sequence_starts[-1]) != token_ids.shape[0]:
            raise ValueError(
                f"sequence_starts ends at {int(sequence_starts[-1])}, but there are {token_ids.shape[0]} tokens"
            )
        if cache is None:
            return [0] * num_sequences
        if slots is None or len(slots) != num_sequences or len(set(slots)) != len(slots):
            raise ValueError(f"a cached pass of {num_sequences} sequences needs as many different slots, got {slots}")
        past = [cache.lengths[slot] for slot in slots]
        for slot, held, length in zip(slots, past, sequence_starts.diff().tolist(), strict=True):
            if held + length > cache.max_tokens:
                raise ValueError(f"slot {slot} would hold {held + length} tokens, at most {cache.max_tokens}")
        return past

    def _check_replay(self, routed_experts: Tensor, num_tokens: int) -> None:
        if routed_experts.dim() != 3 or routed_experts.shape[1] != self.config.num_sparse_layers:
            raise ValueError(
                f"routed_experts has shape {tuple(routed_experts.shape)}, "
                f"expected (tokens, {self.config.num_sparse_layers} sparse layers, experts per token)"
            )
        for layer, replay in zip(self.layers, routed_experts.unbind(1), strict=True):
            assert isinstance(layer.mlp, SparseMoe)
            layer.mlp.check_replay(replay, num_tokens)

    def new_cache(self, num_slots: int, max_tokens: int) -> HybridCache:
        """Empty slots for `num_slots` conversations of at most `max_tokens` tokens."""
        layers: list[LayerState] = [
            layer.linear_attn.new_state(num_slots)
            if layer.is_linear
            else layer.self_attn.new_state(num_slots, max_tokens)
            for layer in self.layers
        ]
        return HybridCache(layers, num_slots=num_slots, max_tokens=max_tokens)

    @torch.no_grad()
    def refresh_decode_weights(self) -> DecodeWeights:
        """Merge the present weights for decoding. `decode` does it by itself after any in-place change of a weight."""
        parameters = list(self.parameters())
        self._decode = DecodeWeights(
            layers=[layer.decode_weights() for layer in self.layers],
            head=(self.head.float() * (1 + self.model.norm.weight.float())).t().contiguous(),
            parameters=parameters,
            made_from=sum(p._version for p in parameters),
        )
        return self._decode

    @torch.no_grad()
    def decode(self, token_ids: Tensor, cache: HybridCache) -> HybridOutput:
        """One token (B,) for each of the first B slots; their states advance in place."""
        size = token_ids.shape[0]
        if max(cache.lengths[:size]) >= cache.max_tokens:
            raise ValueError(
                f"slot {cache.lengths.index(max(cache.lengths[:size]))} is full: {cache.max_tokens} tokens"
            )
        merged = self._decode
        if merged is None or merged.made_from != sum([p._version for p in merged.parameters]):
            merged = self.refresh_decode_weights()
        x = F.embedding(token_ids, self.model.embed_tokens.weight).float()
        step = AttentionStep.create(cache.lengths[:size], self.config, max_tokens=cache.max_tokens, device=x.device)
        chosen = []
        for layer, weights, state in zip(self.layers, merged.layers, cache.layers, strict=True):
            x, routes = layer.decode(x, weights, step, state)
            chosen.append(routes)
        logits = F.rms_norm(x, x.shape[1:], None, self.config.rms_norm_eps) @ merged.head
        for slot in range(size):
            cache.lengths[slot] += 1
        return HybridOutput(logits=logits, routed_experts=torch.stack(chosen, 1) if self.config.num_experts else None)
