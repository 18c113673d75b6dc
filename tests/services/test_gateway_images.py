"""The image corpus: right pixels or a clean refusal, in time, and the decoder lives on."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epd.errors import CapacityError, EPDError, MediaError
from epd_services.gateway import images
from epd_services.gateway.images import DecodeLimits, ImageDecoder

RNG = np.random.default_rng(7)
SCENE = np.repeat(np.repeat(RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8), 4, 0), 4, 1)


class Decoding:
    """An `ImageDecoder` on a loop of its own."""

    def __init__(self, **options):
        limits = {k: options.pop(k) for k in list(options) if k in DecodeLimits.__slots__}
        self.seen = []
        self.before = set(children_of(os.getpid()))
        self.runner = asyncio.Runner()
        self.decoder = ImageDecoder(
            DecodeLimits(**limits), observe=lambda s, o: self.seen.append((s, o)), **options
        )
        self.runner.run(self.decoder.start())

    def __call__(self, data):
        pixels = self.runner.run(self.decoder.decode(data))
        array = np.frombuffer(pixels.rgb, np.uint8)
        return array.reshape(pixels.height, pixels.width, 3)

    @property
    def children(self):
        return sorted(set(children_of(os.getpid())) - self.before)

    def close(self):
        self.runner.run(self.decoder.close())
        self.runner.close()


@pytest.fixture(scope="module")
def decode():
    decoding = Decoding(children=1)
    yield decoding
    assert decoding.decoder.restarts == 0
    decoding.close()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows, *extra):
    """A PNG written chunk by chunk, for what Pillow cannot write."""
    raw = b"".join(b"\0" + row for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_lossless_formats(decode, kind):
    image = Image.fromarray(SCENE)
    if kind == "GIF":
        image = image.quantize(96)
        wanted = np.asarray(image.convert("RGB"))
    else:
        wanted = SCENE
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(image, kind, **options)), wanted)


def test_jpeg_is_what_pillow_decodes(decode):
    data = encoded(Image.fromarray(SCENE), "JPEG", quality=90)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decode(data).astype(int) - SCENE).mean() < 20


def test_sixteen_bit_grey_is_scaled(decode):
    values = np.array([[0, 128, 129, 257, 40000, 65535]] * 2, dtype=np.uint16)
    data = png(6, 2, 16, 0, [row.astype(">u2").tobytes() for row in values])
    wanted = np.rint(values / 257).astype(np.uint8)
    assert np.array_equal(decode(data), np.stack([wanted] * 3, -1))


def test_sixteen_bit_colour(decode):
    values = RNG.integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    data = png(5, 4, 16, 2, [row.astype(">u2").tobytes() for row in values])
    assert np.abs(decode(data).astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize(("depth", "scale"), [(1, 255), (2, 85), (4, 17), (8, 1)])
def test_low_depth_grey_and_its_transparent_value(decode, depth, scale):
    per_byte = 8 // depth
    samples = np.arange(16).reshape(2, 8) % (1 << depth)
    rows = []
    for row in samples:
        packed = bytearray()
        for i in range(0, 8, per_byte):
            byte = 0
            for sample in row[i : i + per_byte]:
                byte = byte << depth | int(sample)
            packed.append(byte)
        rows.append(bytes(packed))
    plain = decode(png(8, 2, depth, 0, rows))[..., 0]
    assert np.array_equal(plain, samples * scale)
    clear = decode(png(8, 2, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", 1))))[..., 0]
    assert np.array_equal(clear, np.where(samples == 1, 255, samples * scale))


def test_one_bit(decode):
    bits = RNG.integers(0, 2, (5, 9)).astype(bool)
    wanted = np.stack([bits * np.uint8(255)] * 3, -1)
    assert np.array_equal(decode(encoded(Image.fromarray(bits))), wanted)


def on_white(rgb, alpha):
    alpha = alpha[..., None].astype(float) / 255
    return rgb * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(decode, kind):
    alpha = np.tile(np.array([0, 64, 128, 255], np.uint8), (4, 1))
    rgba = np.dstack([np.full((4, 4), 200, np.uint8), *[np.zeros((4, 4), np.uint8)] * 2, alpha])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = decode(encoded(Image.fromarray(rgba), kind, **options))
    assert np.abs(got - on_white(rgba[..., :3], alpha)).max() <= 1
    assert got[0, 0].tolist() == [255, 255, 255] and got[0, 3].tolist() == [200, 0, 0]


def test_grey_alpha_is_composited_on_white(decode):
    grey_alpha = np.dstack([np.full((2, 4), 50), np.tile([0, 64, 128, 255], (2, 1))])
    image = Image.fromarray(grey_alpha[..., 0].astype(np.uint8)).convert("LA")
    image.putalpha(Image.fromarray(grey_alpha[..., 1].astype(np.uint8)))
    rgb = np.stack([grey_alpha[..., 0]] * 3, -1)
    assert np.abs(decode(encoded(image)) - on_white(rgb, grey_alpha[..., 1])).max() <= 1


def test_palette_with_alpha(decode):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    image.putdata([0, 1, 2, 0, 2, 1, 0, 0])
    got = decode(encoded(image, transparency=bytes([0, 255, 128])))
    red, blue, green = [255, 255, 255], [0, 0, 255], [127, 255, 127]
    assert got[0].tolist() == [red, blue, green, red]
    assert decode(encoded(image, "GIF", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_palettes_that_share_indices_differ(decode):
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0])
    red = decode(encoded(image))
    image.putpalette([0, 0, 255])
    assert red[0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(image))[0, 0].tolist() == [0, 0, 255]


def test_transparent_colour_key(decode):
    image = Image.fromarray(SCENE)
    key = tuple(int(v) for v in SCENE[0, 0])
    got = decode(encoded(image, transparency=key))
    assert got[0, 0].tolist() == [255, 255, 255]
    different = np.any(np.array(key) != SCENE, axis=-1)
    assert np.array_equal(got[different], SCENE[different])


def test_cmyk_adobe_and_plain(decode):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    adobe = encoded(cmyk, "JPEG", quality=95)
    assert np.abs(decode(adobe).astype(int) - [255, 0, 0]).max() <= 4
    start = adobe.index(b"\xff\xee")
    length = struct.unpack(">H", adobe[start + 2 : start + 4])[0]
    plain = adobe[:start] + adobe[start + 2 + length :]
    # without Adobe's mark the stored samples mean what they say: the file above holds inverted ones
    assert np.abs(decode(plain).astype(int) - [0, 0, 0]).max() <= 4


def test_icc_profile_changes_nothing(decode):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = encoded(Image.fromarray(SCENE), icc_profile=profile)
    assert np.array_equal(decode(data), SCENE)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(decode, kind, orientation):
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    turned = decode(encoded(Image.fromarray(SCENE), kind, exif=exif(orientation), **options))
    plain = decode(encoded(Image.fromarray(SCENE), kind, **options))
    rows, columns = np.indices(plain.shape[:2])
    height, width = plain.shape[:2]
    # EXIF: where row 0 and column 0 of the stored image lie in the upright one
    wanted = {
        1: plain,
        2: plain[rows, width - 1 - columns],
        3: plain[height - 1 - rows, width - 1 - columns],
        4: plain[height - 1 - rows, columns],
        5: plain.transpose(1, 0, 2),
        6: plain.transpose(1, 0, 2)[:, ::-1],
        7: plain.transpose(1, 0, 2)[::-1, ::-1],
        8: plain.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(turned, wanted)


@pytest.mark.parametrize("block", [b"", b"junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"II*\0\1"])
def test_damaged_exif_is_ignored(decode, block):
    data = png(3, 2, 8, 2, [b"\1\2\3" * 3] * 2, chunk(b"eXIf", block))
    assert decode(data)[0, 0].tolist() == [1, 2, 3]


def frames(kind, count, size=(20, 20)):
    images = [Image.new("RGB", size, (i % 256, 90, 30)) for i in range(count)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(images[0], kind, save_all=True, append_images=images[1:], **options)


@pytest.mark.parametrize(("kind", "count"), [("GIF", 3000), ("WEBP", 200), ("PNG", 200)])
def test_animations_give_their_first_frame(decode, kind, count):
    data = frames(kind, count)
    began = time.monotonic()
    assert np.abs(decode(data).astype(int) - [0, 90, 30]).max() <= 2
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("other", [1, 2, 3, 4, 5])
def test_tiny_sizes(decode, side, other):
    image = Image.fromarray(RNG.integers(0, 256, (other, side, 3), dtype=np.uint8))
    if min(side, other) < 2:
        refused(decode, encoded(image), "at least 2 pixels")
    else:
        assert np.array_equal(decode(encoded(image)), np.asarray(image))


def test_portrait_and_landscape_differ(decode):
    image = Image.fromarray(RNG.integers(0, 256, (30, 100, 3), dtype=np.uint8))
    assert decode(encoded(image)).shape == (30, 100, 3)
    assert decode(encoded(image.transpose(Image.Transpose.TRANSPOSE))).shape == (100, 30, 3)


def refused(decode, data, text=None):
    began = time.monotonic()
    with pytest.raises(MediaError, match=text) as caught:
        decode(data)
    assert time.monotonic() - began < 2
    assert "0x" not in str(caught.value) and "/" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 30000), (30000, 1), (2, 402), (4, 801)])
def test_extreme_sides(decode, size):
    refused(decode, encoded(Image.new("L", size)), "pixels wide|factor of more than")


@pytest.mark.parametrize(
    ("width", "height", "depth"),
    [(9400, 9400, 1), (13000, 13000, 1), (7000, 7000, 8)],
)
def test_bombs_are_refused_by_their_header(decode, width, height, depth):
    refused(decode, blank_png(width, height, 0, width * depth // 8, depth), "too many pixels")


def test_bomb_in_a_text_chunk(decode):
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100 << 20), 9))
    refused(decode, png(3, 2, 8, 2, [b"\1\2\3" * 3] * 2, text))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_at_twenty_offsets(decode, kind):
    data = encoded(Image.fromarray(SCENE), kind)
    whole = decode(data)
    for cut in np.linspace(0, len(data) - 1, 20).astype(int):
        try:
            got = decode(data[:cut])
        except MediaError:
            continue
        assert np.array_equal(got, whole), f"cut at {cut} of {len(data)}"


def test_damaged_at_random(decode):
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = bytearray(encoded(Image.fromarray(SCENE), kind))
        for _ in range(50):
            damaged = bytearray(data)
            for position in RNG.integers(0, len(data), 3):
                damaged[position] = RNG.integers(0, 256)
            try:
                decode(bytes(damaged))
            except MediaError:
                continue


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"hello, world", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0",
     b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + bytes(64)],
    ids=["empty", "nul", "text", "png", "gif", "jpeg", "webp", "svg", "eps", "psd"],
)  # fmt: skip
def test_not_images(decode, data):
    refused(decode, data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "DDS", "SGI", "EPS"])
def test_other_formats_of_pillow_are_refused(decode, kind):
    refused(decode, encoded(Image.fromarray(SCENE), kind), "PNG, JPEG, WEBP or GIF")


def test_too_many_bytes(decode):
    refused(decode, encoded(Image.fromarray(SCENE)) + bytes(20 << 20), "too many bytes")


@pytest.mark.parametrize(("colour", "bytes_per_pixel"), [(2, 3), (6, 4), (4, 2)])
def test_forty_megapixels_fit_the_memory_limit(colour, bytes_per_pixel):
    decoding = Decoding(children=1, seconds=20.0)
    try:
        data = blank_png(6300, 6300, colour, 6300 * bytes_per_pixel)
        assert decoding(data).shape == (6300, 6300, 3)
        (child,) = decoding.children
        assert peak_kib(child) <= 512 * 1024
    finally:
        decoding.close()


def blank_png(width, height, colour, row_bytes, depth=8):
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(b"\0" * (1 + row_bytes)) for _ in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def children_of(parent):
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [p for p in pids if "image_child\0" in read(p, "cmdline") and parent_of(p) == parent]


def read(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def parent_of(pid):
    return int(read(pid, "stat").rsplit(")", 1)[1].split()[1])


def peak_kib(pid):
    (line,) = [ln for ln in read(pid, "status").splitlines() if ln.startswith("VmHWM")]
    return int(line.split()[1])


def test_memory_limit_is_a_refusal_not_a_death():
    decoding = Decoding(children=1, memory_bytes=128 << 20, seconds=20.0)
    try:
        refused_slowly = blank_png(6000, 6000, 2, 18000)
        with pytest.raises(MediaError, match="memory"):
            decoding(refused_slowly)
        assert decoding(encoded(Image.fromarray(SCENE))).shape == SCENE.shape
        assert decoding.decoder.restarts == 0
    finally:
        decoding.close()


def test_a_decode_that_burns_its_time_is_ended():
    decoding = Decoding(children=1, seconds=0.05)
    try:
        data = blank_png(6000, 6000, 2, 18000)
        began = time.monotonic()
        with pytest.raises(MediaError, match="within its time"):
            decoding(data)
        assert time.monotonic() - began < 2
        assert decoding(encoded(Image.fromarray(SCENE))).shape == SCENE.shape
        assert [outcome for _, outcome in decoding.seen] == ["killed", "ok"]
    finally:
        decoding.close()


def test_the_child_itself_ends_on_cpu_time():
    child = subprocess.Popen(
        [os.sys.executable, "-m", "epd_services.gateway.image_child", "0.05", str(512 << 20),
         "40000000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    data = blank_png(6000, 6000, 2, 18000)
    child.communicate(struct.pack(">I", len(data)) + data, timeout=20)
    assert child.returncode == -signal.SIGPROF


def test_a_killed_child_costs_one_request_and_is_replaced():
    decoding = Decoding(children=1)
    data = encoded(Image.fromarray(SCENE))
    try:
        decoding(data)
        (child,) = decoding.children

        async def stopped_then_killed():
            os.kill(child, signal.SIGSTOP)
            jobs = [asyncio.create_task(decoding.decoder.decode(data)) for _ in range(3)]
            await asyncio.sleep(0.1)
            os.kill(child, signal.SIGKILL)
            return await asyncio.gather(*jobs, return_exceptions=True)

        results = decoding.runner.run(stopped_then_killed())
        assert sum(isinstance(r, MediaError) for r in results) == 1
        assert sum(not isinstance(r, Exception) for r in results) == 2
        assert decoding.decoder.restarts == 1
        assert child not in decoding.children
    finally:
        decoding.close()


def test_an_idle_child_that_died_costs_nothing():
    decoding = Decoding(children=1)
    data = encoded(Image.fromarray(SCENE))
    try:
        (child,) = decoding.children
        os.kill(child, signal.SIGKILL)
        decoding.runner.run(asyncio.sleep(0.2))
        assert np.array_equal(decoding(data), SCENE)
    finally:
        decoding.close()


def test_a_cancelled_decode_leaves_the_child_in_step():
    decoding = Decoding(children=1)
    big = encoded(Image.fromarray(RNG.integers(0, 256, (1500, 1500, 3), dtype=np.uint8)))

    async def cancel_some():
        jobs = [asyncio.create_task(decoding.decoder.decode(big)) for _ in range(4)]
        await asyncio.sleep(0.01)
        for job in jobs[:3]:
            job.cancel()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        return [type(r).__name__ for r in results]

    try:
        assert decoding.runner.run(cancel_some()) == ["CancelledError"] * 3 + ["ImagePixels"]
        assert np.array_equal(decoding(encoded(Image.fromarray(SCENE))), SCENE)
        assert decoding.decoder.restarts == 0
    finally:
        decoding.close()


def test_who_left_leaves_no_bytes_in_the_queue():
    class Upload(bytes):
        """Bytes that can be counted."""

    async def leave():
        jobs = [asyncio.create_task(decoding.decoder.decode(Upload(20))) for _ in range(8)]
        await asyncio.sleep(0.05)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        jobs.clear()
        del job
        gc.collect()
        return sum(type(thing) is Upload for thing in gc.get_objects())

    decoding = Decoding(children=1)
    try:
        os.kill(decoding.children[0], signal.SIGSTOP)
        assert decoding.runner.run(leave()) <= 1, "but for the one that is being decoded"
    finally:
        decoding.close()


@pytest.mark.parametrize("where", ["decode", "start"])
def test_an_accident_of_the_gateway_costs_one_image(monkeypatch, where):
    good = encoded(Image.fromarray(SCENE))
    decoding = Decoding(children=1)
    whole = getattr(images._Child, where)
    failed = []

    async def once(*args):
        if not failed:
            failed.append(args)
            raise MemoryError
        return await whole(*args)

    try:
        if where == "start":
            os.kill(decoding.children[0], signal.SIGKILL)
            time.sleep(0.1)
        monkeypatch.setattr(images._Child, where, once)
        with pytest.raises(EPDError):
            decoding.runner.run(asyncio.wait_for(decoding.decoder.decode(good), 5))
        pixels = decoding.runner.run(asyncio.wait_for(decoding.decoder.decode(good), 20))
        assert (pixels.width, pixels.height) == (48, 32)
        assert len(failed) == 1
    finally:
        decoding.close()


def test_a_full_queue_is_a_capacity_error():
    decoding = Decoding(children=1, queue_size=2)
    data = encoded(Image.fromarray(SCENE))

    async def flood():
        jobs = [decoding.decoder.decode(data) for _ in range(10)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    try:
        results = decoding.runner.run(flood())
        assert sum(isinstance(r, CapacityError) for r in results) == 8
    finally:
        decoding.close()


def test_close_leaves_no_child_and_fails_the_rest():
    decoding = Decoding(children=2)
    decoding.close()
    assert decoding.children == []
    with pytest.raises(EPDError):
        asyncio.run(decoding.decoder.decode(b"x"))


def test_a_small_png_takes_milliseconds(decode):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (224, 224, 3), dtype=np.uint8)))
    decode(data)
    times = []
    for _ in range(15):
        began = time.perf_counter()
        decode(data)
        times.append(time.perf_counter() - began)
    # 1.5 ms on an idle core; the bound leaves room for a busy one
    assert sorted(times)[3] < 0.03
