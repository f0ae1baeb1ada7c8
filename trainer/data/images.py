"""
Pictures of items: read whole and checked, fetched into a cache, taken out of an archive, decoded to RGB.

Every picture comes from elsewhere, so none is trusted: only the raster formats below are decoded (Pillow would hand an
EPS file to Ghostscript), sizes are capped in bytes and in pixels, and no name that came with a picture becomes a path.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import httpcore2
import httpx2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.utils import logging

from ..running.records import file_digests, write_text_atomic
from .downloads import GuardedTransport, InnerAddressError
from .files import DAMAGE, one_line, require_regular


logger = logging.get_logger(__name__)

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}
MAX_BYTES = 32 * 2**20
# Decoded to RGB, 150 MB. Pillow itself refuses only four times as much.
MAX_PIXELS = 50_000_000
# Larger ones are decoded one at a time while others are fetched.
LARGE_PIXELS = 2_000_000
# Of an archive: pictures, characters of a name, and bytes unpacked: pictures are compressed already, so that archives
# of them unpack to little more than they are.
MAX_MEMBERS = 5_000_000
MAX_NAME = 4096
MAX_UNPACKED, MAX_RATIO = 2**28, 100

USER_AGENT = "mmesid (+https://arxiv.org/abs/2509.02017)"
# Worth another attempt, as is every server error and every broken connection.
TRANSIENT_STATUSES = (408, 425, 429)
_NO_URL = (
    httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpcore2.UnsupportedProtocol, httpx2.TooManyRedirects,
    UnicodeError,
)  # fmt: skip
_CONNECTION_ERRORS = (
    httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, httpcore2.ProxyError,
)  # fmt: skip
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
INDEX_FILE = "index.json"
_DAMAGE = (*DAMAGE, tarfile.TarError)
_UNPACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class BadImageError(ValueError):
    """
    A picture that cannot be had.

    Attributes:
        reason (`str`): `"missing"` (no such file, HTTP 4xx), `"unreachable"` (the server, after all retries or too
            late), `"too_large"` (bytes or pixels), `"unreadable"` (no picture, damaged, or of another format),
            `"not_a_url"`, `"private_address"` (of an inner network) or `"outside"` (of the folder of the items). The
            reports of this module count by these.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image(
    image: Path | bytes, item_id: str, max_bytes: int = MAX_BYTES, roots: Iterable[Path] | None = None
) -> bytes:
    """The bytes of a picture, as they are, once [`decode_image`] has decoded its first frame to the last pixel; raises
    [`BadImageError`], which names the item, if that fails, they are more than `max_bytes`, or the file is in none of
    the `roots`, as [`resolved`] gives them; by default it may be anywhere."""
    try:
        if isinstance(image, Path) and roots is not None and not lies_in(image, roots):
            raise BadImageError("outside", "it is outside of the items' folder; name its own folder as image_dir")
        return _checked(image, max_bytes)
    except BadImageError as error:
        file = f"'{image}'" if isinstance(image, Path) else "its bytes"
        raise BadImageError(
            error.reason,
            f"The image of item '{item_id}' cannot be read ({file}: {error}); replace it, or set on_bad_image "
            "to 'missing'.",
        ) from error


def decode_image(data: bytes) -> Image.Image:
    """A picture as an encoder reads it: the first frame, turned as the camera says, in RGB on a white ground. Raises
    [`BadImageError`] if it is of none of `FORMATS`, damaged, or of more than `MAX_PIXELS`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            # The header tells the size: nothing of a decompression bomb is unpacked.
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImageError(
                    "too_large", f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}"
                )
            picture.load()
            return _to_rgb(_upright(picture))
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadImageError("unreadable", "no picture in a format that is read") from error
    # Damage shows as whatever a format's decoder stumbles over: OSError, SyntaxError, struct.error, RuntimeError ...
    except Exception as error:
        raise BadImageError("unreadable", one_line(error)) from error


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as the camera says, or as it is where that is damaged: its pixels are sound."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 255, which turns most of it white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        # What lies under a transparent pixel is arbitrary, and shops show their products on white.
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _checked(image: Path | bytes, max_bytes: int) -> bytes:
    data = _bytes_of(image, max_bytes) if isinstance(image, Path) else image
    if len(data) > max_bytes:
        raise BadImageError("too_large", f"more than {max_bytes:,} bytes")
    # All that an encoder will do with it, so that it cannot fail there.
    decode_image(data)
    return data


def _checked_apart(data: bytes, max_bytes: int, decoder: ThreadPoolExecutor) -> bytes:
    """As [`_checked`], a large picture in the one thread of `decoder`: a few kilobytes may unpack to hundreds of
    megabytes, which many threads would hold at once, and keep even when each has done with it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            large = picture.width * picture.height > LARGE_PIXELS
    # What is no picture is told apart where it is decoded.
    except Exception:
        large = False
    return decoder.submit(_checked, data, max_bytes).result() if large else _checked(data, max_bytes)


