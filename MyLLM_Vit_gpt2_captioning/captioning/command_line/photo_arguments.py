"""The argument IMAGE of a tool: a file, a folder (all images in it) or, where that is allowed, a URL."""

import io
import queue
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from captioning.command_line.public_addresses import is_public, only_public_adapter
from captioning.common.files import is_litter
from captioning.data.conventions import IMAGE_SUFFIXES, is_photo_file
from captioning.images.preprocessing import load_image

MAX_BYTES = 50_000_000  # of a fetched photo
TIMEOUT = 20  # seconds without a byte
DEADLINE = 120  # seconds for the whole photo
MAX_REDIRECTS = 5


@dataclass(frozen=True)
class PhotoArgument:
    """A photo to caption: its path or URL `name`, and the `folder` argument in which it was found, else None."""

    name: str
    folder: Path | None = None

    def load(self, grey16="full"):
        """-> `PIL.Image.Image`, upright RGB. Raises FileNotFoundError or ValueError that names the photo."""
        return fetch_image(self.name, grey16=grey16) if _is_url(self.name) else load_image(self.name, grey16=grey16)

    @property
    def name_in_folder(self):
        """The path relative to `folder`, for a table in that folder; without a folder, `name`."""
        return Path(self.name).relative_to(self.folder).as_posix() if self.folder else self.name


def find_photos(arguments, allow_urls=False):
    """Arguments of a command line (str) -> list of `PhotoArgument` without repeats.

    A folder stands for the images in it and its subfolders, sorted by name. That a file exists and can be read is only
    checked when it is loaded. Raises ValueError for a URL unless `allow_urls`, and for a folder without images.
    """
    photos = []
    for argument in arguments:
        folder = Path(argument)
        if _is_url(argument):
            if not allow_urls:
                raise ValueError(f"{argument}: a URL; photos are only fetched with --allow_urls")
            if not argument.lower().startswith(("http://", "https://")):
                raise ValueError(f"{argument}: only http:// and https:// can be fetched")
            photos.append(PhotoArgument(argument))
        elif folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if _is_photo(path.relative_to(folder)))
            if not paths:
                raise ValueError(f"{argument}: no image is in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            photos += [PhotoArgument(str(path), folder) for path in paths]
        else:
            photos.append(PhotoArgument(argument))
    return list(dict.fromkeys(photos))


def _is_url(text):
    return "://" in text


def _is_photo(path):
    """Whether the path ends like an image's and is not hidden: hidden folders hold other programs' thumbnails."""
    return is_photo_file(path) and not any(part.startswith(".") or is_litter(part) for part in path.parts)


def fetch_image(url, max_bytes=MAX_BYTES, timeout=TIMEOUT, deadline=DEADLINE, grey16="full"):
    """Download a photo -> `PIL.Image.Image`, upright RGB. Raises the errors of `fetch`, and one like them for what is
    not an image."""
    content = fetch(url, max_bytes, timeout, deadline)
    try:
        return load_image(io.BytesIO(content), grey16=grey16)
    except ValueError as error:
        raise ValueError(f"{url}: not a readable image") from error


def fetch(url, max_bytes, timeout, deadline, only_public=False):
    """Download what is at a URL -> bytes.

    Raises ValueError that names the URL when it cannot be downloaded, has more than `max_bytes`, takes more than
    `deadline` seconds, or leads on to an address of this machine or its network; with `only_public`, for a URL that a
    stranger gives, also when it is such an address itself.
    """
    result = queue.Queue()
    # In a thread of its own: a server that sends a byte now and then keeps every read, and so this process, waiting.
    arguments = (url, max_bytes, timeout, only_public, result)
    threading.Thread(target=_fetch, args=arguments, daemon=True).start()
    try:
        content = result.get(timeout=deadline)
    except queue.Empty:
        raise ValueError(f"{url}: could not be fetched within {deadline:g} s") from None
    if isinstance(content, Exception):
        raise ValueError(f"{url}: {content}") from content
    return content


def _fetch(url, max_bytes, timeout, only_public, result):
    """Put the content (bytes) that is at the URL, or the reason why there is none (ValueError), into the queue."""
    import requests

    try:
        first, content = url, bytearray()
        with requests.Session() as session:
            if only_public:
                check_public(url, "it is at")
                session.mount("http://", only_public_adapter())
                session.mount("https://", only_public_adapter())
            for _ in range(MAX_REDIRECTS):
                with session.get(url, stream=True, timeout=timeout, allow_redirects=False) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers["location"])
                        _check_redirect(first, url)
                        continue
                    response.raise_for_status()
                    for chunk in response.iter_content(1 << 16):
                        content += chunk
                        if len(content) > max_bytes:
                            raise ValueError(f"more than {max_bytes:,} bytes; download it yourself and give the file")
                    return result.put(bytes(content))
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")
    except requests.RequestException as error:
        reason = str(error) if error.response is not None else type(error).__name__  # an HTTP status, or no response
        result.put(ValueError(f"could not be fetched ({reason})"))
    except Exception as error:  # whatever it is, somebody waits for it
        result.put(error if isinstance(error, ValueError) else ValueError(f"could not be fetched ({error})"))


def _check_redirect(first, url):
    """Raise ValueError unless `url`, to which a stranger's server leads on from `first`, is a public address."""
    here, there = urlsplit(first), urlsplit(url)
    if there.scheme not in ("http", "https") or not there.hostname:
        raise ValueError(f"could not be fetched (it leads on to {url[:100]!r})")
    if (there.hostname, there.port) != (here.hostname, here.port):
        check_public(url, "it leads on to")


def check_public(url, how):
    """Raise ValueError, in which `how` says where the URL comes from, unless it is a public address: else a stranger
    could have this machine ask others in its network, which strangers cannot reach."""
    there = urlsplit(url)
    for *_, (address, *_) in socket.getaddrinfo(there.hostname, there.port or 80, type=socket.SOCK_STREAM):
        if not is_public(address):
            raise ValueError(f"could not be fetched ({how} {there.hostname}, which is no public address)")
