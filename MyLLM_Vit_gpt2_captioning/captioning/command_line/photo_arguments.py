"""What IMAGE means on a command line: a file, a folder with all images in it, or, where that is allowed, a URL."""

import io
from dataclasses import dataclass
from pathlib import Path

from captioning.data.conventions import IMAGE_SUFFIXES
from captioning.images.preprocessing import load_image

MOST_BYTES = 50_000_000  # of a fetched photo
TIMEOUT = 20  # seconds without a byte


@dataclass(frozen=True)
class Photo:
    """A photo to be captioned: `name` as the user wrote it; `folder` where it was found in a folder, else None."""

    name: str
    folder: Path | None = None

    def load(self):
        """-> `PIL.Image.Image`, upright RGB. Raises FileNotFoundError or ValueError that names the photo."""
        return fetch_image(self.name) if _is_url(self.name) else load_image(self.name)

    @property
    def name_in_folder(self):
        """As in a table that lies in the folder."""
        return Path(self.name).relative_to(self.folder).as_posix() if self.folder else self.name


def find_photos(arguments, allow_urls=False):
    """Arguments of a command line (str) -> list of different `Photo`, a folder's (and its subfolders') sorted by name.

    Whether a file is there and readable is only seen when it is loaded. Raises ValueError for a URL unless
    `allow_urls`, and for a folder without images.
    """
    photos = []
    for argument in arguments:
        folder = Path(argument)
        if _is_url(argument):
            if not allow_urls:
                raise ValueError(f"{argument}: a URL; photos are only fetched with --allow_urls")
            if not argument.lower().startswith(("http://", "https://")):
                raise ValueError(f"{argument}: only http:// and https:// can be fetched")
            photos.append(Photo(argument))
        elif folder.is_dir():
            found = sorted(path for path in folder.rglob("*") if _is_photo(path.relative_to(folder)))
            if not found:
                raise ValueError(f"{argument}: no image is in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            photos += [Photo(str(path), folder) for path in found]
        else:
            photos.append(Photo(argument))
    return list(dict.fromkeys(photos))


def _is_url(text):
    return "://" in text


def _is_photo(path):
    """By its name; hidden files and folders hold thumbnails and what other programs keep."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def fetch_image(url, most_bytes=MOST_BYTES, timeout=TIMEOUT):
    """A photo from the network -> `PIL.Image.Image`, upright RGB.

    Raises ValueError that names the URL when it cannot be had, has more than `most_bytes`, or is no image.
    """
    import requests

    content = bytearray()
    try:
        with requests.get(url, stream=True, timeout=timeout) as answer:
            answer.raise_for_status()
            for part in answer.iter_content(1 << 16):
                content += part
                if len(content) > most_bytes:
                    raise ValueError(f"{url}: more than {most_bytes:,} bytes; download it yourself and give the file")
    except requests.RequestException as error:
        reason = str(error) if error.response is not None else type(error).__name__  # a status, or no answer
        raise ValueError(f"{url}: could not be fetched ({reason})") from error
    try:
        return load_image(io.BytesIO(content))
    except ValueError as error:
        raise ValueError(f"{url}: what lies there is not a readable image") from error
