"""Who may reach the page, by address and by name."""

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def own_names(host: str) -> list[str]:
    """Names under which a page that only this machine reaches answers; empty where others may reach it: then any.

    A page elsewhere could read ours through a name of its own that it lets point at this machine.
    """
    if not is_loopback(host):
        return []
    own = bracketed(host)
    return ["127.0.0.1", "localhost", own, *("[" if own.startswith("[") else ())]  # "[": to older starlettes


def bracketed(host: str) -> str:
    """An address as URLs have it: IPv6 in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare
