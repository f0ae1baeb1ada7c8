"""
Connections to servers that are not trusted: none to an inner network, wherever a name or a redirect leads, and none
that lasts longer than it may, however slowly the other side sends.
"""

import ipaddress
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable
from typing import Any

import httpcore2
import httpx2


# Addresses of IPv4 behind a translator.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class InnerAddressError(Exception):
    """An address that is not one of the public internet."""


class GuardedTransport(httpx2.BaseTransport):
    """
    What a `httpx2.Client` sends its requests by. Redirects are requests like any others. Proxies are those of the
    environment.

    Args:
        connections (`int`): Connections at a time.
        allow_private (`bool`): Whether inner networks may be reached: private addresses, this machine, and all else
            that is not the public internet.
    """

    def __init__(self, connections: int, allow_private: bool):
        self.allow_private = allow_private
        self._connections = connections
        self._clock = threading.local()
        self._ssl_context = httpx2.create_ssl_context()
        self._pools: dict[str | None, httpcore2.ConnectionPool] = {None: self._pool(None)}
        self._lock = threading.Lock()

    def set_deadline(self, deadline: float) -> None:
        """What this thread waits for from now on fails at `deadline`, in the seconds of `time.monotonic`."""
        self._clock.deadline = deadline

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        proxy = None if urllib.request.proxy_bypass(url.host) else urllib.request.getproxies().get(url.scheme)
        if proxy is not None and not self.allow_private:
            # The proxy looks the name up itself: what this machine knows of it is all that can be checked.
            refuse_inner_addresses(url.host, missing_ok=True)
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._pool(proxy)
        response = self._pools[proxy].handle_request(
            httpcore2.Request(
                request.method,
                httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                extensions=request.extensions,
            )
        )
        assert isinstance(response.stream, Iterable)
        return httpx2.Response(response.status, headers=response.headers, stream=_Body(response.stream))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _pool(self, proxy: str | None) -> httpcore2.ConnectionPool:
        return httpcore2.ConnectionPool(
            ssl_context=self._ssl_context,
            proxy=None if proxy is None else httpcore2.Proxy(proxy),
            max_connections=self._connections,
            network_backend=_Backend(self._clock, self.allow_private or proxy is not None),
        )


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: Any):
        self._stream = stream

    def __iter__(self):
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _Backend(httpcore2.NetworkBackend):
    """Connects to the addresses that were checked, and to no other that a second look-up might give."""

    def __init__(self, clock: threading.local, allow_private: bool):
        self._clock = clock
        self._allow_private = allow_private
        self._inner = httpcore2.SyncBackend()

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        addresses = [host] if self._allow_private else refuse_inner_addresses(host)
        for number, address in enumerate(addresses, start=1):
            left = _time_left(self._clock, timeout)
            try:
                stream = self._inner.connect_tcp(address, port, left, local_address, socket_options)
                return _Stream(stream, self._clock)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if number == len(addresses):
                    raise

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Stream(httpcore2.NetworkStream):
    """Each read waits for what is left until the deadline: a time-out that starts anew with every byte never ends."""

    def __init__(self, inner: httpcore2.NetworkStream, clock: threading.local):
        self._inner = inner
        self._clock = clock

    def read(self, max_bytes, timeout=None):
        return self._inner.read(max_bytes, _time_left(self._clock, timeout))

    def write(self, buffer, timeout=None):
        self._inner.write(buffer, _time_left(self._clock, timeout))

    def close(self):
        self._inner.close()

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        left = _time_left(self._clock, timeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._clock)

    def get_extra_info(self, info):
        return self._inner.get_extra_info(info)


def _time_left(clock: threading.local, timeout: float | None) -> float:
    left = clock.deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("not read to its end in time")
    return left if timeout is None else min(left, timeout)


def refuse_inner_addresses(host: str, missing_ok: bool = False) -> list[str]:
    """The addresses of a host; raises [`InnerAddressError`] if one of them is not of the public internet, and
    `httpcore2.ConnectError` if there is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if missing_ok:
            return []
        raise httpcore2.ConnectError(str(error)) from error
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
    for address in addresses:
        if not is_public(address):
            raise InnerAddressError(f"'{host}' is {address}, an address of an inner network")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where it carries another within it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        carried = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(one is not None and not is_public(str(one)) for one in carried):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast
