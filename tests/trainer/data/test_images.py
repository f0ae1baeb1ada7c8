"""Pictures out of files, archives and a server that misbehaves in every way that real ones do."""

import io
import os
import random
import socket
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmesid.trainer.data import downloads
from mmesid.trainer.data import images as images_module
from mmesid.trainer.data.images import FORMATS, BadImageError, decode_image, fetch_images, list_images, read_image


def picture(seed: int = 0, size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that states a size and holds next to nothing, as a decompression bomb does."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


JPEG = encoded(picture(), "JPEG")
LARGE = encoded(picture(1, (200, 200)), "BMP")


# What the server says under the paths that are always the same: status, body and headers.
ANSWERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "gone": (404, b"<html>not found</html>", {}),
    "page": (200, b"<html>Please log in</html>", {"Content-Type": "image/jpeg"}),
    "half": (200, JPEG[: len(JPEG) // 2], {}),
    "bomb": (200, png_header(60_000, 60_000), {}),
    "large": (200, LARGE, {}),
    "moved": (302, b"", {"Location": "/plain"}),
    "loop": (302, b"", {"Location": "/loop"}),
    "to_file": (302, b"", {"Location": "file:///etc/hostname"}),
}


class FaultyServer(ThreadingHTTPServer):
    """Serves `JPEG` under every path that is no fault, and counts the requests of each path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter = Counter()
        self.bytes_sent = 0
        self.healed = False
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request, client_address):
        """A client that hangs up is what some of the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server: FaultyServer = self.server
        fault = self.path.strip("/").split("?")[0]
        with server.lock:
            server.requests[fault] += 1
            count = server.requests[fault]
        if fault in ANSWERS:
            self.send(*ANSWERS[fault])
        elif (fault == "flaky" and count <= 2) or (fault == "down" and not server.healed):
            self.send(500, b"try again", {})
        elif fault == "busy" and count == 1:
            self.send(429, b"", {"Retry-After": "0"})
        elif fault == "truncated" and not server.healed:
            self.send(200, JPEG[:100], {}, length=len(JPEG))
            self.close_connection = True
        elif fault == "inner":
            self.send(302, b"", {"Location": server.url("plain").replace("127.0.0.1", "localhost")})
        elif fault == "slow_headers":
            self.close_connection = True
            for sign in b"HTTP/1.1 200 OK\r\nContent-Type: " + bytes(1000):
                self.wfile.write(bytes([sign]))
                self.wfile.flush()
                time.sleep(0.05)
        elif fault in ("endless", "drip"):
            # Without Content-Length: only counting tells.
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            for _ in range(2000):
                chunk = bytes(65536) if fault == "endless" else b"x"
                self.wfile.write(chunk)
                server.bytes_sent += len(chunk)
                if fault == "drip":
                    time.sleep(0.05)
        elif fault == "slow":
            with server.lock:
                server.at_once += 1
                server.most_at_once = max(server.at_once, server.most_at_once)
            time.sleep(0.2)
            with server.lock:
                server.at_once -= 1
            self.send(200, JPEG, {})
        else:
            self.send(200, JPEG, {})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(images_module, "FIRST_WAIT", 0.01)
    # A proxy of the machine's own would answer in the server's place.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(sources, cache, **settings):
    return fetch_images(
        sources, cache, **{"timeout": 5.0, "retries": 2, "allow_private": True, "disable_tqdm": True, **settings}
    )


def test_urls_come_back_as_files_and_everything_else_as_it_is(server, tmp_path):
    here = tmp_path / "here.png"
    sources = [here, None, server.url("a.jpg"), JPEG, server.url("../../b.jpg?x=/../../c"), server.url("a.jpg")]
    images, report = fetch(sources, tmp_path / "cache")
    assert report == {"fetched": 3} and sum(server.requests.values()) == 2, "equal URLs are fetched once"
    assert images[0] is here and images[1] is None and images[3] is JPEG and images[2] == images[5]
    assert images[2].read_bytes() == JPEG == images[4].read_bytes()
    assert sorted(file.name for file in (tmp_path / "cache").iterdir()) == sorted({images[2].name, images[4].name})
    assert [file.name for file in tmp_path.iterdir()] == ["cache"], "something was written outside the cache"

    images_again, report = fetch(sources, tmp_path / "cache")
    assert images_again == images and report == {"cached": 3} and sum(server.requests.values()) == 2


def test_what_passes_is_retried_and_redirects_are_followed(server, tmp_path):
    paths = ["flaky", "busy", "moved"]
    images, report = fetch([server.url(path) for path in paths], tmp_path)
    assert report == {"fetched": 3} and all(image.read_bytes() == JPEG for image in images)
    assert server.requests == {"flaky": 3, "busy": 2, "moved": 1, "plain": 1}


def test_failures_are_counted_by_reason_and_leave_nothing_behind(server, tmp_path):
    expected = {
        "gone": "missing", "page": "unreadable", "half": "unreadable", "bomb": "too_large", "large": "too_large",
        "endless": "too_large", "loop": "not_a_url", "to_file": "not_a_url", "down": "unreachable",
        "truncated": "unreachable",
    }  # fmt: skip
    no_urls = ["poster.jpg", "file:///etc/hostname", "http://a\x00b/"]
    sources = [*(server.url(path) for path in expected), *no_urls, "http://127.0.0.1:9/a.jpg"]
    images, report = fetch(sources, tmp_path, max_bytes=len(JPEG) + 1000)
    assert images == [None] * len(sources) and not list(tmp_path.iterdir())
    assert report == Counter([*expected.values(), *["not_a_url"] * len(no_urls), "unreachable"])
    # Only what may pass is worth more requests.
    assert server.requests["gone"] == server.requests["page"] == server.requests["large"] == 1
    assert server.requests["down"] == server.requests["truncated"] == 3
    assert server.bytes_sent < 20 * 2**20, "the client read far beyond the cap"


def test_a_failed_picture_is_tried_again_by_the_next_run(server, tmp_path):
    sources = [server.url("plain"), server.url("down"), server.url("truncated")]
    images, report = fetch(sources, tmp_path, retries=0)
    assert report == {"fetched": 1, "unreachable": 2} and images[1:] == [None, None]
    # What an interrupted run would leave does not count as a picture.
    (tmp_path / f".{images[0].name}.123.partial").write_bytes(JPEG[:10])
    server.healed = True
    images, report = fetch(sources, tmp_path, retries=0)
    assert report == {"cached": 1, "fetched": 2} and all(image.read_bytes() == JPEG for image in images)
    assert server.requests["plain"] == 1


def test_a_server_that_drips_runs_out_of_time(server, tmp_path):
    start = time.monotonic()
    images, report = fetch([server.url("drip"), server.url("plain")], tmp_path, timeout=0.3, retries=0)
    assert report == {"unreachable": 1, "fetched": 1} and images[0] is None
    assert time.monotonic() - start < 5


def test_a_picture_has_one_deadline_from_the_first_header_to_the_last_attempt(server, tmp_path, monkeypatch):
    start = time.monotonic()
    images, report = fetch([server.url("slow_headers")], tmp_path, timeout=0.3, retries=1)
    assert images == [None] and report == {"unreachable": 1} and time.monotonic() - start < 3
    monkeypatch.setattr(images_module, "FIRST_WAIT", 30.0)
    start = time.monotonic()
    assert fetch([server.url("down")], tmp_path, retries=9, deadline=0.5)[1] == {"unreachable": 1}
    assert server.requests["down"] == 1 and time.monotonic() - start < 3


def test_inner_networks_are_reached_only_when_allowed(server, tmp_path, monkeypatch):
    urls = [server.url("plain"), server.url("plain").replace("127.0.0.1", "localhost"), "http://10.0.0.1/a.jpg"]
    assert fetch(urls, tmp_path, allow_private=False)[1] == {"private_address": 3}
    assert not server.requests
    # By a redirect, from a server that may be asked.
    monkeypatch.setattr(downloads, "is_public", lambda address, host={"127.0.0.1"}: address in host)
    monkeypatch.setattr(
        downloads.socket, "getaddrinfo", resolved_to({"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.2"})
    )
    assert fetch([server.url("inner"), server.url("plain")], tmp_path, allow_private=False)[1] == {
        "private_address": 1,
        "fetched": 1,
    }
    assert server.requests == {"inner": 1, "plain": 1}


def resolved_to(addresses: dict[str, str]):
    """Stands in for `socket.getaddrinfo`, once a host is to be checked; what connects asks for a port."""
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **settings):
        return original(addresses[host] if port is None else host, port, *arguments, **settings)

    return getaddrinfo


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        *((inner, False) for inner in (
            "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
            "224.0.0.1", "::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1",
            "2002:a00:1::",
        )),
    ],
)  # fmt: skip
def test_addresses_of_inner_networks_are_known(address, public):
    assert downloads.is_public(address) is public


