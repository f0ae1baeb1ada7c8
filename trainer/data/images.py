"""Pictures of items, read whole and checked before they are stored."""

import io
from pathlib import Path

from PIL import Image


def read_image(image: Path | bytes, item_id: str) -> bytes:
    """
    The bytes of a picture, as they are, once it has been decoded to its last pixel.

    Args:
        image (`Path` or `bytes`): A picture file, or the bytes of one.
        item_id (`str`): The item it belongs to, for the error.

    Raises:
        ValueError: If the file is missing or is no picture that Pillow decodes.
    """
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    # Pillow reports damage by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        file = f"'{image}'" if isinstance(image, Path) else "its bytes"
        raise ValueError(
            f"The image of item '{item_id}' cannot be read ({file}: {error}); replace it, or leave it out with "
            "--on_bad_image missing."
        ) from error
    return data
