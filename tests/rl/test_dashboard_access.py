"""Who may ask the dashboard, what it sends of its own files, and how its process ends."""

import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from rl.cli.main import main
from rl.dashboard.folders import NotThere, find_run
from rl.dashboard.security import Access
from rl.dashboard.server import make_app
from rl.dashboard.static_files import compiled_at_once
from tests.rl.dashboard_runs import RUN, client, make_run, start_server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dash")
    make_run(root)
    return root


def test_the_chart_library_comes_compressed_and_is_not_sent_twice(root: Path) -> None:
    until = time.monotonic() + 20
    with TestClient(
        make_app(root, Access()), base_url="http://localhost:8765"
    ) as client:  # starts it, as a server does
        plain = client.get("/charts.js", headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers and len(plain.content) > 10**6
        packed = client.get("/charts.js")
        while "content-encoding" not in packed.headers and time.monotonic() < until:
            time.sleep(0.05)
            packed = client.get("/charts.js")
        assert packed.headers["content-encoding"] == "gzip" and packed.content == plain.content
        assert int(packed.headers["content-length"]) < len(plain.content) / 3
        for path in ("/charts.js", "/static/main.js", "/"):
            tag = client.get(path).headers["etag"]
            assert client.get(path, headers={"if-none-match": tag}).status_code == 304


def test_the_chart_library_is_sent_so_that_it_is_compiled_as_it_arrives_and_else_unchanged() -> None:
    source = b'(function(f) { f(); } (self !== "undefined" ? self : this, () => {\n"use strict";\nreturn 1;\n}));\n'
    wanted = b'(function(f) { f(); } (self !== "undefined" ? self : this, (() => {\n"use strict";\nreturn 1;\n})));\n'
    assert compiled_at_once(source) == wanted
    for other in (wanted, b"", b"x: this, () => {", b"window.Plotly = {};"):
        assert compiled_at_once(other) == other


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8765"},
        {"host": "localhost@evil.example"},
        {"host": ""},
        {"host": "["},
        {"host": "[::1"},
        {"origin": "http://["},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_another_site_is_refused(root: Path, headers: dict[str, str]) -> None:
    response = client(root)("/api/runs", headers=headers)
    assert response.status_code == 403
    assert RUN not in response.text


def test_only_reading_is_possible(root: Path) -> None:
    assert {client(root)("/api/runs", method=m).status_code for m in ("POST", "PUT", "DELETE", "OPTIONS")} == {405}


def test_only_the_token_opens_on_loopback_too(root: Path) -> None:  # faults G6
    ask = client(root, Access(hosts=("gpu-box",), token="secret"))
    assert {ask(path).status_code for path in ("/", "/api/runs", "/static/main.js", "/?token=wrong")} == {401}
    assert ask("/api/runs", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert ask("/api/runs", headers={"authorization": "Bearer secret", "host": "gpu-box:1"}).status_code == 200
    opened = ask("/?token=secret")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"]
    assert cookie.startswith("shoal_token_8765=secret;") and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert ask("/api/runs", headers={"cookie": "shoal_token_8765=secret"}).status_code == 200
    assert ask("/api/runs", headers={"cookie": "shoal_token_8766=secret"}).status_code == 401  # another server's
    assert ask("/api/runs", headers={"cookie": "shoal_token_8765=\u00e9".encode()}).status_code == 401  # type: ignore[dict-item]


def test_the_printed_address_carries_a_new_token_and_without_it_nothing_is_answered(
    tmp_path: Path,
) -> None:  # faults G6
    make_run(tmp_path)
    server, printed = start_server(tmp_path, "--host", "127.0.0.1", has_token=True)
    try:
        address, _, token = printed.partition("?token=")
        assert len(token) >= 32
        assert httpx.get(f"{address}api/runs").status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            assert browser.get(printed).status_code == 200
            assert browser.get(f"{address}api/runs").json()["runs"][0]["run"] == RUN
    finally:
        server.kill()


def test_no_token_is_refused_where_other_machines_could_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dash", "--root", str(tmp_path), "--host", "0.0.0.0", "--no-token"]  # faults G6
    assert main(words) == 2 and "--no-token is for loopback alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/..",
        "/api/runs/%2e%2e",
        "/api/runs/..%2f..%2fetc",
        "/api/runs/outside",
        f"/api/runs/{RUN}/logs?name=../run.json",
        f"/api/runs/{RUN}/logs?name=link.log",
        f"/api/runs/{RUN}/logs?name=%2Fetc%2Fpasswd",
        "/static/..%2fserver.py",
        "/static/%2e%2e%2fserver.py",
    ],
)
def test_no_path_leads_out_of_the_runs(root: Path, path: str) -> None:
    outside = root.parent / f"{root.name}-outside"
    outside.mkdir(exist_ok=True)
    (outside / "run.json").write_text('{"secret": 1}')
    for link, target in ((root / "outside", outside), (root / RUN / "logs" / "link.log", outside / "run.json")):
        if not link.is_symlink():
            link.symlink_to(target)
    response = client(root)(path)
    assert response.status_code in (400, 404)
    assert "secret" not in response.text and "root:" not in response.text


def test_a_server_of_its_own_answers_and_ends_at_once_though_a_page_watches(tmp_path: Path) -> None:
    make_run(tmp_path)
    server, address = start_server(tmp_path)
    try:
        with httpx.stream("GET", f"{address}api/runs/{RUN}/stream", timeout=20) as stream:
            assert next(stream.iter_lines()) == "retry: 1000"
            started = time.monotonic()
            server.terminate()
            server.wait(20)
        assert time.monotonic() - started < 8.0
    finally:
        server.kill()


def test_a_run_outside_the_root_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotThere):
        find_run(tmp_path, "../x")