def test_large_pictures_are_decoded_by_one_thread_while_others_are_fetched(server, tmp_path, monkeypatch):
    threads = set()

    def to_rgb(picture):
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return picture

    monkeypatch.setattr(images_module, "_to_rgb", to_rgb)
    urls = [server.url(f"slow?{number}") for number in range(8)]
    fetch(urls, tmp_path / "small", workers=4)
    assert len(threads) > 1
    threads.clear()
    monkeypatch.setattr(images_module, "LARGE_PIXELS", 100)
    assert fetch(urls, tmp_path / "large", workers=4)[1] == {"fetched": 8} and len(threads) == 1


def test_pictures_are_fetched_in_parallel_but_no_more_than_asked_for(server, tmp_path):
    fetch([server.url(f"slow?{number}") for number in range(12)], tmp_path, workers=4)
    assert server.requests["slow"] == 12 and server.most_at_once == 4


MEMBERS = {
    "posters/1.jpg": JPEG,
    "./posters/deep/2.PNG": encoded(picture(2)),
    "../../outside.jpg": encoded(picture(3)),
    "/etc/absolute.png": encoded(picture(4)),
    "large.bmp": LARGE,
    "items.csv": b"a,b",
}


def write_archive(path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir("posters")
            for name, data in MEMBERS.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:" + ("" if path.suffix == ".tar" else "gz")) as archive:
        for name, data in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
def test_an_archive_is_unpacked_once_and_never_outside_the_cache(tmp_path, suffix):
    archive = write_archive(tmp_path / f"pictures{suffix}")
    cache = tmp_path / "deep" / "down" / "cache"
    files, report = list_images(archive, cache, max_bytes=len(LARGE) - 1)
    kept = {name: data for name, data in MEMBERS.items() if name not in ("large.bmp", "items.csv")}
    kept["posters/deep/2.PNG"] = kept.pop("./posters/deep/2.PNG")
    assert {name: file.read_bytes() for name, file in files.items()} == kept and report == {"too_large": 1}
    assert all(file.resolve().is_relative_to(cache) and not file.is_symlink() for file in files.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["deep", archive.name])
    assert [path.name[:8] for path in cache.iterdir()] == ["archive-"]

    times = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    assert list_images(archive, cache, max_bytes=len(LARGE) - 1) == (files, report)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == times
    # As a killed run leaves it: some files, under the name of work in progress.
    folder = next(iter(files.values())).parent
    folder.rename(folder.with_name(f".{folder.name}.99.partial"))
    assert list_images(archive, cache, max_bytes=len(LARGE) - 1)[0] == files
    assert all(file.is_file() for file in files.values())


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_member_is_counted(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w", compression) as archive:
        for name in ("1.jpg", "2.jpg"):
            archive.writestr(name, JPEG)
        start = archive.getinfo("1.jpg").header_offset + 30 + len("1.jpg")
    data = bytearray((tmp_path / "pictures.zip").read_bytes())
    for position in range(start + 40, start + 60):
        data[position] ^= 255
    (tmp_path / "pictures.zip").write_bytes(data)
    files, report = list_images(tmp_path / "pictures.zip", tmp_path / "cache")
    assert report == {"unreadable": 1} and [file.read_bytes() for file in files.values()] == [JPEG]
    assert list(files) == ["2.jpg"]


def test_a_damaged_archive_is_refused(tmp_path):
    tar = write_archive(tmp_path / "pictures.tgz")
    tar.write_bytes(tar.read_bytes()[:-2000])
    (tmp_path / "noise.zip").write_bytes(b"noise" * 1000)
    for broken in (tar, tmp_path / "noise.zip"):
        with pytest.raises(ValueError, match=f"{broken.name}' is no zip or tar archive that can be read") as error:
            list_images(broken, tmp_path / "cache")
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir()), "an archive that failed left something behind"
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        list_images(tmp_path / "nowhere", tmp_path / "cache")


def test_archives_that_unpack_to_more_than_pictures_do_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_UNPACKED", 2**17)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(9):
            archive.writestr(f"{number}.png", bytes(2**16))
    long_name = tarfile.TarInfo("x" * 2**16)
    far = tarfile.TarInfo("far.bin")
    far.size = 2**22
    for name, members in {"name.tgz": [long_name], "far.tgz": [far, tarfile.TarInfo("a.png")]}.items():
        with tarfile.open(tmp_path / name, "w:gz", format=tarfile.GNU_FORMAT) as archive:
            for member in members:
                archive.addfile(member, io.BytesIO(bytes(member.size)))
    for name, message in {
        "bomb.zip": "unpacks to more than .* bytes, which pictures do not; unpack it yourself",
        "name.tgz": r"is no zip or tar archive .*\(one of its names or headers has 66,\d+ bytes\)",
        "far.tgz": r"is no zip or tar archive .*\(it unpacks to more than \d+,\d+ bytes",
    }.items():
        with pytest.raises(ValueError, match=f"{name}' {message}"):
            list_images(tmp_path / name, tmp_path / "cache", max_bytes=2**16 if name == "bomb.zip" else 1000)
        assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(images_module, "MAX_MEMBERS", 1)
    with pytest.raises(ValueError, match="holds more than 1 pictures; unpack it yourself"):
        list_images(write_archive(tmp_path / "pictures.zip"), tmp_path / "cache")


def test_only_regular_files_in_the_folders_allowed_are_read(tmp_path):
    (tmp_path / "shop").mkdir()
    os.mkfifo(tmp_path / "shop/pipe.png")
    for image in (tmp_path / "shop/pipe.png", Path("/dev/zero")):
        with pytest.raises(BadImageError, match="no regular file") as error:
            read_image(image, "i7")
        assert error.value.reason == "missing"
    for name in ("private.png", "shop/own.png"):
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "shop/link.png").symlink_to(tmp_path / "private.png")
    roots = images_module.resolved([tmp_path / "shop"])
    assert read_image(tmp_path / "shop/own.png", "i7", roots=roots) == JPEG
    for name in ("shop/../private.png", "private.png", "shop/link.png"):
        with pytest.raises(
            BadImageError, match="outside of the items' folder; name its own folder as image_dir"
        ) as error:
            read_image(tmp_path / name, "i7", roots=roots)
        assert error.value.reason == "outside"
    files, report = list_images(tmp_path / "shop", tmp_path / "cache")
    assert list(files) == ["own.png"] and report == {"outside": 1}
    # As `huggingface_hub` keeps a repository.
    blob = tmp_path / "datasets--me--shop/blobs/1234"
    snapshot = tmp_path / "datasets--me--shop/snapshots/abc"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(JPEG)
    (snapshot / "a.png").symlink_to(blob)
    assert list(list_images(snapshot, tmp_path / "cache")[0]) == ["a.png"]


