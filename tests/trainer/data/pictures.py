"""Pictures for tests of what holds them."""

import io

from PIL import Image


def png(colour) -> bytes:
    """A small picture of one colour, as the bytes of a file."""
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, format="PNG")
    return file.getvalue()
