"""Where a server listens, and whose requests it answers."""

import asyncio

import pytest

pytest.importorskip("starlette")

from captioning.serving.addresses import OnlyOwnHosts, is_loopback, listen


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 99999, r"cannot listen on 127\.0\.0\.1, port 99999 \(.*0-65535\); choose another --host or"),
        ("300.1.2.3", None, r"cannot listen on 300\.1\.2\.3 \(.*\); choose another --host or --port"),
    ],
)
def test_addresses_where_nothing_can_listen(host, port, message):
    with pytest.raises(OSError, match=message):
        listen(host, port)


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match=r"port \d+ \(Address already in use\); choose"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.2", False), ("captions.example", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("listens_on", "asked_for", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "192.168.1.2", 421),
        ("127.0.0.1", "[::1", 421),
        ("127.0.0.1", "", 421),
        ("127.0.0.1", "mine.example.live", 200),
        ("0.0.0.0", "192.168.1.2:8000", 200),
        ("192.168.1.2", "192.168.1.2", 200),
        ("0.0.0.0", "evil.example", 421),
    ],
)
def test_whose_requests_are_answered(listens_on, asked_for, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    sent, scope = [], {"type": "http", "headers": [(b"host", asked_for.encode())]}
    asyncio.run(OnlyOwnHosts(app, listens_on, [".example.live"])(scope, None, send))
    assert sent[0]["status"] == status
