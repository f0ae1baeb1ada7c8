"""
Pictures of items: read whole and checked, fetched into a cache, taken out of an archive, decoded to RGB.

Every picture comes from elsewhere, so none is trusted: only the raster formats below are decoded (Pillow would hand an
EPS file to Ghostscript), sizes are capped in bytes and in pixels, and no name that came with a picture becomes a path.
"""

import hashlib
import io
import json
import lzma
import os
import random
import shutil
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import httpx2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers.utils import logging

from ..running.records import file_digests, write_text_atomic
from .files import one_line


logger = logging.get_logger(__name__)

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}
MAX_BYTES = 32 * 2**20
# Decoded to RGB, 150 MB. Pillow itself refuses only four times as much.
MAX_PIXELS = 50_000_000

USER_AGENT = "mmesid (+https://arxiv.org/abs/2509.02017)"
# Worth another attempt, as is every server error and every broken connection.
TRANSIENT_STATUSES = (408, 425, 429)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
INDEX_FILE = "index.json"
# What damaged archives raise; OSError in bzip2.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)


class BadImageError(ValueError):
    """
    A picture that cannot be had.

    Attributes:
        reason (`str`): `"missing"` (no such file, HTTP 4xx), `"unreachable"` (the server, after all retries),
            `"too_large"` (bytes or pixels), `"unreadable"` (no picture, damaged, or of another format) or
            `"not_a_url"`. The reports of this module count by these.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image(image: Path | bytes, item_id: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a picture, as they are, once [`decode_image`] has decoded its first frame to the last pixel; raises
    [`BadImageError`], which names the item, if that fails or they are more than `max_bytes`."""
    try:
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
    try:
        size = image.stat().st_size if isinstance(image, Path) else len(image)
        data = b"" if size > max_bytes else image.read_bytes() if isinstance(image, Path) else image
    # ValueError: a name that no file can have.
    except (OSError, ValueError) as error:
        raise BadImageError("missing", getattr(error, "strerror", None) or str(error)) from error
    if size > max_bytes:
        raise BadImageError("too_large", f"{size:,} bytes are more than {max_bytes:,}")
    # All that an encoder will do with it, so that it cannot fail there.
    decode_image(data)
    return data


def fetch_images(
    sources: list[str | Path | bytes | None],
    cache_dir: str | os.PathLike,
    *,
    workers: int = 16,
    timeout: float = 20.0,
    retries: int = 3,
    max_bytes: int = MAX_BYTES,
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
        max_bytes (`int`, *optional*, defaults to 32 MiB): Size above which a picture is given up, unread.
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
                data = _fetch(client, url, timeout, retries, max_bytes)
                partial = files[url].with_name(f".{files[url].name}.{os.getpid()}.partial")
                partial.write_bytes(data)
                os.replace(partial, files[url])
            except BadImageError as error:
                outcome = error.reason
                examples.setdefault(outcome, f"{url}: {error}")
            with lock:
                outcomes[url] = outcome
                progress.update()

    with (
        httpx2.Client(
            follow_redirects=True,
            max_redirects=5,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=workers, max_keepalive_connections=workers),
            # A compressed body could unpack to any size, and pictures are compressed already.
            headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        ) as client,
        tqdm(total=len(missing), desc="fetching pictures", unit="image", disable=disable_tqdm) as progress,
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


def _fetch(client: httpx2.Client, url: str, timeout: float, retries: int, max_bytes: int) -> bytes:
    """The bytes behind a URL, which are a picture."""
    if not url.startswith(("http://", "https://")):
        raise BadImageError("not_a_url", "it does not start with http:// or https://")
    for attempt in range(retries + 1):
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        deadline = time.monotonic() + timeout
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
                    return _checked(_read(response, deadline, max_bytes), max_bytes)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, UnicodeError) as error:
            raise BadImageError("not_a_url", str(error) or type(error).__name__) from error
        except httpx2.HTTPError as error:
            failure = str(error) or type(error).__name__
        if attempt < retries:
            time.sleep(wait)
    raise BadImageError("unreachable", failure)


def _read(response: httpx2.Response, deadline: float, max_bytes: int) -> bytes:
    declared = response.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BadImageError("too_large", f"{int(declared):,} bytes are more than {max_bytes:,}")
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise BadImageError("too_large", f"more than {max_bytes:,} bytes")
        # The client's own time-out starts anew with every byte, which a stalling server may send one by one.
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("not read to its end in time")
    return bytes(body)


def list_images(
    path: str | os.PathLike, cache_dir: str | os.PathLike, max_bytes: int = MAX_BYTES
) -> tuple[dict[str, Path], dict[str, int]]:
    """
    The pictures of a folder, or of a zip or tar archive, by their names relative to its root; and how many pictures of
    an archive were `"too_large"` or `"unreadable"`.

    An archive is unpacked once, into a folder of `cache_dir` that carries the digest of its content. Its members are
    stored under digests of their names: no name leads out of the cache. Raises `FileNotFoundError` if there is no
    `path`, and `ValueError` if it is no such archive, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _is_picture(file.name) and file.is_file())
        return {file.relative_to(path).as_posix(): file for file in files}, {}
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; name a folder of pictures, or a zip or tar archive.")
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
    index = json.loads((target / INDEX_FILE).read_text(encoding="utf-8"))
    return {name: target / _digest(name) for name in index["names"]}, index["report"]


def _unpack(archive: Path, directory: Path, max_bytes: int) -> tuple[list[str], dict[str, int]]:
    names: dict[str, None] = {}
    report: Counter = Counter()
    for name, data in tqdm(_members(archive, max_bytes), f"unpacking {archive.name}", unit="image", delay=2):
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
            with tarfile.open(archive) as opened:
                for member in opened:
                    # Links and devices are left out.
                    file = opened.extractfile(member) if member.isreg() and _is_picture(member.name) else None
                    if file is not None:
                        yield _normal(member.name), file.read(max_bytes + 1)
    except _DAMAGE as error:
        raise ValueError(
            f"'{archive}' is no zip or tar archive that can be read to its end ({one_line(error)}); "
            "replace it, or unpack it and name the folder."
        ) from error


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _normal(name: str) -> str:
    """`./posters/1.jpg` as `posters/1.jpg`."""
    return PurePosixPath(name).as_posix()
