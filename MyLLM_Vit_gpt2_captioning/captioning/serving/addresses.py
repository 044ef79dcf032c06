"""Where a server listens, and which requests it takes for meant for it."""

import ipaddress
import socket
from urllib.parse import urlsplit


def listen(host, port):
    """-> a socket that listens on `host` (a name or an address) and `port` (0 or None: any free one). Raises OSError
    that says which address it is."""
    try:
        return socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        address = host if port is None else f"{host}, port {port}"
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise OSError(f"cannot listen on {address} ({reason}); choose another --host or --port") from error


def is_loopback(host):
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class OnlyOwnHosts:
    """ASGI middleware that answers requests only where their header Host is an address that is served here: by a name
    of its own, which it lets point at this machine, a web page elsewhere would otherwise read what is answered.

    `host`: what the server listens on; `domains`: names that end like one of them are its own, too.
    """

    def __init__(self, app, host, domains=()):
        names = {host, "localhost", socket.gethostname(), socket.getfqdn()}
        self.app, self.domains = app, tuple(domains)
        self.names, self.any_address = {name.lower() for name in names}, host in ("0.0.0.0", "::")

    async def __call__(self, scope, receive, send):
        if scope["type"] in ("http", "websocket") and not self._is_own(dict(scope["headers"]).get(b"host", b"")):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("this address is not served here", 421)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_own(self, header):
        try:
            name = urlsplit(f"//{header.decode('latin-1')}").hostname or ""
        except ValueError:  # brackets that are no IPv6 address
            return False
        try:
            address = ipaddress.ip_address(name)
            return address.is_loopback or self.any_address or name in self.names
        except ValueError:
            return name in self.names or name.endswith(self.domains)
