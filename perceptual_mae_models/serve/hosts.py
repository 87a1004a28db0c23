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
    return ["127.0.0.1", "localhost", host.partition(":")[0] or "["]  # what starlette makes of [::1]:7860
