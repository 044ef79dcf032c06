"""A folder with exported ONNX graphs becomes a static page: the page's own files and onnxruntime-web's are added.

onnxruntime-web is a package of npm. It is downloaded once into the user's cache, or taken from where it lies.
"""

import shutil
import tarfile
from pathlib import Path

from captioning.common.files import write_atomically
from captioning.data.downloads import download

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/{PACKAGE}"
SIZE = 33_106_585  # bytes
HASH = (
    "sha512:ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
PAGE = Path(__file__).with_name("onnx_page")
# The build for the processor alone, half the size of those for graphics cards: file in the package -> file of the page.
RUNTIME = {
    "dist/ort.wasm.bundle.min.mjs": "onnxruntime.js",  # some servers do not know that .mjs is JavaScript
    "dist/ort-wasm-simd-threaded.wasm": "onnxruntime.wasm",
}


def cached_package():
    """Where the downloaded package lies, if it was downloaded."""
    import pooch

    return Path(pooch.os_cache("image-captioning")) / PACKAGE


def fetch_package():
    """-> the path of the package, which is downloaded unless it is in the cache. Raises OSError or ValueError that says
    how to get it otherwise."""
    path = cached_package()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(URL, path, SIZE, HASH)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{error}. Where there is a network, `npm pack onnxruntime-web@{VERSION}` gets the file {PACKAGE}: "
            f"bring it here and add --onnxruntime_web {PACKAGE}"
        ) from error
    return path


def read_runtime(package):
    """The package, a folder or a .tgz as `npm pack` writes it -> {file of the page: bytes}. Raises ValueError that
    names a package without these files."""
    package = Path(package)
    try:
        if package.is_dir():
            return {name: (package / inside).read_bytes() for inside, name in RUNTIME.items()}
        with tarfile.open(package) as archive:
            return {name: archive.extractfile(f"package/{inside}").read() for inside, name in RUNTIME.items()}
    except (OSError, KeyError, AttributeError, EOFError, tarfile.TarError) as error:
        raise ValueError(
            f"{package}: not the npm package onnxruntime-web ({error}); `npm pack onnxruntime-web@{VERSION}` gets it"
        ) from error


def write_page(folder, runtime):
    """Add the page to a folder of `onnx_export.export`. `runtime`: the result of `read_runtime`."""
    for source in PAGE.iterdir():
        shutil.copyfile(source, Path(folder) / source.name)
    for name, content in runtime.items():
        write_atomically(Path(folder) / name, lambda path, content=content: path.write_bytes(content))
