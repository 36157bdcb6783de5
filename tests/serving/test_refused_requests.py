"""Requests that are refused: each limit has its status and one line; nobody who is slow or broken blocks others."""

import base64
import io
import json
import socket
import threading
import time

import httpx
import pytest
from PIL import Image

import pnc
from pnc.serving.batching import Batcher
from pnc.serving.limits import Limits
from pnc.serving.refusals import Refusal
from running_server import TOKEN, clone_file, deployment, image_bytes, running

IMAGE = image_bytes(1)[0]
SMALL = Limits(batch=4, wait_ms=0, body_bytes=50_000, pixels=10_000, body_seconds=1.0, clone_bytes=100_000)


@pytest.fixture(scope="module")
def server():
    with running(deployment(None, "dog"), SMALL) as found:
        yield found


def large_png(side=200):
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def eps():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


def encoded(content):
    return base64.b64encode(content).decode()


def png_that_claims(width, height):
    """The beginning of a PNG file: its header, and the first bytes of its pixels."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT" + bytes(20)


BOUNDARY = {"content-type": "multipart/form-data; boundary=x"}
REFUSED = [
    (b"", {}, 422, "has no image"),
    (b"no image", {}, 422, "not an image of a known format; send one of BMP, GIF"),
    (IMAGE[:-30], {}, 422, "not a readable image"),
    (eps(), {}, 422, "not an image of a known format"),
    (b"x" * 50_001, {}, 413, "more than 50,000 bytes"),
    (large_png(), {}, 413, "200x200 pixels; send at most 10,000"),
    (png_that_claims(60_000, 60_000), {}, 413, "more pixels than can be decoded safely"),
    (IMAGE, {"content-type": "text/plain"}, 415, "content type 'text/plain'"),
    (b"{", {"content-type": "application/json"}, 422, "not JSON; expected"),
    (b"[" * 40_000, {"content-type": "application/json"}, 422, "not JSON; expected"),
    (b"[1]", {"content-type": "application/json"}, 422, 'expected {"image": BASE64}'),
    (b'{"images": []}', {"content-type": "application/json"}, 422, "has no image"),
    (b'{"images": [1]}', {"content-type": "application/json"}, 422, 'expected {"image": BASE64}'),
    (
        json.dumps({"image": encoded(IMAGE), "images": [encoded(IMAGE)]}).encode(),
        {"content-type": "application/json"},
        422,
        'expected {"image": BASE64}',
    ),
    (b'{"image": []}', {"content-type": "application/json"}, 422, 'expected {"image": BASE64}'),
    (b'{"image": "?"}', {"content-type": "application/json"}, 422, "not base64"),
    (json.dumps({"images": [encoded(IMAGE)] * 5}).encode(), {"content-type": "application/json"}, 413, "at most 4"),
    (b"x", BOUNDARY, 422, "the form cannot be read"),
    (b"--x--", {"content-type": "multipart/form-data"}, 422, "the form cannot be read"),
    (b"--x\r\n\r\nx\r\n--x--\r\n", BOUNDARY, 422, "the form cannot be read"),
    (b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x; charset=no"}, 422, "the form|has no image"),
]


@pytest.mark.parametrize(("content", "headers", "status", "text"), REFUSED)
def test_bad_bodies_have_their_status_and_one_line(server, content, headers, status, text):
    import re

    answer = server.post(content, headers=headers)
    assert answer.status_code == status, answer.text
    assert re.search(text, answer.json()["error"]) or text in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and "Traceback" not in answer.text


def test_an_image_may_come_as_curl_sends_it(server):
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert server.post(IMAGE, headers=kind).json() == server.post(IMAGE).json()


def test_too_many_files_in_a_form_are_refused(server):
    for number in (5, 9):
        answer = httpx.post(f"{server.url}/predict", files=[("images", IMAGE)] * number)
        assert answer.status_code == 413, answer.text
    one = [("note", (None, b"text")), ("images", IMAGE)]
    assert httpx.post(f"{server.url}/predict", files=one).status_code == 200, "fields without a file are ignored"


@pytest.mark.parametrize(
    ("query", "text"),
    [("?top=0", "top: "), ("?top=x", "top: "), ("?clones=nope", "no attached clone 'nope'")],
)
def test_bad_queries_are_one_line(server, query, text):
    answer = server.post(IMAGE, query)
    assert answer.status_code == 422 and text in answer.json()["error"]


def test_unknown_routes_and_methods(server):
    assert httpx.get(f"{server.url}/nothing").status_code == 404
    answer = httpx.get(f"{server.url}/predict")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.json()["error"]


def test_administration_needs_the_token(server, tmp_path):
    address, content = f"{server.url}/clones/elk", clone_file("elk")
    for headers in (
        {},
        {"Authorization": "Bearer no"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer é"},
    ):
        encoded_headers = {key: value.encode() for key, value in headers.items()}
        for answer in (
            httpx.put(address, content=content, headers=encoded_headers),
            httpx.delete(f"{server.url}/clones/dog", headers=encoded_headers),
        ):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    path = tmp_path / "elk.safetensors"
    path.write_bytes(content)
    closed = "has no token, so nobody may change its clones"
    with running(deployment(), token=None) as other, other.client("any") as client:  # noqa: SIM117
        with pytest.raises(pnc.InputError, match=closed):
            client.attach("elk", path)
    with server.client() as client:
        assert client.clones() == {"dog": ("dog",)}


def test_clones_over_http(server, tmp_path):
    path = tmp_path / "elk.safetensors"
    path.write_bytes(clone_file("elk"))
    with server.client() as client:
        client.attach("a/b c?", path)
        assert client.clones()["a/b c?"] == ("elk",)
        (status,) = [one for one in client.status()["clones"] if one["name"] == "a/b c?"]
        assert status["owner"] == "http" and status["n_macs"] > 0
        with pytest.raises(pnc.MismatchError, match="has a class 'elk' already"):
            client.attach("second", path)
        client.attach("a/b c?", path)
        client.detach("a/b c?")
        with pytest.raises(pnc.InputError, match=r"no clone 'a/b c\?' is attached"):
            client.detach("a/b c?")
        path.write_bytes(b"x" * 100_001)
        with pytest.raises(pnc.InputError, match="more than 100,000 bytes"):
            client.attach("elk", path)
        assert client.clones() == {"dog": ("dog",)}


def connected(server, *parts):
    made = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    for part in parts:
        made.sendall(part)
    return made


def test_slow_and_broken_clients_block_nobody(server):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n"
    silent = [connected(server) for _ in range(20)]
    half_heads = [connected(server, head) for _ in range(20)]
    half_bodies = [connected(server, head + b"\r\nhalf") for _ in range(20)]
    for _ in range(20):
        connected(server, head + b"\r\nhalf").close()
        connected(server, b"\x00\xff nothing of HTTP\r\n\r\n").close()
    start = time.monotonic()
    for _ in range(5):
        assert server.post(IMAGE).status_code == 200
    assert time.monotonic() - start < 2
    for one in half_bodies:
        assert one.recv(1000).startswith(b"HTTP/1.1 408")
    for one in (*silent, *half_heads):
        assert one.recv(1000) == b"", "closed without an answer"
    for one in (*silent, *half_heads, *half_bodies):
        one.close()
    assert server.server.admission.n_bytes == server.server.admission.n_requests == 0


def test_a_second_head_has_its_time_too(server):
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    one = connected(server, whole)
    assert one.recv(1000).startswith(b"HTTP/1.1 200")
    for part in (b"GET /heal", b"th HTTP/1.1\r\nX: "):
        one.sendall(part)
        time.sleep(0.1)
    assert one.recv(1000) == b""
    one.close()


def test_a_head_without_end_is_refused(server):
    one = connected(server, b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
    with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as the system likes
        for _ in range(1000):
            one.sendall(b"x" * 10_000)
    one.close()
    assert server.post(IMAGE).status_code == 200


def test_a_body_that_goes_on_after_its_refusal_is_cut_off(server):
    one = connected(server, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\nx")
    assert one.recv(1000).startswith(b"HTTP/1.1 413")
    start = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011
        while time.monotonic() - start < 10:
            one.sendall(b"x")
            time.sleep(0.05)
    one.close()


def test_a_client_that_keeps_its_connection_is_not_closed(server):
    with httpx.Client() as client:
        for _ in range(3):
            assert client.post(f"{server.url}/predict", content=IMAGE).status_code == 200
            time.sleep(0.8)


def test_a_body_in_chunks_is_counted(server):
    def parts():
        for _ in range(60):
            yield b"x" * 1000

    assert httpx.post(f"{server.url}/predict", content=parts()).status_code == 413


@pytest.mark.parametrize(
    ("limits", "status", "text"),
    [
        (Limits(queue=2, wait_ms=0), 503, "the queue is full: 2 requests"),
        (Limits(per_client=2, wait_ms=0), 429, "2 requests of this client"),
        (Limits(all_bytes=2 * len(IMAGE), wait_ms=0), 503, "too many bytes"),
    ],
)
def test_more_than_the_server_can_hold_is_refused_at_once(limits, status, text, monkeypatch):
    gate, compute = threading.Event(), Batcher._compute

    def waiting(self, *arguments):
        gate.wait(10)
        return compute(self, *arguments)

    monkeypatch.setattr(Batcher, "_compute", waiting)
    with running(deployment(), limits) as server:
        answers = []
        held = [threading.Thread(target=lambda: answers.append(server.post(IMAGE).status_code)) for _ in range(2)]
        for one in held:
            one.start()
        end = time.monotonic() + 5
        while server.server.admission.n_requests < 2 and time.monotonic() < end:
            time.sleep(0.01)
        refused = server.post(IMAGE)
        assert refused.status_code == status and text in refused.json()["error"]
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/health").status_code == 200
        gate.set()
        for one in held:
            one.join()
        assert answers == [200, 200]
        assert server.post(IMAGE).status_code == 200
        lines = httpx.get(f"{server.url}/metrics").text
        assert f'pnc_requests_total{{method="POST",route="/predict",status="{status}"}} 1.0' in lines


def test_the_client_waits_while_the_server_is_busy(monkeypatch):
    with running(deployment(), Limits(wait_ms=0)) as server:
        calls, place = [], type(server.server.admission).place

        def busy_twice(self, client):
            calls.append(client)
            if len(calls) <= 2:
                raise Refusal(503, "the queue is full", 1)
            return place(self, client)

        monkeypatch.setattr(type(server.server.admission), "place", busy_twice)
        with server.client() as client:
            assert len(client.predict(IMAGE)) == 1 and len(calls) == 3
        calls.clear()
        with pnc.Client(server.url, patience=0) as client, pytest.raises(pnc.ServerError, match="the queue is full"):
            client.predict(IMAGE)
    with pnc.Client(server.url, patience=0) as client:
        assert not client.is_ready()
        with pytest.raises(pnc.ServerError, match="does not answer"):
            client.predict(IMAGE)
    with pytest.raises(pnc.InputError, match="url: expected http://HOST:PORT"):
        pnc.Client("localhost:8000")


@pytest.mark.parametrize("values", [{"batch": 0}, {"queue": True}, {"wait_ms": -1.0}, {"pixels": float("nan")}])
def test_limits_are_checked(values):
    with pytest.raises(pnc.InputError, match=f"^{next(iter(values))}: expected a number, at least"):
        Limits(**values)


def test_an_error_of_the_network_is_an_error_of_its_requests_only(monkeypatch):
    with running(deployment(), Limits(wait_ms=0)) as server:
        with monkeypatch.context() as broken:
            broken.setattr(Batcher, "_compute", lambda *_: 1 / 0)
            assert server.post(IMAGE).status_code == 500
        assert server.post(IMAGE).status_code == 200