def _bytes_of(path: Path, max_bytes: int) -> bytes:
    """No more than `max_bytes + 1` bytes of a regular file."""
    try:
        # Without waiting: a pipe would be opened once somebody writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError("missing", "no regular file")
            return file.read(max_bytes + 1)
    # ValueError: a name that no file can have.
    except (OSError, ValueError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError("missing", getattr(error, "strerror", None) or str(error)) from error


def resolved(folders: Iterable[Path]) -> list[Path]:
    """Folders with their links followed, for [`lies_in`]; with those that the links of a repository in the cache of
    `huggingface_hub` lead into."""
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    snapshots = [parent for root in roots for parent in (root, *root.parents) if parent.name == "snapshots"]
    return roots + [parent.parent / "blobs" for parent in snapshots]


def lies_in(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a file, links followed, is in one of these folders; a name that no file can have is anywhere."""
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        return True
    return any(real.is_relative_to(root) for root in roots)


def fetch_images(
    sources: list[str | Path | bytes | None],
    cache_dir: str | os.PathLike,
    *,
    workers: int = 16,
    timeout: float = 20.0,
    retries: int = 3,
    deadline: float = 60.0,
    max_bytes: int = MAX_BYTES,
    allow_private: bool = False,
    disable_tqdm: bool = False,
) -> tuple[list[Path | bytes | None], dict[str, int]]:
    """
    Fetches the pictures that are URLs, each once, in parallel, into a cache.

    A file enters the cache, in one move, once it has arrived whole and decodes: an interrupted run loses nothing and a
    rerun fetches only what is not there, which includes what failed before. Its name is the SHA-256 of the URL.

    Args:
        sources (`list[str | Path | bytes | None]`): One entry per item; a string is an http(s) URL.
        cache_dir (`str` or `os.PathLike`): Where the files go, and nowhere else.
        workers (`int`, *optional*, defaults to 16): Pictures fetched at a time.
        timeout (`float`, *optional*, defaults to 20.0): Seconds that an attempt has, and that it may be silent.
        retries (`int`, *optional*, defaults to 3): Further attempts where the server fails, stalls or asks to wait.
        deadline (`float`, *optional*, defaults to 60.0): Seconds that a picture has, with all attempts and the waits
            between them.
        max_bytes (`int`, *optional*, defaults to 32 MiB): Size above which a picture is given up, unread.
        allow_private (`bool`, *optional*, defaults to `False`): Whether URLs and redirects may lead to addresses of an
            inner network.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to hide the progress bar.

    Returns:
        `tuple[list[Path | bytes | None], dict[str, int]]`: The sources, with a file in the place of a URL, or `None`
        where that failed; and how many URLs were `"fetched"`, `"cached"` already, or failed by which reason.
    """
    cache_dir = Path(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    files = {url: cache_dir / _digest(url) for url in sources if isinstance(url, str)}
    outcomes = {url: "cached" for url, file in files.items() if file.is_file()}
    missing = [url for url in files if url not in outcomes]
    # One iterator for all workers, which each take the next URL from it.
    pending = iter(missing)
    lock = threading.Lock()
    examples: dict[str, str] = {}

    def work(client: httpx2.Client, progress: tqdm) -> None:
        for url in pending:
            outcome = "fetched"
            try:
                data = _fetch(client, transport, decoder, url, timeout, retries, deadline, max_bytes)
                partial = files[url].with_name(f".{files[url].name}.{os.getpid()}.partial")
                partial.write_bytes(data)
                os.replace(partial, files[url])
            except BadImageError as error:
                outcome = error.reason
                examples.setdefault(outcome, f"{url}: {error}")
            with lock:
                outcomes[url] = outcome
                progress.update()

    transport = GuardedTransport(workers, allow_private)
    with (
        httpx2.Client(
            transport=transport,
            follow_redirects=True,
            max_redirects=5,
            timeout=timeout,
            # A compressed body could unpack to any size, and pictures are compressed already.
            headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        ) as client,
        tqdm(total=len(missing), desc="fetching pictures", unit="image", disable=disable_tqdm) as progress,
        ThreadPoolExecutor(1) as decoder,
        ThreadPoolExecutor(workers) as pool,
    ):
        futures = [pool.submit(work, client, progress) for _ in range(min(workers, len(missing)))]
        try:
            for future in futures:
                future.result()
        finally:
            # Left over only if a worker failed or the user interrupts: the others end after their current picture.
            for _ in pending:
                pass

    report = Counter(outcomes[url] for url in sources if isinstance(url, str))
    for reason, example in examples.items():
        logger.warning(f"{report[reason]} pictures could not be fetched ({reason}), for example {example}")
    there = {url: file for url, file in files.items() if outcomes[url] in ("cached", "fetched")}
    return [there.get(source) if isinstance(source, str) else source for source in sources], dict(report)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _fetch(
    client: httpx2.Client,
    transport: GuardedTransport,
    decoder: ThreadPoolExecutor,
    url: str,
    timeout: float,
    retries: int,
    deadline: float,
    max_bytes: int,
) -> bytes:
    """The bytes behind a URL, which are a picture."""
    last_moment = time.monotonic() + deadline
    if not url.startswith(("http://", "https://")):
        raise BadImageError("not_a_url", "it does not start with http:// or https://")
    for attempt in range(retries + 1):
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        transport.set_deadline(min(time.monotonic() + timeout, last_moment))
        try:
            with client.stream("GET", url) as response:
                status = response.status_code
                if status in TRANSIENT_STATUSES or status >= 500:
                    failure = f"HTTP status {status}"
                    asked = response.headers.get("Retry-After", "")
                    if asked.isdecimal():
                        wait = min(float(asked), LONGEST_WAIT)
                elif status != 200:
                    raise BadImageError("missing", f"HTTP status {status}")
                else:
                    return _checked_apart(_read(response, max_bytes), max_bytes, decoder)
        except _NO_URL as error:
            raise BadImageError("not_a_url", str(error) or type(error).__name__) from error
        except InnerAddressError as error:
            raise BadImageError("private_address", f"{error}; allow such with allow_private_addresses") from error
        except (httpx2.HTTPError, *_CONNECTION_ERRORS) as error:
            failure = str(error) or type(error).__name__
        if attempt == retries or time.monotonic() + wait >= last_moment:
            break
        time.sleep(wait)
    raise BadImageError("unreachable", failure)


def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BadImageError("too_large", f"{int(declared):,} bytes are more than {max_bytes:,}")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise BadImageError("too_large", f"more than {max_bytes:,} bytes")
    return bytes(body)


def list_images(
    path: str | os.PathLike, cache_dir: str | os.PathLike, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, Path], dict[str, int]]:
    """
    The pictures of a folder, or of a zip or tar archive, by their names relative to its root; and how many pictures of
    an archive were `"too_large"` or `"unreadable"`, or of a folder links that lead `"outside"`.

    An archive is unpacked once, into a folder of `cache_dir` that carries the digest of its content. Its members are
    stored under digests of their names: no name leads out of the cache. Raises `FileNotFoundError` if there is no
    `path`, and `ValueError` if it is no such archive, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_picture(file.name) and file.is_file())
        roots = resolved([path])
        inside = [file for file in files if not file.is_symlink() or lies_in(file, roots)]
        report = {"outside": len(files) - len(inside)} if len(inside) < len(files) else {}
        return {file.relative_to(path).as_posix(): file for file in inside}, report
    require_regular(path)
    target = Path(cache_dir) / f"archive-{file_digests([path], path.name)[0]}"
    if not (target / INDEX_FILE).is_file():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            names, report = _unpack(path, partial, max_bytes)
            write_text_atomic(partial / INDEX_FILE, json.dumps({"names": names, "report": report}))
            try:
                os.rename(partial, target)
            except OSError:
                # Another process may have been faster; what it unpacked is the same.
                if not (target / INDEX_FILE).is_file():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        index = json.loads((target / INDEX_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{target / INDEX_FILE}' is damaged ({one_line(error)}); remove its folder, and the archive is "
            "unpacked anew."
        ) from error
    return {name: target / _digest(name) for name in index["names"]}, index["report"]


def _unpack(archive: Path, directory: Path, max_bytes: int) -> tuple[list[str], dict[str, int]]:
    names: dict[str, None] = {}
    report: Counter = Counter()
    unpacked, most = 0, max(MAX_UNPACKED, MAX_RATIO * archive.stat().st_size)
    for name, data in tqdm(_members(archive, max_bytes), f"unpacking {archive.name}", unit="image", delay=2):
        unpacked += len(data or b"")
        if unpacked > most:
            raise ValueError(
                f"'{archive}' unpacks to more than {most:,} bytes, which pictures do not; unpack it yourself if you "
                "trust it, and name the folder."
            )
        if len(names) == MAX_MEMBERS or len(name) > MAX_NAME:
            what = f"more than {MAX_MEMBERS:,} pictures" if len(name) <= MAX_NAME else "a name that is too long"
            raise ValueError(f"'{archive}' holds {what}; unpack it yourself if you trust it, and name the folder.")
        if data is None or len(data) > max_bytes:
            report["unreadable" if data is None else "too_large"] += 1
        else:
            (directory / _digest(name)).write_bytes(data)
            names[name] = None
    return list(names), dict(report)


def _members(archive: Path, max_bytes: int) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of every picture: no more than `max_bytes + 1` bytes of it, whatever size the archive states,
    and `None` where it cannot be unpacked."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    if not member.is_dir() and _is_picture(member.filename):
                        try:
                            with opened.open(member) as file:
                                data = file.read(max_bytes + 1)
                        # RuntimeError: encrypted, or compressed in an unknown way.
                        except (*_DAMAGE, RuntimeError):
                            data = None
                        yield _normal(member.filename), data
        else:
            with open(archive, "rb") as packed:
                start = packed.read(6)
                packed.seek(0)
                unpacker = next((one for magic, one in _UNPACKERS.items() if start.startswith(magic)), None)
                most = max(MAX_UNPACKED, MAX_RATIO * archive.stat().st_size)
                file = _CappedReads(unpacker(packed) if unpacker else packed, max_bytes, most)
                with tarfile.open(fileobj=file, mode="r:") as opened:  # type: ignore[call-overload]
                    for member in opened:
                        # Links and devices are left out.
                        picture = opened.extractfile(member) if member.isreg() and _is_picture(member.name) else None
                        if picture is not None:
                            yield _normal(member.name), picture.read(max_bytes + 1)
                        # It would keep them all.
                        opened.members = []
    except _DAMAGE as error:
        raise ValueError(
            f"'{archive}' is no zip or tar archive that can be read to its end ({one_line(error)}); "
            "replace it, or unpack it and name the folder."
        ) from error


class _CappedReads:
    """A tar archive that is read a little at a time: its names may state any length, and be read whole."""

    def __init__(self, file, max_read: int, max_position: int):
        self._file = file
        self._max_read = max_read + tarfile.RECORDSIZE
        self._max_position = max_position

    def read(self, size: int) -> bytes:
        if size > self._max_read:
            raise tarfile.ReadError(f"one of its names or headers has {size:,} bytes")
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if position > self._max_position:
            raise tarfile.ReadError(f"it unpacks to more than {self._max_position:,} bytes, which pictures do not")
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _normal(name: str) -> str:
    """`./posters/1.jpg` as `posters/1.jpg`."""
    return PurePosixPath(name).as_posix()
