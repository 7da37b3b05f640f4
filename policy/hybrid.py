"""The hybrid language model of Qwen3.5: Gated DeltaNet layers with a full-attention layer after every third.

Letters: T tokens of the packed pass, N sequences, B slots that decode together, D hidden size, V vocabulary, M sparse
layers, k experts per token. Parameter names are those of transformers' Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM;
with equal weights the logits are equal (tests/test_policy_hybrid.py).

    x <- x + mixer(norm(x));  x <- x + feed_forward(norm(x))          in every layer
    logits = W_head norm(x)                                           W_head is the embedding where tied
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from policy.attention import Attention, AttentionDecodeWeights, rotary_tables
from policy.cache import HybridCache, LayerState
from policy.gated_delta_net import CHUNK_SIZE, DeltaNetDecodeWeights, GatedDeltaNet
from policy.hybrid_config import LINEAR, PRESETS, HybridConfig
from policy.moe import Mlp, MlpDecodeWeights, MoeDecodeWeights, SparseMoe
from policy.norm import RmsNorm
from policy.packing import Packing

__all__ = ["PRESETS", "HybridConfig", "HybridModel", "HybridOutput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridOutput:
    """What one pass gives."""

    logits: Tensor
    """(T or len(logits_at), V) fp32; of a decode step (B, V)."""
    routed_experts: Tensor | None
    """(T, M, k) int64 experts of every token and sparse layer; None for a dense model."""


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
    parameters: list[Tensor]
    made_from: int
    """Sum of the parameters' version counters, which every in-place change raises."""


class HybridLayer(nn.Module):
    """A token mixer and a feed-forward, each behind a norm and a residual."""

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        if kind == LINEAR:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.is_linear = kind == LINEAR
        self.mlp = SparseMoe(config) if config.num_experts else Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    @torch.no_grad()
    def decode_weights(self) -> LayerDecodeWeights:
        gain = 1 + self.input_layernorm.weight.float()
        mixer = self.linear_attn if self.is_linear else self.self_attn
        return LayerDecodeWeights(
            mixer=mixer.decode_weights(gain),
            feed_forward=self.mlp.decode_weights(1 + self.post_attention_layernorm.weight.float()),
        )


