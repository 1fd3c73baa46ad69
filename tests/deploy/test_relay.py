"""The nodes' way to the sandbox gateway, as its container runs it, before a real HTTP server."""

from __future__ import annotations

import http.client
import http.server
import os
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.deploy.conftest import DEPLOY
from tests.ports import free_port


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with what it was sent, on a connection that stays."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Gateway(http.server.ThreadingHTTPServer):
    """Stands for the sandbox gateway, and tells when a connection has ended."""

    daemon_threads = True

    def __init__(self) -> None:
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Echo)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        super().shutdown_request(request)
        self.ended.set()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def relay(gateway: Gateway) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    process = subprocess.Popen(
        [str(DEPLOY / "relay"), f"127.0.0.1:{gateway.server_address[1]}"],
        env={**os.environ, "SINGLESTREAM_RELAY__HOST": "127.0.0.1", "SINGLESTREAM_RELAY__PORT": str(port)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "relay: 127.0.0.1:" in process.stderr.readline()
    yield process, port
    process.kill()
    process.wait()
    process.stderr.close()


def post(client: http.client.HTTPConnection, body: bytes) -> bytes:
    client.request("POST", "/", body)
    reply = client.getresponse()
    assert reply.status == 200
    return reply.read()


def test_requests_pass_both_ways(relay: tuple[subprocess.Popen[str], int]) -> None:
    process, port = relay
    clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(8)]
    for round_ in range(2):  # the second one on the same connections
        for number, client in enumerate(clients):
            body = bytes([number, round_]) * 500_000  # more than any buffer on the way
            assert post(client, body) == body
    for client in clients:
        client.close()
    process.terminate()
    assert process.wait(60) == 0


def test_an_end_is_passed_on(relay: tuple[subprocess.Popen[str], int], gateway: Gateway) -> None:
    """A caller that gives up is gone for the gateway; a gateway that is gone is an error for its callers, at once."""
    process, port = relay
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    assert post(client, b"x") == b"x"
    client.close()
    assert gateway.ended.wait(60)
    gateway.shutdown()
    gateway.server_close()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as late:
        assert late.recv(1) == b""
    assert process.stderr is not None
    assert "ConnectionRefusedError" in process.stderr.readline()
