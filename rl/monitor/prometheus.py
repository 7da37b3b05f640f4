"""The newest value of every metric for Prometheus, on this machine's loopback address only."""

import re
from typing import Any

from rl.monitor.sinks import Tracker

LOOPBACK = "127.0.0.1"


class PrometheusTracker:
    """Gauges "shoal_<area>_<name>" at http://127.0.0.1:PORT/metrics as a `Tracker`. Port 0 takes a free one."""

    def __init__(self, port: int) -> None:
        """Raises ImportError, naming the extra, without prometheus-client, and OSError where the port is taken."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise ImportError("the endpoint needs prometheus-client: pip install 'shoal[prometheus]'") from None
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(port, addr=LOOPBACK, registry=self._registry)
        self.port: int = self._server.server_port

    def log(self, data: dict[str, Any]) -> None:
        if data["kind"] in ("step", "evaluation"):
            for key, value in data.items():
                if isinstance(value, int | float):
                    self._gauge(key).set(value)
                elif value is None:  # not finite: an old value would look as if all were well
                    self._gauge(key).set(float("nan"))
        elif data["kind"] == "alert":
            self._gauge(f"alert/{data['rule']}").set(data["state"] == "raised")

    def finish(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def _gauge(self, key: str) -> Any:
        from prometheus_client import Gauge

        name = "shoal_" + re.sub(r"[^a-zA-Z0-9]+", "_", key).strip("_")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, key, registry=self._registry)
        return self._gauges[name]


def start_prometheus(port: int) -> Tracker:
    return PrometheusTracker(port)