class HybridBackbone(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HybridLayer(config, kind) for kind in config.layer_types])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class HybridModel(nn.Module):
    """A policy over tokens: packed forward for learning and prefill, slot-wise decode for sampling.

    Example: two sequences of 3 and 2 tokens: model(token_ids, torch.tensor([0, 3, 5])).logits -> (5, V).
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
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
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head(self) -> Tensor:
        """(V, D)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        token_ids: LongTensor,
        sequence_starts: LongTensor,
        *,
        cache: HybridCache | None = None,
        slots: list[int] | None = None,
        routed_experts: LongTensor | None = None,
        logits_at: LongTensor | None = None,
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
            kernel=self.config.linear_conv_kernel_dim,
            chunk_size=CHUNK_SIZE,
            device=self.device,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x, routes = self._layers(token_ids, packing, cache, slots, routed_experts)
            x = x if logits_at is None else x.index_select(0, logits_at)
            logits = F.linear(self.model.norm(x), self.head).float()
        if cache is not None and slots is not None:
            for slot, length in zip(slots, packing.lengths, strict=True):
                cache.lengths[slot] += length
        return HybridOutput(logits=logits, routed_experts=routes)

    def _layers(
        self,
        token_ids: Tensor,
        packing: Packing,
        cache: HybridCache | None,
        slots: list[int] | None,
        replay: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embedding and all layers: (T, D) and the routes."""
        x = F.embedding(token_ids, self.model.embed_tokens.weight)
        rotary = self._rotary(packing.positions, x.dtype)
        slot_index = None if slots is None else torch.tensor(slots, device=x.device)
        routes = []
        for i, layer in enumerate(self.model.layers):
            state = None if cache is None else cache.layers[i]
            h = layer.input_layernorm(x)
            if layer.is_linear:
                x = x + layer.linear_attn(h, packing, state, slot_index)
            else:
                x = x + layer.self_attn(h, packing, rotary, state, slots)
            h = layer.post_attention_layernorm(x)
            if self.config.num_experts:
                h, chosen = layer.mlp(h, None if replay is None else replay[:, len(routes)])
                routes.append(chosen)
            else:
                h = layer.mlp(h)
            x = x + h
        return x, torch.stack(routes, 1) if routes else None

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_tables(positions, self.config.rotary_dim, self.config.rope_theta)
        return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)

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
        for layer, replay in zip(self.model.layers, routed_experts.unbind(1), strict=True):
            layer.mlp.check_replay(replay, num_tokens)

    def new_cache(self, num_slots: int, max_tokens: int) -> HybridCache:
        """Empty slots for `num_slots` conversations of at most `max_tokens` tokens."""
        layers: list[LayerState] = [
            layer.linear_attn.new_state(num_slots)
            if layer.is_linear
            else layer.self_attn.new_state(num_slots, max_tokens)
            for layer in self.model.layers
        ]
        return HybridCache(layers, num_slots=num_slots, max_tokens=max_tokens)

    @torch.no_grad()
    def refresh_decode_weights(self) -> None:
        """Merge the present weights for decoding. `decode` does it by itself after any in-place change of a weight."""
        parameters = list(self.parameters())
        self._decode = DecodeWeights(
            layers=[layer.decode_weights() for layer in self.model.layers],
            head=(self.head.float() * (1 + self.model.norm.weight.float())).t().contiguous(),
            parameters=parameters,
            made_from=sum(p._version for p in parameters),
        )

    @torch.no_grad()
    def decode(self, token_ids: LongTensor, cache: HybridCache) -> HybridOutput:
        """One token (B,) for each of the first B slots; their states advance in place."""
        size = token_ids.shape[0]
        lengths = cache.lengths[:size]
        longest = max(lengths) + 1
        if longest > cache.max_tokens:
            raise ValueError(f"slot {lengths.index(longest - 1)} is full: {cache.max_tokens} tokens")
        merged = self._decode
        if merged is None or merged.made_from != sum([p._version for p in merged.parameters]):
            self.refresh_decode_weights()
            assert self._decode is not None
            merged = self._decode
        x = F.embedding(token_ids, self.model.embed_tokens.weight).float()
        positions = torch.tensor(lengths, device=x.device)
        rotary = self._rotary(positions, x.dtype)
        groups = self.config.num_key_value_heads
        write_rows = (torch.arange(size * groups, device=x.device).view(size, groups) * cache.max_tokens) + positions[
            :, None
        ]
        hidden_keys = torch.arange(longest, device=x.device) > positions[:, None]
        mask = torch.zeros(size, 1, longest, device=x.device).masked_fill_(hidden_keys.unsqueeze(1), -torch.inf)
        routes = []
        for layer, weights, state in zip(self.model.layers, merged.layers, cache.layers, strict=True):
            if layer.is_linear:
                x = layer.linear_attn.decode(x, weights.mixer, state)
            else:
                x = layer.self_attn.decode(x, weights.mixer, rotary, state, write_rows.flatten(), mask)
            if not self.config.num_experts:
                normed = F.rms_norm(x, x.shape[1:], None, self.config.rms_norm_eps)
                x = layer.mlp.decode(x, normed, weights.feed_forward)
                continue
            if weights.feed_forward is None:
                h, chosen = layer.mlp(layer.post_attention_layernorm(x), None)
                x = x + h
            else:
                normed = F.rms_norm(x, x.shape[1:], None, self.config.rms_norm_eps)
                x, chosen = layer.mlp.decode(x, normed, weights.feed_forward)
            routes.append(chosen)
        logits = F.rms_norm(x, x.shape[1:], None, self.config.rms_norm_eps) @ merged.head
        for slot in range(size):
            cache.lengths[slot] += 1
        return HybridOutput(logits=logits, routed_experts=torch.stack(routes, 1) if routes else None)
