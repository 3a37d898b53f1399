"""Run clients of a reward server that attack it, and ones that do not; each kind runs in a separate
process."""

import asyncio
import base64
import contextlib
import json
import os
import random
import struct
import time
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIECE = 1 << 18  # bytes
SMALL = 1.0  # seconds between the requests of an ordinary client


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def header(width: int, height: int, depth: int, colour: int, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def zeros(count: int) -> bytes:
    """Return `count` zeros, compressed, without ever holding them."""
    deflate = zlib.compressobj(9)
    pieces = [deflate.compress(bytes(1 << 16)) for _ in range(count >> 16)]
    return b"".join(pieces) + deflate.compress(bytes(count & 0xFFFF)) + deflate.flush()


def bombs(side: int, max_body: int) -> dict[str, bytes]:
    """Return bodies that cost more than their size suggests. A request may have `side` x `side`
    pixels."""
    end = chunk(b"IEND", b"")
    megabytes_of_zeros = zeros(1 << 28)
    rows = chunk(b"IDAT", zeros(side * (side * 8 + 1) + 64 * side))
    small = header(8, 8, 8, 2)
    few = chunk(b"IDAT", zeros(8 * 25))
    files = {
        "16-bit RGBA": SIGNATURE + header(side, side, 16, 6) + rows + end,
        "interlaced": SIGNATURE + header(side, side, 16, 6, 1) + rows + end,
        "two headers": SIGNATURE + small + header(30000, 30000, 16, 6) + rows + end,
        "header behind": SIGNATURE + small + rows + header(30000, 30000, 16, 6) + end,
        "too large": SIGNATURE + header(60000, 60000, 16, 6) + rows + end,
        "text": SIGNATURE + small + chunk(b"zTXt", b"k\0\0" + megabytes_of_zeros) + few + end,
        "profile": SIGNATURE + small + chunk(b"iCCP", b"k\0\0" + megabytes_of_zeros) + few + end,
        "animation": SIGNATURE + small + chunk(b"acTL", struct.pack(">II", 9999, 0)) + few + end,
        "too many rows": SIGNATURE + small + rows + end,
    }
    bodies = {name: scored([file]) for name, file in files.items()}
    values = b'{"prompts": [], "images": [], "metadata": [' + b"{}," * 250_000 + b"{}]}"
    text = json.dumps({"prompts": ["\U0001f600" * (max_body // 5)]}, ensure_ascii=False).encode()
    return bodies | {
        "values": values,
        "wide text": text,
        "escapes": b'["' + b"\\u0041" * (max_body // 7) + b'"]',
        "numbers": b"[" + b"9" * 4300 + b"]",
        "depth": b"[" * 200_000,
    }


def scored(files: list[bytes]) -> bytes:
    images = [base64.b64encode(file).decode() for file in files]
    count = len(files)
    return json.dumps(
        {"prompts": ["a"] * count, "metadata": [{}] * count, "images": images}
    ).encode()


async def post(port: int, body: bytes) -> int:
    """Return the status of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /score HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body))
        with contextlib.suppress(ConnectionError):  # an answer may have come before
            for start in range(0, len(body), PIECE):
                writer.write(memoryview(body)[start : start + PIECE])
                await writer.drain()
        line = await reader.readline()
        await reader.read()
        return int(line.split()[1])
    finally:
        writer.close()


async def idle(port: int, head: bytes, drip: bytes, end: float) -> None:
    """Hold a connection, and open another one whenever it is cut off."""
    while time.monotonic() < end:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            while time.monotonic() < end:
                writer.write(drip)
                with contextlib.suppress(asyncio.TimeoutError):
                    if not await asyncio.wait_for(reader.read(100), 0.5):
                        break
            writer.close()
        await asyncio.sleep(0.1)


IDLE = (
    (b"", b""),
    (b"", b"G"),
    (b"GET /health HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n"),
    (b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n", b""),
    (b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 16000000\r\n\r\n", b"{"),
    (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b""),
)
NONSENSE = (
    b"\0\xff\xfe\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"FLY /score HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /sc\xe9re HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%ff%fe%00/../../etc HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 50,
    b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" * 50,
    b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}\0\0\0nonsense\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\nzz\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 9" + b"9" * 5000 + b"\r\n\r\n",
    b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 3\r\n\r\n\x1f\x8b\x08",
    b"POST /score HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 300_000,
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /metrics?" + b"a=b&" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
)


async def nonsense(port: int, end: float, seed: int) -> None:
    """Send what is no request, whole or cut off or with bytes changed."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        data = bytearray(rng.choice(NONSENSE))
        for _ in range(rng.choice((0, 0, 1, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data[: rng.choice((len(data), rng.randrange(len(data))))])
            await asyncio.wait_for(reader.read(1000), rng.choice((0.01, 0.3)))
            writer.close()
        await asyncio.sleep(0.05)


def harm(
    port: int, seconds: float, side: int, max_body: int, bombers: int, idlers: int, all_ready, out
) -> None:
    """Put the number of answers by (bomb, status)."""
    os.nice(10)  # it stands for other machines
    bodies = bombs(side, max_body)
    all_ready.wait()
    end = time.monotonic() + seconds
    counts: dict = {}

    async def bomb(index: int) -> None:
        names = list(bodies)
        while time.monotonic() < end:
            name = names[index % len(names)]
            index += 1
            try:
                status = await post(port, bodies[name])
            except (OSError, IndexError):
                status = 0
            counts[name, status] = counts.get((name, status), 0) + 1

    async def all_of_them() -> None:
        tasks = [bomb(index) for index in range(bombers)]
        tasks += [idle(port, *IDLE[index % len(IDLE)], end) for index in range(idlers)]
        tasks += [nonsense(port, end, seed) for seed in range(8)]
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    out.put(counts)


def ordinary(port: int, seconds: float, clients: int, all_ready, out) -> None:
    """Put the seconds and statuses of small requests, each retried until its answer is not
    Retry-After.
    """
    from tests.rl.rewards.in_process import png

    all_ready.wait()
    end = time.monotonic() + seconds
    body = scored([png(5, (64, 64))] * 2)
    found: list = []

    async def client() -> None:
        await asyncio.sleep(random.random() * SMALL)
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                status = await post(port, body)
            except (OSError, IndexError):
                status = 0
            found.append((time.monotonic() - began, status))
            await asyncio.sleep(SMALL)

    async def all_of_them() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(all_of_them())
    out.put(found)
