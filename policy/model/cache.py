"""What a hybrid model remembers of the conversations in its slots."""

from collections.abc import Sequence

from policy.model.attention import AttentionState
from policy.model.gated_delta_net import DeltaNetState

LayerState = DeltaNetState | AttentionState


class HybridCache:
    """Fixed memory for `num_slots` conversations of at most `max_tokens` tokens each.

    A Gated DeltaNet layer keeps one matrix and a few inputs per slot whatever the length, so a conversation can be
    continued or copied, but never cut back to an earlier token.
    """

    def __init__(self, layers: Sequence[LayerState], *, num_slots: int, max_tokens: int) -> None:
        self.layers = list(layers)
        self.num_slots = num_slots
        self.max_tokens = max_tokens
        self.lengths = [0] * num_slots
        """Tokens held in each slot."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))

    def reset(self, slot: int) -> None:
        """Empty a slot: the next sequence in it starts as in a new cache, even after non-finite values."""
        for layer in self.layers:
            if isinstance(layer, DeltaNetState):
                layer.conv[slot].zero_()
                layer.recurrent[slot].zero_()
            else:
                layer.keys[slot, :, : self.lengths[slot]].zero_()
                layer.values[slot, :, : self.lengths[slot]].zero_()
        self.lengths[slot] = 0

    def copy(self, source: int, target: int) -> None:
        """Make `target` a deep copy of `source`; the two then live apart."""
        if source == target:
            return
        self.reset(target)
        length = self.lengths[source]
        for layer in self.layers:
            if isinstance(layer, DeltaNetState):
                layer.conv[target] = layer.conv[source]
                layer.recurrent[target] = layer.recurrent[source]
            else:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
        self.lengths[target] = length


def _tensors(layer: LayerState) -> tuple:
    return (layer.conv, layer.recurrent) if isinstance(layer, DeltaNetState) else (layer.keys, layer.values)
