"""Who may reach the page, by address and by name, and from which other pages."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

Messages = Callable[..., Awaitable[Any]]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def own_names(host: str, more: Sequence[str] = ()) -> list[str]:
    """Names under which a page answers; empty: under any.

    A page elsewhere could read ours through a name of its own that it lets point at this machine.

    Args:
        host: Where it listens. If only this machine reaches that, it answers to names of this machine alone.
        more: Names that are its own, too, such as that of a proxy before it.
    """
    if not is_loopback(host):
        return list(more)
    own = bracketed(host)
    return ["127.0.0.1", "localhost", own, *more, *("[" if own.startswith("[") else ())]  # "[": to older starlettes


def bracketed(host: str) -> str:
    """An address as URLs have it: IPv6 in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


class OwnPagesOnly:
    """Refuses what a page elsewhere sends: a form of any site that is open in the browser could post files to ours.

    ASGI middleware.

    Args:
        app: What answers otherwise.
    """

    def __init__(self, app: Messages) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Messages, send: Messages) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or not comes_from_elsewhere(scope):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"sent by a page elsewhere"})


def comes_from_elsewhere(scope: MutableMapping[str, Any]) -> bool:
    """Whether the browser says that another site's page sent a request; programs say nothing."""
    headers: dict[str, str] = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    if (site := headers.get("sec-fetch-site")) is not None:  # right behind proxies, too
        return site == "cross-site"
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")