def test_a_folder_is_read_where_it_is(tmp_path):
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name in ("b.jpg", "sub/a.jpeg", "notes.txt"):
        (tmp_path / "folder" / name).write_bytes(JPEG)
    files, report = list_images(tmp_path / "folder", tmp_path / "cache")
    assert files == {"b.jpg": tmp_path / "folder/b.jpg", "sub/a.jpeg": tmp_path / "folder/sub/a.jpeg"}
    assert report == {} and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG[: len(JPEG) // 2], "unreadable"),
        (b"", "unreadable"),
        (b"GIF89a but not really", "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"),
        (png_header(60_000, 60_000), "too_large"),
        (png_header(7_100, 7_100), "too_large"),
        (encoded(picture()) + bytes(2000), "too_large"),
    ],
)
def test_what_is_no_sound_picture_is_told_apart(tmp_path, data, reason):
    (tmp_path / "file").write_bytes(data)
    for image in (data, tmp_path / "file"):
        with pytest.raises(
            BadImageError, match="image of item 'i7' cannot be read .*set on_bad_image to 'missing'"
        ) as error:
            read_image(image, "i7", max_bytes=max(len(JPEG), 5000) if reason == "unreadable" else 4500)
        assert error.value.reason == reason and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_missing_pictures(tmp_path):
    for image in (tmp_path / "nowhere.jpg", tmp_path, tmp_path / "no\0name.jpg"):
        with pytest.raises(BadImageError) as error:
            read_image(image, "i7")
        assert error.value.reason == "missing"


