"""Bytes that RFC 9112 and 9110 forbid, or that two parsers read differently: refused, and nothing behind them is read.

Owns the table, by part of a message. Where a second request would be read, it is SMUGGLED."""

from __future__ import annotations

SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def post(*lines: bytes, body: bytes = b"") -> bytes:
    head = [b"POST /v1/completions HTTP/1.1", b"host: localhost", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def chunks(body: bytes) -> bytes:
    return post(b"transfer-encoding: chunked", body=body)


def get(*lines: bytes) -> bytes:
    return b"\r\n".join([b"GET /livez HTTP/1.1", *lines]) + b"\r\n\r\n"


def started(line: bytes) -> bytes:
    return line + b"\r\nhost: localhost\r\n\r\n"


LENGTHS = (
    b"1e1",
    b"0b0",
    b"1_0",
    b"5a",
    b"a5",
    b"5;",
    b"5,5",
    b"5, 5",
    b"-0",
    b"0\x0b",
    b"0\x00",
    b"\xd9\xa3",
    b"'0'",
    b"0.0",
)
LENGTHS += (
    b"18446744073709551616",
    b"18446744073709551660",
    b"99999999999999999999",
    b"0 0",
    b"0\t1",
    b"+5",
    b"--5",
    b"NaN",
)
CODINGS = (
    b"chunked, chunked",
    b"chunked;q=1",
    b'"chunked"',
    b"chunked\x00",
    b"chunked,",
    b",chunked",
    b"chunked\x0c",
    b"chu nked",
)
CODINGS += (
    b"deflate",
    b"br",
    b"trailers",
    b"",
    b"identity, chunked",
    b"chunked, gzip",
    b"\xefchunked",
    b"chunked=1",
    b"x, chunked",
)
SIZES = (
    b"-1",
    b"g",
    b"1g",
    b"0x",
    b"1_",
    b"0o1",
    b"1.",
    b"1,1",
    b"\xd9\xa3",
    b"1\x00",
    b"\x0b1",
    b"'1'",
    b"f" * 17,
    b"",
)
CHUNKS = {
    "no end of data": b"1\r\na" + LAST_CHUNK,
    "lf behind data": b"1\r\na\n" + LAST_CHUNK,
    "cr behind data": b"1\r\na\r" + LAST_CHUNK,
    "lf behind size": b"1\na\r\n" + LAST_CHUNK,
    "cr behind size": b"1\ra\r\n" + LAST_CHUNK,
    "lf in extension": b"1;a\nb\r\na\r\n" + LAST_CHUNK,
    "nul in extension": b"1;a\x00\r\na\r\n" + LAST_CHUNK,
    "blank line first": b"\r\n1\r\na\r\n" + LAST_CHUNK,
    "more than its size": b"1\r\nabc\r\n" + LAST_CHUNK,
    "trailer without colon": b"0\r\nabc\r\n\r\n",
    "trailer with space": b"0\r\na : b\r\n\r\n",
    "trailer folded": b"0\r\na: b\r\n c\r\n\r\n",
    "trailer with lf": b"0\r\na: b\nc: d\r\n\r\n",
    "trailer with nul": b"0\r\na: b\x00\r\n\r\n",
    "many trailers": b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    "long trailer": b"0\r\na: " + b"b" * 70_000 + b"\r\n\r\n",
}
NAMES = (
    b"x(y",
    b"x)y",
    b"x,y",
    b"x;y",
    b"x=y",
    b"x@y",
    b"x[y",
    b"x{y",
    b"x/y",
    b'x"y',
    b"x\\y",
    b"x?y",
    b"x<y",
    b"\xc3\xa9",
    b"x\x7f",
)
NAMES += (b"x\ty", b"x\x01", b"host ", b"host\t", b"\x0bhost", b"")
VALUES = (b"a\x01b", b"a\x08b", b"a\x7fb", b"a\x0bb", b"a\x0cb", b"a\r", b"\x00", b"a\x1fb", b"\x1b[2J")
HOSTS = (
    b"localhost:8x",
    b"[::1",
    b"::1",
    b"localhost\\evil",
    b"localhost?x",
    b"localhost#",
    b"local host",
    b"localhost;x",
)
HOSTS += (
    b"localhost/",
    b"http://localhost",
    b"\xc3\xa9",
    b"localhost:80:80",
    b"@localhost",
    b"localhost:999999",
    b"%6cocalhost",
)
HOSTS += (b"localhost:-1", b"<localhost>", b"localhost\x00", b"[localhost]", b"localhost,")
LINES = (
    *(b"GET\t/livez HTTP/1.1", b"GET /livez\tHTTP/1.1", b"GET /livez HTTP/1.1 ", b" GET /livez HTTP/1.1"),
    *(
        b"GET /li vez HTTP/1.1",
        b"GET /livez http/1.1",
        b"GET /livez HTTP/1.10",
        b"GET /livez HTTP/01.1",
        b"GET /livez HTTP/1,1",
    ),
    *(
        b"GET /livez HTTP/1.",
        b"GET /livez HTTP/ 1.1",
        b"GET /livez HTTP/1.1x",
        b"GET /livez HTTPS/1.1",
        b"GET",
        b"GET /livez HTTP/3.0",
    ),
    *(
        b"GET livez HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET ?x HTTP/1.1",
        b"GET http:/livez HTTP/1.1",
        b"GET file:///etc/passwd HTTP/1.1",
    ),
    *(
        b"GET \\livez HTTP/1.1",
        b"GET /livez#x HTTP/1.1",
        b"GET /livez\x7f HTTP/1.1",
        b"GET /livez\x80 HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
    ),
    *(
        b"G@T /livez HTTP/1.1",
        b"GET\x00 /livez HTTP/1.1",
        b"GETT /livez HTTP/1.1",
        b"G" * 300 + b" /livez HTTP/1.1",
        b"/livez HTTP/1.1",
    ),
    *(
        b"CONNECT /livez HTTP/1.1",
        b"GET /livez HTTP/1.1\r",
        b"GET /livez HTTP/-1.1",
        b"GET /livez HTTP/1.1;x",
        b"Get /livez HTTP/1.1",
    ),
    *(
        b"GET HTTP/1.1",
        b"GET /livez /livez HTTP/1.1",
        b"GET /livez\x0bHTTP/1.1",
        b"GET /livez\x0cHTTP/1.1",
        b"GET //[ HTTP/1.1\x00",
    ),
)
TWICE = {
    "lengths of two cases": post(b"Content-Length: 0", b"content-length: 44", body=SMUGGLED),
    "hosts of two cases": get(b"Host: localhost", b"hOST: localhost"),
    "keys": get(b"host: localhost", b"authorization: Bearer a", b"Authorization: Bearer b"),
    "x-api-keys": get(b"host: localhost", b"x-api-key: a", b"X-Api-Key: b"),
    "codings of two cases": post(
        b"Transfer-Encoding: chunked", b"transfer-encoding: identity", body=LAST_CHUNK + SMUGGLED
    ),
    "length behind coding": post(b"transfer-encoding: chunked", b"content-length: 44", body=LAST_CHUNK + SMUGGLED),
    "folded length": post(b"content-length:", b" 44", body=SMUGGLED),
    "folded coding": post(b"transfer-encoding:", b" chunked", body=LAST_CHUNK + SMUGGLED),
    "websocket": get(b"host: localhost", b"connection: upgrade", b"upgrade: websocket"),
    "h2c": get(b"host: localhost", b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAAA"),
    "length on get": get(b"host: localhost", b"content-length: 0x0"),
    "chunked get on 1.0": b"GET /livez HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n" + LAST_CHUNK,
}
FORBIDDEN = {
    **{f"length {value!r}": post(b"content-length: " + value, body=SMUGGLED) for value in LENGTHS},
    **{f"coding {value!r}": post(b"transfer-encoding: " + value, body=LAST_CHUNK + SMUGGLED) for value in CODINGS},
    **{f"chunk size {size!r}": chunks(size + b"\r\na\r\n" + LAST_CHUNK) for size in SIZES},
    **{f"chunk, {name}": chunks(body) for name, body in CHUNKS.items()},
    **{f"field name {name!r}": get(b"host: localhost", name + b": a") for name in NAMES},
    **{f"field value {value!r}": get(b"host: localhost", b"x: " + value) for value in VALUES},
    **{f"host {value!r}": get(b"host: " + value) for value in HOSTS},
    **{f"line {line[:40]!r}": started(line) for line in LINES},
    **TWICE,
}
