"""Routes of experts out of vLLM: its own on GPUs; on its CPU build, which returns none, a hook on each router.

A step feeds each request some tokens; the hooks note which experts each of them took. Letters: M sparse layers, k
experts per token, L tokens of a conversation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor


def returned_routes(rows: np.ndarray | None, shape: tuple[int, int, int]) -> np.ndarray:
    """vLLM's own `rows` (at most L - 1, M, k), uint8 or uint16, as `shape` (L, M, k) int16: -1 where it has none.

    It has none of the last token, which was not fed, and none at all (None) of a request cut off before its first.
    Raises ValueError for rows of other layers or experts.
    """
    routes = np.full(shape, -1, np.int16)
    if rows is not None:
        if rows.shape[1:] != shape[1:] or len(rows) > len(routes):
            raise ValueError(f"vLLM returned routes of shape {rows.shape}, at most {shape} expected")
        routes[: len(rows)] = rows
    return routes


class RouteCapture:
    """Example: capture = RouteCapture(model_runner, 256); engine.step(); capture.take(["r1"]) -> {"r1": (256, M, k)}

    A token keeps the experts of the first time it was fed: when its state is computed again under other weights, what
    was sampled after it then stays as it was. A token for which a prefix cache stands is not fed and has none.
    """

    def __init__(self, model_runner: Any, max_model_tokens: int) -> None:
        self._runner = model_runner
        self._max_tokens = max_model_tokens
        routers = [
            module.router
            for _, module in model_runner.get_model().named_modules()
            if hasattr(getattr(module, "router", None), "set_capture_fn")
        ]
        unique = list({id(router): router for router in routers}.values())
        self._num_layers = len(unique)
        self._layers: dict[int, np.ndarray] = {}
        self._routes: dict[str, np.ndarray] = {}
        for layer, router in enumerate(unique):
            router.set_capture_fn(partial(self._note, layer))

    def _note(self, layer: int, experts: Tensor) -> None:
        """`experts` (T, k) of one layer, in the order of the batch."""
        self._layers[layer] = experts.to("cpu").numpy().astype(np.int16)
        if layer < self._num_layers - 1:
            return
        fed = np.stack([self._layers[i] for i in range(self._num_layers)], axis=1)
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        for i, internal_id in enumerate(batch.req_ids):
            rows = fed[starts[i] : starts[i + 1]]
            # vLLM's own id is the request's with a suffix
            request_id = internal_id.rpartition("-")[0]
            if request_id not in self._routes:
                self._routes[request_id] = np.full((self._max_tokens, *rows.shape[1:]), -1, np.int16)
            first = int(batch.num_computed_tokens_cpu[i])
            kept = self._routes[request_id][first : first + len(rows)]
            unknown = (kept < 0).all((1, 2))
            kept[unknown] = rows[unknown]

    def take(self, request_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Request id -> (L, M, k) int16 experts of each token as an input, -1 where it was not fed; then forgotten."""
        return {name: self._routes.pop(name) for name in request_ids if name in self._routes}
