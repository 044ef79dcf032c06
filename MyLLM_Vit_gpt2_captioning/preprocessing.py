"""One photo to one tensor: the single truth about preprocessing, used by training, validation, demo and tools.

Only pillow, numpy and torch are needed here, so that captioning a photo does not wait for the import of a training
library.
"""

import numpy as np
import torch
from PIL import Image, ImageOps


def load_image(source):
    """Open an image as upright 8-bit RGB.

    `source` is a path, an opened `PIL.Image.Image`, or an array (H, W, 3) of dtype uint8.
    Raises FileNotFoundError for a missing file, and ValueError that names the file when it is not a readable image.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    name = getattr(source, "filename", "") or "the image" if isinstance(source, Image.Image) else source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        return ImageOps.exif_transpose(image).convert("RGB")  # phones store the turn beside the pixels
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({error}); replace the file or remove its rows") from error


def to_normalized_tensor(pixels, mean, std):
    """pixels (H, W, 3) uint8 -> float tensor (3, H, W): scaled to 0..1, then (x - mean) / std for each channel."""
    tensor = torch.from_numpy(np.array(pixels, dtype=np.float32)).permute(2, 0, 1) / 255  # (3, H, W)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return ((tensor - mean) / std).contiguous()


def preprocess(source, img_size, mean, std, resample="bicubic"):
    """Any image that `load_image` takes -> float tensor (3, img_size, img_size), as in validation.

    The whole photo is squeezed into the square (antialiased, `resample` is "bicubic" or "bilinear"): a caption may
    speak of anything in it, so nothing is cropped away.
    """
    image = load_image(source).resize((img_size, img_size), Image.Resampling[resample.upper()])
    return to_normalized_tensor(image, mean, std)
