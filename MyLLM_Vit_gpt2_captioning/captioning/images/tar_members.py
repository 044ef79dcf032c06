"""Files inside a tar, read in place: the path `shards/val-000000.tar/000123.jpg` leads to the tar's member 000123.jpg.

Nothing is ever unpacked to the disk, so a hostile tar can write nowhere: names that lead out of it are not listed, and
links are not followed.
"""

import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path, PurePosixPath

SUFFIX = ".tar"
BLOCK = 512  # bytes; a tar is a sequence of such blocks, and two blocks of zeros end it
LARGEST = 2**27  # bytes of a member; a larger one is not a photo and would fill the memory
LARGEST_HEADER = 2**20  # bytes of a header with long names; a larger one is an attack


def members(file):
    """A tar, opened for reading -> yields (name, offset, size) of its regular files; their bytes lie there as they are.

    Links, devices, sparse files and names that lead out of the tar are left out. When the tar breaks off, or is none,
    ValueError is raised behind the last whole member.
    """
    try:
        with tarfile.open(fileobj=_HeadersOf(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else it would keep them all
                if member.isreg() and not member.issparse() and _stays_inside(member.name):
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
                raise ValueError("it ends too early, or is damaged in the middle")
    except Exception as error:  # damaged headers fail in any way: ReadError, UnicodeDecodeError, OverflowError, ...
        raise ValueError(f"not a whole tar file ({error})") from error


class _HeadersOf:
    """What tarfile reads of a file that is only listed: headers. The size of those with long names is in the file."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size):
        if size > LARGEST_HEADER:
            raise ValueError(f"a header in it has {size:,} bytes")
        return self.file.read(size)


def read(file, offset, size):
    """Bytes of a member. Raises ValueError when it is too large or cut off."""
    if size > LARGEST:
        raise ValueError(f"has {size:,} bytes, more than any photo")
    file.seek(offset)
    content = file.read(size)
    if len(content) < size:
        raise ValueError("is cut off")
    return content


def tar_of(path):
    """The tar that a path leads into, or None where it leads into none."""
    if f"{SUFFIX}{os.sep}" not in str(path):
        return None
    return next((parent for parent in Path(path).parents if parent.suffix == SUFFIX and parent.is_file()), None)


def exists(path):
    """Whether a path into a tar leads to a member of it."""
    tar = tar_of(path)
    return tar is not None and _name(path, tar) in _index(tar)


def opened(path):
    """A path into a tar -> its member as a file in memory; anything else stays what it is.

    Raises FileNotFoundError when the tar has no such member, ValueError when it is cut off, and for a path to something
    that never ends: a pipe, a device.
    """
    if not isinstance(path, str | Path):
        return path
    tar = tar_of(path)
    if tar is None:
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is a pipe or a device")
        return path
    offset_and_size = _index(tar).get(_name(path, tar))
    if offset_and_size is None:
        raise FileNotFoundError(f"{path}: no such file in the tar")
    with open(tar, "rb") as file:
        member = _Member(read(file, *offset_and_size))
    member.path = path
    return member


def file_identity(path):
    """[size, time of the last change] of a file, or of the tar that a path leads into: other ones tell of a change."""
    stat = os.stat(tar_of(path) or path)
    return [stat.st_size, stat.st_mtime_ns]


def read_bytes(path):
    """The content of a file, or of a member of a tar."""
    source = opened(path)
    return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()


class _Member(io.BytesIO):
    def __repr__(self):
        return repr(str(self.path))  # Pillow names it so when it is not an image


def _stays_inside(name):
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\0" in name)


def _name(path, tar):
    return Path(path).relative_to(tar).as_posix()


def _index(tar):
    return _read_index(str(tar), *file_identity(tar))


@lru_cache(64)
def _read_index(tar, size, modified):
    """{name: (offset, size)} of a tar of this `size`, last `modified` then; of a broken one, as far as it goes."""
    index = {}
    with open(tar, "rb") as file:
        try:
            for name, *offset_and_size in members(file):
                index.setdefault(name, offset_and_size)
        except ValueError:
            pass
    return index
