"""Image URLs: nothing is ever connected that the guard did not check, and nothing runs for long."""

from __future__ import annotations

import asyncio
import gzip
import io
import ipaddress
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image

from epd.errors import CapacityError, MediaError
from epd_services.gateway.fetch import (
    FetchLimits,
    ImageFetcher,
    is_public,
    parse_url,
    resolve,
)

LOOPBACK = ipaddress.ip_address("127.0.0.1")


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def ok(body=PICTURE, *headers, length=None):
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body) if length is None else length}"]
    lines += headers or ["Content-Type: image/png"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Site:
    """A listener that records what reaches it and answers with fixed bytes."""

    def __init__(self, answer=b"", *, tls=None, drip=None):
        self.requests = []
        self.connections = 0
        self._answer, self._drip = answer, drip
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._tls = tls
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client:
            try:
                if self._tls:
                    client = self._tls.wrap_socket(client, server_side=True)
                self.requests.append(client.recv(65536).decode("latin-1"))
                client.sendall(self._answer)
                while self._drip:
                    client.sendall(self._drip)
                    time.sleep(0.02)
                if self._tls:
                    client.close()
            except OSError:
                return

    def close(self):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@contextmanager
def site(*args, **options):
    opened = Site(*args, **options)
    try:
        yield opened
    finally:
        opened.close()


class Names:
    """A name server with one list of answers per question."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def __call__(self, host, port):
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def fetch(url, *, resolver=None, allow=is_public, tls=None, **limits):
    limits.setdefault("ports", tuple(range(1, 65536)))
    fetcher = ImageFetcher(
        FetchLimits(**limits), resolver=resolver or Names(["127.0.0.1"]), allow=allow, tls=tls
    )
    return asyncio.run(fetcher.fetch(url))


def refused(url, **options):
    began = time.monotonic()
    with pytest.raises(MediaError) as caught:
        fetch(url, **options)
    assert time.monotonic() - began < 2
    assert "127." not in str(caught.value) and "://" not in str(caught.value)
    return str(caught.value)


def loopback_allowed(address):
    return address == LOOPBACK


def test_an_allowed_fetch_goes_to_the_checked_address_under_its_name():
    names = Names(["127.0.0.1"])
    with site(ok()) as server:
        url = f"http://pictures.example:{server.port}/a%20b.png?x=1#frag"
        assert fetch(url, resolver=names, allow=loopback_allowed) == PICTURE
    (request,) = server.requests
    assert request.startswith("GET /a%20b.png?x=1 HTTP/1.1\r\n")
    assert f"host: pictures.example:{server.port}\r\n" in request.lower()
    assert "accept-encoding: identity\r\n" in request.lower()
    assert names.asked == ["pictures.example"]


def test_a_second_answer_of_the_name_server_is_never_asked_for():
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    with site(ok()) as server:
        fetch(f"http://rebind.example:{server.port}/", resolver=names, allow=loopback_allowed)
    assert len(names.asked) == 1 and server.connections == 1


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1",
    "fe80::1", "fc00::1", "fd12::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:4136:e378::", "2001:db8::1", "fec0::1",
    "64:ff9b:1::1", "100::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_forbidden_addresses(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111"])
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_names_that_resolve_to_forbidden_addresses(address):
    with site(ok()) as server:
        refused(f"http://name.example:{server.port}/", resolver=Names([address]))
        refused(f"http://name.example:{server.port}/", resolver=Names(["8.8.8.8", address]))
    assert server.connections == 0


def forbidden_urls(port):
    hosts = [
        "127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.0.0.1",
        "017700000001", "0177.0.0.1", "127.0.0.01", "127.000.000.001", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:1]", "[::127.0.0.1]",
        "[64:ff9b::7f00:1]", "[::1%25lo]", "localhost", "localhost.", "LOCALHOST", "a.localhost",
        "127.0.0.1.", "127.0.0.1.example.", "user@127.0.0.1", "user:pw@localhost",
        "example.com@127.0.0.1", "127.0.0.1%2f@example.com", "127.0.0.1%00.example.com",
        "①②⑦.⓪.⓪.①", "127。0。0。1", "\uff4cocalhost", "example.com\\@127.0.0.1",
        "127.0.0.1\\.example.com",
        "example.com#@127.0.0.1", "exa\tmple.com", " 127.0.0.1", "127.0.0.1 ", "169.254.169.254",
        "[fe80::1]", "metadata.google.internal", "-x.example", "a..b", "", ".", "*", "x" * 64,
        "127.0.0.1:80@127.0.0.1", "[127.0.0.1]", "[::1", "::1",
    ]  # fmt: skip
    urls = [f"http://{host}:{port}/x" for host in hosts]
    bare = [f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}/", f"HTTP://127.0.0.1:{port}/",
            f"http:///127.0.0.1:{port}/", f"http:127.0.0.1:{port}", f"http:/127.0.0.1:{port}/",
            f"http:\\\\127.0.0.1:{port}\\", f"http://\\127.0.0.1:{port}/", f"//127.0.0.1:{port}/",
            f"http://127.0.0.1:{port}/\r\nX: y", f"\thttp://127.0.0.1:{port}/",
            f"http://127.0.0.1:{port}:{port}/", "http://127.0.0.1:99999/", "http://a:b:c/",
            f"file://127.0.0.1:{port}/etc/passwd", f"gopher://127.0.0.1:{port}/_x",
            f"ftp://127.0.0.1:{port}/", f"dict://127.0.0.1:{port}/", "http://", "http://?",
            "http:"]  # fmt: skip
    return urls + bare


def test_the_corpus_of_forbidden_urls_reaches_no_listener():
    with site(ok()) as server:
        for url in forbidden_urls(server.port):
            refused(url)
        assert server.connections == 0


def test_a_name_with_only_digits_in_front_is_a_name():
    assert parse_url("http://1.2.3.example/").host == "1.2.3.example"


@pytest.mark.parametrize("location", ["http://169.254.169.254/", "file:///etc/passwd", "/other"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(location, status):
    answer = f"HTTP/1.1 {status} x\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with site(answer) as server:
        url = f"http://name.example:{server.port}/"
        assert "status 200" in refused(url, allow=loopback_allowed)
    assert server.connections == 1


def test_proxy_variables_are_ignored(monkeypatch):
    with site(ok()) as proxy, site(ok()) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        fetch(f"http://name.example:{server.port}/", allow=loopback_allowed)
    assert proxy.connections == 0 and server.connections == 1


HOSTILE = {
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "206": ok().replace(b"200 OK", b"206 Partial"),
    "gzip": ok(gzip.compress(bytes(1 << 20)), "Content-Type: image/png", "Content-Encoding: gzip"),
    "html": ok(b"<html>", "Content-Type: text/html"),
    "svg": ok(b"<svg/>", "Content-Type: image/svg+xml"),
    "short": ok(length=len(PICTURE) + 10),
    "nonsense": b"\x00\xff" * 100,
    "nothing": b"",
    "huge header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000 + b"\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: banana\r\n\r\nx",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers(answer):
    with site(answer) as server:
        refused(f"http://name.example:{server.port}/", allow=loopback_allowed)


def test_an_endless_body_stops_at_the_cap():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"
    with site(head, drip=bytes(1 << 20)) as server:
        text = refused(
            f"http://name.example:{server.port}/", allow=loopback_allowed, max_bytes=3 << 20
        )
    assert "too many bytes" in text


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"])
def test_a_dripping_server_runs_out_of_time(head):
    with site(head, drip=b"x") as server:
        text = refused(f"http://name.example:{server.port}/", allow=loopback_allowed, seconds=0.3)
    assert "in time" in text


def test_a_silent_name_server_runs_out_of_time():
    async def silent(host, port):
        await asyncio.sleep(60)

    assert "in time" in refused("http://name.example/", resolver=silent, seconds=0.2)


def test_names_that_resolve_slowly_hold_up_nobody_elses_threads():
    async def scenario():
        everybodys = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(everybodys)
        let_go = threading.Event()
        busy = asyncio.create_task(asyncio.to_thread(let_go.wait, 10))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(3):
                assert await resolve("127.0.0.1", 80) == ["127.0.0.1"]
        finally:
            let_go.set()
            await busy

    asyncio.run(scenario())


def test_a_name_server_that_fails():
    async def failing(host, port):
        raise socket.gaierror("no such host")

    refused("http://name.example/", resolver=failing)
    refused("http://name.example/", resolver=Names([]))
    refused("http://name.example/", resolver=Names(["rubbish"]))


def test_ports_and_domains():
    with site(ok()) as server:
        url = f"http://img.good.example:{server.port}/"
        refused(url, allow=loopback_allowed, ports=(80, 443))
        refused(url, allow=loopback_allowed, domains=("other.example",))
        refused(url, allow=loopback_allowed, domains=("ood.example",))
        assert server.connections == 0
        assert fetch(url, allow=loopback_allowed, domains=("good.example",)) == PICTURE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and certificate for good.example, and contexts for both sides."""
    pytest.importorskip("cryptography")
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "good.example")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("good.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem, secret = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem, secret)
    return server, ssl.create_default_context(cafile=str(pem))


def test_tls_is_verified_against_the_name_not_the_address(certificate):
    server_tls, client_tls = certificate
    with site(ok(), tls=server_tls) as server:
        good = f"https://good.example:{server.port}/"
        assert fetch(good, allow=loopback_allowed, tls=client_tls) == PICTURE
        refused(f"https://evil.example:{server.port}/", allow=loopback_allowed, tls=client_tls)
        refused(f"https://127.0.0.1:{server.port}/", allow=loopback_allowed, tls=client_tls)
        refused(good, allow=loopback_allowed)
    assert len(server.requests) == 1


def test_through_the_gateway(start_gateway):
    def asking(url):
        part = {"type": "image_url", "image_url": {"url": url}}
        return gateway.ask([part])

    limits = FetchLimits(ports=tuple(range(1, 65536)))
    fetcher = ImageFetcher(limits, resolver=Names(["127.0.0.1"]), allow=loopback_allowed)
    gateway = start_gateway(fetcher=fetcher)
    gateway.say("ok")
    with site(ok()) as server, site(ok(b"not an image")) as other:
        assert asking(f"http://name.example:{server.port}/a.png").status_code == 200
        assert asking(f"http://name.example:{other.port}/a.png").status_code == 400
    (image,) = gateway.dispatcher.generations[-1].submission.images
    assert image.rgb == bytes((9, 8, 7)) * 24


def test_fetched_bytes_count_as_data_in_flight(start_gateway):
    limits = FetchLimits(ports=tuple(range(1, 65536)))
    fetcher = ImageFetcher(limits, resolver=Names(["127.0.0.1"]), allow=loopback_allowed)
    gateway = start_gateway(fetcher=fetcher, intake_bytes=1 << 20)
    with site(ok(bytes(2 << 20))) as server:
        url = f"http://name.example:{server.port}/"
        answer = gateway.ask([{"type": "image_url", "image_url": {"url": url}}])
    assert answer.status_code == CapacityError.status
    assert answer.json()["error"]["code"] == CapacityError.code
    pipeline = gateway.get("/v1/pipeline").json()
    assert pipeline["gateway"]["intake_bytes"] == 0


def test_off_by_default_and_guarded_when_on(start_gateway):
    with site(ok()) as server:
        for enabled in (False, True):
            gateway = start_gateway(fetch_images=enabled, fetch_ports=(server.port,))
            for host in ("127.0.0.1", "localhost"):
                part = {"type": "image_url", "image_url": f"http://{host}:{server.port}/"}
                assert gateway.ask([part]).status_code == 400
        assert server.connections == 0
