"""One photo to one tensor: the single truth about preprocessing, used by training, validation, demo and tools.

Only pillow, numpy and torch are needed here, so that captioning a photo does not wait for the import of a training
library.
"""

import io
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from captioning.common.printable import printable
from captioning.images import tar_members

# Pillow's names of the formats of photos. It would open others, too, by their content and whatever a file is called:
# for EPS it starts Ghostscript, which runs the program in the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of ISO/IEC 23008-12
# Bytes of a photo in memory, a bit more than the 179 million pixels of 3 bytes that Pillow opens.
LARGEST = 600_000_000
BYTES_OF_MODE = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}  # others: one a band


def load_image(source, least_side=None, max_pixels=None, grey16="full"):
    """Open an image as upright 8-bit RGB.

    `source` is a path (or one into a tar, see tar_members.py), an opened file, an opened `PIL.Image.Image`, or an array
    (H, W, 3) of dtype uint8. With `least_side` a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, which is much
    faster, as long as both sides keep that many pixels. An image of more than `max_pixels` is refused before it is
    decoded. `grey16`: how 16 bits of grey become 8, see `_as_rgb`.
    Raises FileNotFoundError for a missing file, and ValueError that names the file when it is not a readable image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    in_memory = isinstance(source, Image.Image | io.BytesIO)
    name = printable(getattr(source, "filename", "") or "the image" if in_memory else source)
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(ImageOps.exif_transpose(source), grey16)  # phones store the turn beside the pixels
        image = open_image(tar_members.opened(source))
        size = math.prod(image.size) * BYTES_OF_MODE.get(image.mode, len(image.getbands()))
        if size > LARGEST:
            raise ValueError(f"it has {image.width} x {image.height} pixels, {size / 1e6:,.0f} MB")
        if max_pixels and image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, and at most {max_pixels:,} are allowed")
        if least_side:
            image.draft(None, (least_side, least_side))  # does nothing for other formats
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # the image was opened here, so no copy is needed
        return image if image.mode == "RGB" and not image.has_transparency_data else _as_rgb(image, grey16)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image") from None
    except Exception as error:  # a decoder may stumble over a damaged file in any way: TypeError, struct.error, ...
        reason = printable(str(error).replace(repr(source), name) if in_memory else error)  # Pillow says where it is
        raise ValueError(f"{name}: not a readable image ({reason}); replace the file or remove its rows") from error


@cache
def _formats():
    """Those of FORMATS that this Pillow reads; HEIF comes with pillow-heif."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(source):
    """As `Image.open`, for the formats of photos only; also for HEIC where pillow-heif is installed, and where it is
    not, ValueError names that library."""
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        if not _is_heic(source):
            raise
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("HEIC, which needs one more library: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()
    _formats.cache_clear()
    return Image.open(source, formats=_formats())


def _is_heic(source):
    """Whether a path or an opened file has the mark of HEIC."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return _is_heic(file)
    source.seek(0)
    head = source.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def _as_rgb(image, grey16):
    """An image of any mode -> 8-bit RGB, transparent parts on white, as pages show them.

    With `grey16` "full", 16 bits of grey become 8 as they are: 0 is black and 65535 white. With "range" the darkest
    value of the photo is black and the lightest white, for scanners that use a part of the 16 bits only: 12 bits in 16
    would be nearly black.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255: nearly all of it white
        values = np.array(image)  # uint16 or, with some formats, int32; changed in place, because it may be large
        if values.dtype != np.uint16:
            values.clip(0, 65535, out=values)
        if grey16 == "range":
            low, high = int(values.min()), int(values.max())
            values = (values.astype(np.int64) - low) * 255 // max(1, high - low)
        else:
            values //= 257
        image = Image.fromarray(values.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits a channel")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(pixels):
    """pixels (H, W, 3) uint8 -> tensor (3, H, W) uint8."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def normalize(pixels, mean, std):
    """pixels (..., 3, H, W) uint8 -> float32: scaled to 0..1, then (x - mean) / std for each channel."""
    pixels = pixels.float().div_(255)  # in place from here on: new memory for each step would take most of the time
    # With numbers, channel by channel: a tensor of them would have to be copied to the GPU, which waits for it.
    for channel, m, s in zip(pixels.unbind(-3), mean, std, strict=True):  # (..., H, W)
        channel.sub_(m).div_(s)
    return pixels


def normalize_pixels(images, preprocessing):
    """uint8 pixels (B, 3, H, W) -> normalised as `preprocessing` says; normalised images stay what they are.

    Done on the device: uint8 is a quarter of the bytes to copy there.
    """
    if images.dtype != torch.uint8:
        return images
    return normalize(images, preprocessing["mean"], preprocessing["std"])


def resize(source, img_size, resample="bicubic", grey16="full"):
    """Any image that `load_image` takes -> RGB image of img_size x img_size pixels, as in validation.

    The whole photo is squeezed into the square (antialiased, `resample` is "bicubic" or "bilinear"): a caption may
    speak of anything in it, so nothing is cropped away. `grey16` as in `load_image`.
    """
    return load_image(source, grey16=grey16).resize((img_size, img_size), Image.Resampling[resample.upper()])


def preprocess(source, img_size, mean, std, resample="bicubic", grey16="full"):
    """Any image that `load_image` takes -> float tensor (3, img_size, img_size), as in validation."""
    return normalize(to_tensor(resize(source, img_size, resample, grey16)), mean, std)
