"""A policy's SQL, read only and bounded: what is not allowed by name is refused.

`mode=ro` and `query_only` let ATTACH and VACUUM INTO write files, and one printf can take seconds; so an authorizer
allows only SELECT, named tables and named functions, sqlite's own limits cap sizes, and a budget of virtual-machine
steps (not of seconds, which would make results depend on load) ends what runs away.
"""

import sqlite3
from collections.abc import Collection

FUNCTIONS = frozenset({"sum", "count", "max", "min", "avg", "total", "abs", "round", "length", "coalesce", "like"})
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 40,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 5,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 5_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_STEPS_PER_TICK = 1_000
_MAX_TICKS = 50


def small_database() -> sqlite3.Connection:
    """An empty database in memory, for many at once: about 18 KiB with two small tables, 45 KiB by sqlite's defaults.

    Environments live on one event loop, which may not be the thread that made them.
    """
    connection = sqlite3.connect(":memory:", check_same_thread=False, cached_statements=0)
    connection.execute("pragma page_size = 512")
    return connection


class ReadOnlySql:
    """Queries on a database that nobody can change any more through this connection.

    Example: ReadOnlySql(connection, tables={"orders"}).run("select count(id) from orders") -> "20"
    """

    def __init__(self, connection: sqlite3.Connection, *, tables: Collection[str], max_rows: int = 10) -> None:
        """Takes the filled connection over. `tables` may be read, and sqlite_master, which describes them."""
        connection.commit()
        connection.execute("pragma temp_store = memory")  # a large sort must not write files
        self._connection = connection
        self._max_rows = max_rows
        self._ticks = 0
        readable = {*tables, "sqlite_master"}

        def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
            allowed = (
                action == sqlite3.SQLITE_SELECT
                or (action == sqlite3.SQLITE_READ and first in readable)
                or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FUNCTIONS)
            )
            return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

        for category, limit in _LIMITS.items():
            connection.setlimit(category, limit)
        connection.set_authorizer(authorize)
        connection.set_progress_handler(self._tick, _STEPS_PER_TICK)

    def run(self, query: str) -> str:
        """One value as itself, else rows as lines of comma-separated values. Raises sqlite3.Error."""
        self._ticks = 0
        rows = self._connection.execute(query).fetchmany(self._max_rows + 1)
        lines = [",".join("null" if value is None else str(value) for value in row) for row in rows[: self._max_rows]]
        if len(rows) > self._max_rows:
            lines.append("...")
        return "\n".join(lines) or "no rows"

    def close(self) -> None:
        self._connection.close()

    def _tick(self) -> int:
        self._ticks += 1
        return int(self._ticks > _MAX_TICKS)
