"""Server and client of the test, as they run in its pods: any image with Python 3 will do. Standard library only.

    python3 -c PROBER serve '{"name": "near", "http": [8080], "tcp": [8081], "udp": [8082]}'
    python3 -c PROBER try '[{"op": "http", "host": "10.0.0.1", "port": 80, "want": ["near"], "allowed": true}, ...]'

A client tries everything at once and ends when all is decided. What came of it goes, as the pod's termination message
(at most 4,096 bytes), to the API: no need for logs or exec. `allowed` says what is waited for: for a few seconds
something else may come of it, while pods and policies get about.
"""

import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from typing import Any

ATTEMPT = 2.0  # seconds: enough for a second SYN
PATIENCE = 8.0
PAUSE = 0.3
AFFINE, SPREAD = 12, 60  # requests
MESSAGE = "/dev/termination-log"
RESULTS_IN_LOG = 3  # exit code where the message can't be written: then the log's last line is taken for it
MOST_DETAIL = 60


def serve(name: str, http: list[int], tcp: list[int], udp: list[int]) -> None:
    """Answer until ended: HTTP with our name, TCP and UDP with what they were sent."""

    class Http(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(5)
            while self.rfile.readline(4096).strip():
                pass
            body = json.dumps({"name": name, "peer": self.client_address[0]}).encode()
            head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            self.wfile.write(head + body)

    class Tcp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(5)
            self.request.sendall(self.request.recv(4096))

    class Udp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    for kind, handler, ports in (("t", Http, http), ("t", Tcp, tcp), ("u", Udp, udp)):
        for port in ports:
            threading.Thread(target=_server(kind, handler, port).serve_forever, daemon=True).start()
    signal.pause()


def _server(kind: str, handler: Any, port: int) -> socketserver.BaseServer:
    """On all addresses of both families, or of IPv4 where there is no other."""
    base = socketserver.ThreadingTCPServer if kind == "t" else socketserver.ThreadingUDPServer

    class Server(base):  # type: ignore[misc, valid-type]
        address_family = socket.AF_INET6 if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") else socket.AF_INET
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128

        def server_bind(self) -> None:
            if self.address_family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

        def handle_error(self, *_: object) -> None:
            return  # a client that left

    return Server(("::" if Server.address_family == socket.AF_INET6 else "", port), handler)


class Wrong(Exception):
    """There was an answer, but another one than there should be."""


def http_name(host: str, port: int) -> str:
    """Who answers an HTTP request; "" for an answer of others. Raises OSError."""
    with socket.create_connection((host, port), ATTEMPT) as sock:
        sock.settimeout(ATTEMPT)
        where = f"[{host}]" if ":" in host else host
        sock.sendall(f"GET / HTTP/1.0\r\nHost: {where}:{port}\r\n\r\n".encode())
        data = b""
        while piece := sock.recv(4096):
            data += piece
            if len(data) > 65536:
                break
    if not data.startswith(b"HTTP/"):
        raise Wrong("no HTTP")
    try:
        return str(json.loads(data.partition(b"\r\n\r\n")[2])["name"])
    except (ValueError, KeyError, TypeError):
        return ""


def op_http(host: str, port: int, want: list[str]) -> None:
    """An answer; by one of `want`, if that says something."""
    name = http_name(host, port)
    if want and name not in want:
        raise Wrong(f"answered by {name or 'somebody else'}")


def op_tcp(host: str, port: int, want: list[str]) -> None:
    """Something sent comes back."""
    with socket.create_connection((host, port), ATTEMPT) as sock:
        sock.settimeout(ATTEMPT)
        sock.sendall(b"hello\n")
        if not sock.recv(64):
            raise Wrong("closed without an answer")


def op_connect(host: str, port: int, want: list[str]) -> None:
    """The connection is accepted."""
    socket.create_connection((host, port), ATTEMPT).close()


def op_udp(host: str, port: int, want: list[str]) -> None:
    """Something sent comes back."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(ATTEMPT / 2)
        sock.connect((host, port))
        sock.send(b"hello\n")
        sock.recv(64)


def op_dns(host: str, port: int, want: list[str]) -> None:
    """A name has exactly the addresses of `want`, all of one family, by the resolver that programs use."""
    family = socket.AF_INET6 if any(":" in w for w in want) else socket.AF_INET
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)}
    except socket.gaierror as error:
        raise Wrong(f"{error.strerror}") from None
    if found != set(want):
        raise Wrong(f"is {', '.join(sorted(found))}")


def op_same(host: str, port: int, want: list[str]) -> None:
    """All requests are answered by one server."""
    names = {http_name(host, port) for _ in range(AFFINE)}
    if len(names) > 1 or not names <= set(want):
        raise Wrong(f"answered by {' and '.join(sorted(names))}")


def op_spread(host: str, port: int, want: list[str]) -> None:
    """Each of `want` answers some of the requests."""
    names: set[str] = set()
    for _ in range(SPREAD):
        names.add(http_name(host, port))
        if names >= set(want):
            return
    raise Wrong(f"only answered by {' and '.join(sorted(names))}")


def once(probe: dict[str, Any]) -> str:
    """ "ok", or one word or more for what happened instead."""
    try:
        globals()[f"op_{probe['op']}"](probe["host"], probe.get("port", 0), probe.get("want") or [])
    except Wrong as error:
        return f"wrong: {error}"[:MOST_DETAIL]
    except TimeoutError:
        return "timeout"
    except ConnectionRefusedError:
        return "refused"
    except ConnectionResetError:
        return "reset"
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()[:MOST_DETAIL]
    return "ok"


def judge(probe: dict[str, Any], patience: float = PATIENCE) -> str:
    """What came of it: as soon as it is what should come, else what it was at last."""
    end = time.monotonic() + patience
    while True:
        found = once(probe)
        if (found == "ok") == probe["allowed"] or time.monotonic() >= end:
            return found
        time.sleep(PAUSE)


def attempt(probes: list[dict[str, Any]]) -> list[str]:
    """All at once."""
    results = ["not tried"] * len(probes)

    def one(at: int) -> None:
        results[at] = judge(probes[at])

    threads = [threading.Thread(target=one, args=(at,), daemon=True) for at in range(len(probes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def report(results: list[str], path: str = MESSAGE) -> int:
    """Leaves the results where kubelet looks for them. Returns the exit code."""
    text = json.dumps(results, separators=(",", ":"))
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except OSError:
        print(text, flush=True)
        return RESULTS_IN_LOG
    os.write(descriptor, text.encode())
    os.close(descriptor)
    return 0


def main(argv: list[str]) -> int:
    """The command line above."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a container has no default
    mode, settings = argv[0], json.loads(argv[1])
    if mode == "serve":
        serve(settings["name"], settings.get("http", []), settings.get("tcp", []), settings.get("udp", []))
        return 0
    return report(attempt(settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
