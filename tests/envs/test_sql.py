"""SQL written by a policy: attacks are refused or cut, quickly, and nothing is changed."""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.library.parts.read_only_sql import ReadOnlySql


@pytest.fixture
def database() -> Iterator[ReadOnlySql]:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table orders(id integer, customer text, amount integer)")
    connection.executemany("insert into orders values(?,?,?)", [(i, "ann" if i % 2 else "bob", i) for i in range(60)])
    sql = ReadOnlySql(connection, tables={"orders"})
    yield sql
    sql.close()


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("select count(*) from orders", "60"),
        ("SELECT SUM(amount) FROM orders WHERE customer='ann'", "900"),
        ("select id, customer from orders limit 2", "0,bob\n1,ann"),
        ("select max(amount) from orders where customer='eve'", "null"),
        ("select id from orders where id < 0", "no rows"),
        ("select id from orders", "\n".join(map(str, range(10))) + "\n..."),
        ("select customer, count(*) from orders group by customer order by 1", "ann,30\nbob,30"),
        ("select name from sqlite_master", "orders"),
    ],
)
def test_questions_are_answered_compactly(database: ReadOnlySql, query: str, text: str) -> None:
    assert database.run(query) == text


@pytest.mark.parametrize(
    "query",
    [
        "delete from orders",
        "update orders set amount = 0",
        "insert into orders values (1, 'x', 1)",
        "drop table orders",
        "create table t(a)",
        "create temp table t(a)",
        "attach '{path}' as stolen",
        "vacuum into '{path}'",
        "pragma query_only = 0",
        "pragma writable_schema = 1",
        "select * from pragma_table_info('orders')",
        "select load_extension('evil')",
        "select zeroblob(500000000)",
        "select printf('%.*c', 500000000, 'x')",
        "select hex(randomblob(100000000))",
        "select replace('aaaaaaaa', 'a', 'aaaaaaaa')",
        "with recursive t(n) as (select 1 union all select n + 1 from t) select count(*) from t",
        "select count(*) from orders a, orders b, orders c, orders d, orders e",
        "select 1; delete from orders",
        "begin immediate",
        "savepoint s",
        "reindex",
        "analyze",
        "select '" + "x" * 2000 + "'",
        "select " + "(" * 200 + "1" + ")" * 200,
        "select not a column",
        "\x00",
        "",
    ],
)
def test_attacks_and_nonsense_are_refused_quickly_and_change_nothing(
    database: ReadOnlySql, query: str, tmp_path: Path
) -> None:
    path = tmp_path / "stolen.db"
    started = time.monotonic()
    try:
        answer = database.run(query.format(path=path))
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        answer = "no rows"
    assert answer == "no rows"
    assert time.monotonic() - started < 1.0
    assert not path.exists()
    assert database.run("select count(*) from orders") == "60"
    assert database.run("select sum(amount) from orders") == "1770"


def test_the_budget_of_one_query_is_not_taken_from_the_next(database: ReadOnlySql) -> None:
    for _ in range(200):
        assert database.run("select count(*) from orders a, orders b") == "3600"
