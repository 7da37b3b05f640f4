"""Routes of experts out of vLLM's CPU build, whose model runner returns none: a hook on each router.

A step feeds each request some tokens; the hooks note which experts each of them took. Letters: M sparse layers, k
experts per token.
"""

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor


class RouteCapture:
    """Example: capture = RouteCapture(model_runner); engine.step(); capture.take() -> {"r1": (12, rows (3, M, k))}"""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        routers = [
            module.router
            for _, module in model_runner.get_model().named_modules()
            if hasattr(getattr(module, "router", None), "set_capture_fn")
        ]
        unique = list({id(router): router for router in routers}.values())
        self._num_layers = len(unique)
        self._layers: dict[int, np.ndarray] = {}
        self._taken: dict[str, tuple[int, np.ndarray]] = {}
        for layer, router in enumerate(unique):
            router.set_capture_fn(partial(self._note, layer))

    def _note(self, layer: int, experts: Tensor) -> None:
        """`experts` (T, k) of one layer, in the order of the batch."""
        self._layers[layer] = experts.to("cpu").numpy().astype(np.int16)
        if layer < self._num_layers - 1:
            return
        routes = np.stack([self._layers[i] for i in range(self._num_layers)], axis=1)
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        for i, internal_id in enumerate(batch.req_ids):
            rows = routes[starts[i] : starts[i + 1]]
            # vLLM's own id is the request's with a suffix
            self._taken[internal_id.rpartition("-")[0]] = (int(batch.num_computed_tokens_cpu[i]), rows)

    def take(self) -> dict[str, tuple[int, np.ndarray]]:
        """Request id -> (position of the first token fed, (n, M, k) int16 experts of n tokens) of the last step."""
        taken, self._taken = self._taken, {}
        return taken