def test_pictures_of_every_kind_decode_to_rgb():
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    see_through = red.convert("RGBA")
    see_through.putalpha(0)
    palette = red.quantize(4)
    palette_with_hole = encoded(palette, transparency=0)
    grey = Image.fromarray(np.full((6, 8), 0x8000, np.uint16))
    kinds = {
        "animation": (encoded(red, "GIF", save_all=True, append_images=[blue] * 3), (255, 0, 0)),
        "animated WebP": (encoded(red, "WEBP", save_all=True, append_images=[blue], lossless=True), (255, 0, 0)),
        "CMYK": (encoded(red.convert("CMYK"), "JPEG", quality=100), (255, 0, 0)),
        "palette": (encoded(palette), (255, 0, 0)),
        "alpha": (encoded(see_through), (255, 255, 255)),
        "palette with a hole": (palette_with_hole, (255, 255, 255)),
        "grey": (encoded(Image.new("L", (8, 6), 128)), (128, 128, 128)),
        "16 bits": (encoded(grey), (128, 128, 128)),
        "black and white": (encoded(Image.new("1", (8, 6), 1)), (255, 255, 255)),
    }
    for kind, (data, colour) in kinds.items():
        assert read_image(data, "i") is data
        image = decode_image(data)
        assert (image.mode, image.size) == ("RGB", (8, 6)), kind
        difference = np.abs(np.asarray(image, int) - np.array(colour)).max()
        assert difference <= 4, f"{kind}: {image.getpixel((0, 0))} instead of {colour}"


