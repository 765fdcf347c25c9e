"""Headers: what Pillow says of good files; a bounded refusal of anything else."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from loading import image_file, noise, rotated
from PIL import Image
from test_decode import npy, tiff

from fastmae.data import formats
from fastmae.data.decode import UndecodableImage, decode
from fastmae.data.formats import MODES, BadImage, Format, Reader, parse_header, read_header, reader_over, stored_size


def photographs() -> Iterator[tuple[str, bytes]]:
    """Every format, mode and option that changes a header, in several sizes."""
    for height, width in ((9, 300), (257, 3)):
        image = Image.fromarray(noise(height, width))
        alpha = image.copy()
        alpha.putalpha(image.getchannel(0))
        sixteen = Image.fromarray(np.arange(height * width, dtype=np.uint16).reshape(height, width))
        for exif, profile in itertools.product((None, 3, 6, 9), (b"", bytes(40_000))):  # 9 is no orientation
            options = {"icc_profile": profile} | ({"exif": rotated(exif)} if exif else {})
            for mode, progressive in itertools.product(("L", "RGB", "CMYK"), (False, True)):
                yield "JPEG", image_file("JPEG", image.convert(mode), progressive=progressive, quality=50, **options)
            for other in (
                *(image.convert(mode) for mode in ("1", "L", "P", "RGB")),
                alpha.convert("LA"),
                alpha,
                sixteen,
            ):
                yield "PNG", image_file("PNG", other, **options)
            for other, lossless in itertools.product((image, alpha, alpha.convert("L")), (False, True)):
                yield "WEBP", image_file("WEBP", other, lossless=lossless, **options)
        for bits in (1, 2, 4):
            yield "PNG", image_file("PNG", image.quantize(2**bits), bits=bits)


def test_photographs_have_the_headers_that_pillow_reads():
    for format_, content in photographs():
        with Image.open(io.BytesIO(content)) as image:
            tags = Image.Exif()
            tags.load(image.info.get("exif", b""))
            turned = tags.get(0x0112, 1)
            channels = 1 if image.mode in ("1", "L", "LA", "I;16") else 3
            expected = (Format[format_], *image.size[::-1], turned if turned < 9 else 1, channels, image.mode)
        assert parse_header(reader_over(content, "image")) == expected
        assert stored_size(np.frombuffer(content, np.uint8)) == expected[1:3]
        assert expected[-1] in MODES
        if len(content) < 100_000:
            for cut in (len(content) - 13, len(content) * 2 // 3, 20):  # a chunk is 12 bytes at least
                with pytest.raises(BadImage):
                    parse_header(reader_over(content[:cut], "image.jpg"))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_metadata_does_not_make_an_image_bad():
    """A profile that inflates to 64 MB, a text with a wrong checksum, and megabytes of segments."""
    pixels = noise()
    png, jpeg = image_file("PNG", pixels), image_file("JPEG", pixels)
    metadata = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1 << 26))) + chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    encoded = png[:33] + metadata + png[33:]
    assert parse_header(reader_over(encoded, "a.png")) == parse_header(reader_over(png, "a.png"))
    assert np.array_equal(decode(np.frombuffer(encoded, np.uint8)), pixels)
    segments = (b"\xff\xe5\xff\xff" + bytes(65533)) * 100
    encoded = jpeg[:2] + segments + jpeg[2:]
    assert parse_header(reader_over(encoded, "a.jpg")) == parse_header(reader_over(jpeg, "a.jpg"))
    assert stored_size(np.frombuffer(encoded, np.uint8)) == (20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "npy"])
def test_a_terabyte_behind_a_header_is_not_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(formats, "_MAX_SCAN", 4 << 20)
    pixels = noise()
    arrays, formats_ = {"tif": tiff, "npy": npy}, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
    content = bytes(arrays[suffix](pixels)) if suffix in arrays else image_file(formats_[suffix], pixels)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content[:-12] if suffix in ("jpg", "png") else content)
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    if suffix in ("jpg", "png"):
        with pytest.raises(BadImage, match=r"truncated: no end of image in 4\d{6} bytes of 1099511627776"):
            read_header(path)
    else:
        assert read_header(path)[1:3] == (20, 30)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def with_strip(image: bytes, strip: bytes) -> bytes:
    """A little-endian TIFF of one strip, with another one in its place."""
    with tifffile.TiffFile(io.BytesIO(image)) as file:
        tags = file.pages[0].tags
        offset, count = (tags[number].valueoffset for number in (273, 279))
    changed = bytearray(image + strip)
    changed[offset : offset + 4] = struct.pack("<I", len(image))
    changed[count : count + 4] = struct.pack("<I", len(strip))
    return bytes(changed)


@pytest.mark.parametrize("compression", ["zlib", "packbits"])
def test_a_tiff_inflates_to_no_more_than_its_pixels(compression):
    """4 MB of deflated zeros would be 4 GB."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    bomb = parts[0] + parts[1] * 4095 if compression == "zlib" else b"\x81\0" * 2_000_000
    values = np.zeros((64, 64), np.uint8)
    whole = bytes(tiff(values, compression="zlib", photometric="minisblack"))
    if compression == "packbits":
        whole = whole.replace(struct.pack("<HHIH", 259, 3, 1, 8), struct.pack("<HHIH", 259, 3, 1, 32773))
    padded = zlib.compress(bytes(5000)) if compression == "zlib" else b"\x81\0" * 33
    assert np.array_equal(decode(np.frombuffer(with_strip(whole, padded), np.uint8), channels=1)[..., 0], values)
    encoded = np.frombuffer(with_strip(whole, bomb), np.uint8)
    assert parse_header(reader_over(encoded, "a.tif")).height == 64
    tracemalloc.start()
    with pytest.raises(UndecodableImage, match="more than twice the 4096 bytes of its pixels"):
        decode(encoded, channels=1)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(encoded) + (1 << 20)
    tracemalloc.stop()


