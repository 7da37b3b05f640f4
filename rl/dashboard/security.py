"""Who may ask the dashboard, and what a browser may do with the answer.

A page of any site can make a browser send requests to this machine. Three things keep it from reading a run: the Host
must name this server (a DNS name bound to 127.0.0.1 does not), an Origin must be the page's own, and an answer allows
no script but ours. A token keeps other users of this machine out: loopback is theirs too.
"""

import hmac
import ipaddress
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import SplitResult, parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    # The chart library sets styles on its elements: that alone needs 'unsafe-inline', and for styles only.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Who may ask."""

    hosts: tuple[str, ...] = ()
    """Names that a Host may give beside loopback's, any port: ssh may forward another one."""
    token: str = field(default="", repr=False)
    """Needed with every request; "" = none: any user of the machine may ask (--no-token, on loopback only)."""

    def refusal(self, headers: Headers, path: str) -> str:
        """Why a request is refused, its token aside; "" = it is not."""
        host = headers.get("host", "")
        if _split(f"//{host}").hostname not in (*LOOPBACK, *self.hosts):
            return f"the Host {host[:100]!r} is not this server"
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            return f"the Origin {origin[:100]!r} is another site"
        if path.startswith("/api/") and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "another site asked"
        return ""

    def accepts(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: refuses what `Access` does not allow and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = self._refuse(scope)
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("read only", 405, headers={"allow": "GET, HEAD"})
        if reason := self._access.refusal(headers, scope["path"]):
            return PlainTextResponse(f"refused: {reason}", 403)
        if not self._access.token:
            return None
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if asked and self._access.accepts(asked) and scope["path"] == "/":
            answer = RedirectResponse("/", 303)  # so that the token does not stay in the address bar
            answer.set_cookie(_cookie(headers), asked, httponly=True, samesite="strict")
            return answer
        if self._access.accepts(_sent_token(headers)):
            return None
        return PlainTextResponse("refused: open the address with ?token=... that shoal dash printed", 401)


def _cookie(headers: Headers) -> str:
    """Its name. Browsers send cookies to every port of a host: two servers must not overwrite each other's."""
    return f"shoal_token_{_port(headers.get('host', ''))}"


def _sent_token(headers: Headers) -> str:
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(_cookie(headers))
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _port(host: str) -> int:
    try:
        return _split(f"//{host}").port or 80
    except ValueError:
        return 80


def _split(address: str) -> SplitResult:
    """Empty for what is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