def damaged(data: bytes, generator: random.Random, start: int, stop: int) -> bytes:
    """`data` with up to four bytes between `start` and `stop` changed."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        data[generator.randrange(start, stop)] = generator.randrange(256)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_of_any_kind_is_a_bad_picture_or_shows_in_the_pixels_alone(kind):
    generator = random.Random(0)
    sound = encoded(picture(), kind)
    refused = 0
    for _ in range(100):
        data = damaged(sound, generator, 0, min(len(sound), 300))
        try:
            read_image(data, "i")
        except BadImageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert decode_image(data).mode == "RGB", "what prepare lets pass must not fail in embed"
    assert refused


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_picture_is_turned_as_the_camera_says_unless_its_note_is_damaged():
    turned = Image.new("RGB", (8, 4), "red")
    turned.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encoded(turned, exif=exif))
    assert image.size == (4, 8) and image.getpixel((0, 0)) == (0, 0, 255)

    exif[0x010F], exif[0x0131] = "maker", "software"
    sound = encoded(picture(size=(40, 30)), "JPEG", exif=exif)
    start = sound.index(b"Exif\0\0") + 6
    generator = random.Random(0)
    sizes = Counter(
        decode_image(read_image(damaged(sound, generator, start, start + len(exif.tobytes()) - 6), "i")).size
        for _ in range(500)
    )
    assert set(sizes) == {(40, 30), (30, 40)}, "as it lies in the file, or turned"