def test_pages_without_end_and_brackets_without_end(monkeypatch):
    monkeypatch.setattr(logging.getLogger("tifffile"), "disabled", True)
    image = bytearray(bytes(tiff(noise())))
    [start] = struct.unpack("<I", image[4:8])
    [tags] = struct.unpack("<H", image[start : start + 2])
    end = start + 2 + 12 * tags
    image[end : end + 4] = struct.pack("<I", start)
    with pytest.raises(BadImage, match="pages"):
        parse_header(reader_over(image, "a.tif"))
    many = io.BytesIO()
    with tifffile.TiffWriter(many) as file:
        for i in range(100):
            file.write(np.zeros((4 + i, 4), np.uint8))
    with pytest.raises(BadImage, match="64 pages or more"):
        parse_header(reader_over(many.getvalue(), "a.tif"))
    for shape in (b"-" * 9000 + b"1", b"(" * 9000, b"[" * 150 + b"]" * 150, b"9" * 5000):
        text = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b"}\n"
        encoded = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text
        with pytest.raises(BadImage):
            parse_header(reader_over(encoded, "a.npy"))
        with pytest.raises(UndecodableImage):
            decode(np.frombuffer(encoded, np.uint8))


# Fuzzing

ABSURD = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63)


def seeds() -> dict[str, bytes]:
    pixels, grey = noise(), noise()[..., 0]
    files = {
        "exif.jpg": image_file("JPEG", pixels, exif=rotated(6)),
        "progressive.jpg": image_file("JPEG", pixels, progressive=True),
        "palette.png": image_file("PNG", Image.fromarray(pixels).quantize(16), exif=rotated(6)),
        "exif.webp": image_file("WEBP", pixels, exif=rotated(6)),
        "lossless.webp": image_file("WEBP", pixels, lossless=True),
        "big.tif": tiff(pixels, bigtiff=True, compression="zlib"),
        "tiled.tif": tiff(pixels, byteorder=">", tile=(16, 16)),
        "planes.tif": tiff(np.stack([grey] * 4), planarconfig="separate", photometric="minisblack"),
        "a.npy": npy(pixels, (2, 0)),
    }
    files = {name: bytes(content) for name, content in files.items()}
    shapes = (b"(-5, 20, 3)", b"(20, -5)", b"(1e9, 2)", b"(10000000000, 1)", b"(True, 7)", b"()", b"'|O'")
    for i, shape in enumerate(shapes):
        files[f"{i}.npy"] = files["a.npy"].replace(b"(20, 30, 3)", shape)
    return files


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Noise, an absurd number, a cut or a hole, mostly within the header."""
    data, at = bytearray(content), int(random.integers(min(len(content), random.choice([64, 400]))))
    size = int(random.choice([1, 2, 4, 8]))
    match random.integers(4):
        case 0:
            data[at : at + size] = random.bytes(size)
        case 1:
            number = int(random.choice(np.array(ABSURD, np.uint64))) % 256**size
            data[at : at + size] = number.to_bytes(size, random.choice(["little", "big"]))
        case 2:
            del data[random.integers(len(content)) :]
        case 3:
            del data[at : at + random.integers(1, len(content))]
    return bytes(data)


def test_whatever_the_bytes_a_header_is_read_or_refused(monkeypatch):
    """Nothing but BadImage is raised, what is accepted fits into the index, and it decodes or is refused."""
    monkeypatch.setattr(logging.getLogger("tifffile"), "disabled", True)
    random, accepted, refused, decoded, asked = np.random.default_rng(0), 0, 0, 0, 0

    def read(at: int, count: int) -> bytes:
        nonlocal asked
        asked += count  # a file on a disk would make room for as many
        return content[at : at + count]

    files = seeds()
    for name, content in [(name, mutated(files[name], random)) for name in files for _ in range(120)]:
        asked, encoded = 0, np.frombuffer(content, np.uint8)
        stored_size(encoded)
        try:
            header = parse_header(Reader(name, len(content), read))
        except BadImage:
            refused += 1
        else:
            assert min(header[1:3]) > 0
            assert max(header[1:3]) < 2**32
            assert MODES.index(header.mode)
            accepted += 1
            if header.height * header.width < 1_000_000:
                with contextlib.suppress(UndecodableImage):
                    decode(encoded, header.orientation, channels=header.channels, value_range=(0, 255))
                    decoded += 1
        assert asked < 17 << 20
    assert min(accepted, refused, decoded) > 200


def test_a_file_system_that_fails_is_no_bad_image(monkeypatch):
    """Whichever read fails, the error is the file system's, so that it is retried."""
    monkeypatch.setattr(logging.getLogger("tifffile"), "disabled", True)

    def read(at: int, count: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        return content[at : at + count]

    for name, content in itertools.islice(seeds().items(), 9):
        for good_reads in itertools.count():
            left = good_reads
            with contextlib.suppress(OSError):
                header = parse_header(Reader(name, len(content), read))
                break
        assert good_reads > 0
        assert header == parse_header(reader_over(content, name))


def test_index_workers_start_without_torch_and_pillow():
    code = "import sys, fastmae.data.formats; print(*{'torch', 'PIL', 'tifffile'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.stdout, done.returncode) == ("\n", 0), done.stderr
