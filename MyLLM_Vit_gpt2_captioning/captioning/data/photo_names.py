"""Where the photos of a dataset lie, and which photo a name in an annotation file means.

A name that was written on another system is understood, too: with other separators, with a folder that is not here, in
another case, with other code points for the same letters, or without its ending. No name leads out of the folders.
"""

import os
import re
import unicodedata
from pathlib import Path, PureWindowsPath

from captioning.common.files import is_litter
from captioning.common.printable import printable
from captioning.data.conventions import IMAGE_SUFFIXES, KNOWN_FILES, is_photo_file
from captioning.images import tar_members

IMAGE_FOLDERS = (  # looked for in this order
    "flickr30k_images",
    "images",
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
)

COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})")  # the name of a COCO photo holds its id


def image_roots(data_dir, source, image_dir=None):
    """Folders that image names may be relative to, in the order in which they are tried. `source`: the annotation file
    or folder; `image_dir`: the folder of photos, where a user has named it."""
    if image_dir:
        return [Path(image_dir)]
    folders = [data_dir / name for name in IMAGE_FOLDERS]
    if source.is_dir() and source.name != "annotations":
        return [source, data_dir, *(folder for folder in folders if folder.is_dir())]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        return [data_dir, folders[0]]
    again = found / found.name  # some archives hold the same folder again
    return [found, again, data_dir] if again.is_dir() else [found, data_dir]


def is_image_file(path):
    """Whether there is such a file, or member of a tar; False for a name too long for a file, where Path raises."""
    try:
        return path.is_file() or tar_members.exists(path)
    except OSError:
        return False


def _parts(name):
    """The folders and the file in a name, whatever separates them: C:\\photos\\a.jpg -> ["photos", "a.jpg"]."""
    path = PureWindowsPath(name)  # which knows both separators
    return [part for part in path.parts if part not in (path.anchor, ".")]


def _plain(text):
    """The same for all ways to write a name: composed letters (macOS takes them apart), lowercase."""
    return unicodedata.normalize("NFC", text).casefold()


def plain_name(name):
    """A name without folders and the ending of a photo, the same for all ways to write it."""
    last = (_parts(name) or [""])[-1]
    return _plain(Path(last).stem if Path(last).suffix.lower() in IMAGE_SUFFIXES else last)


class PhotoFinder:
    """The photos in the folders `roots`, by their names in an annotation file."""

    def __init__(self, roots):
        self.roots, self.index = roots, PhotoIndex(roots[0])

    def is_photo(self, name):
        """Whether exactly one photo has the name, or may be meant by it."""
        return self._as_it_is(name) is not None or len(self.index.find(name)) == 1

    def find_all(self, names, source, say=print):
        """Image names as in the file (a Series) -> Paths; one that is nowhere becomes a path where nothing is.

        Raises ValueError with the row in `source` for a name that leads out of the folders, and for one that may mean
        two photos. `say` prints how many names are written otherwise than on the disk.
        """
        found, otherwise = {}, []
        for row, name in zip(names.index, names, strict=True):
            if name in found:
                continue
            path = self._as_it_is(name)
            if path is None:
                fitting = self.index.find(name)
                if len(fitting) > 1:
                    raise ValueError(
                        f"{source}, {names.index.name} {row}: the image {name!r} may be {printable(fitting[0])} or "
                        f"{printable(fitting[1])}; name it in full"
                    )
                if self._leads_out(name) and not fitting:
                    raise ValueError(
                        f"{source}, {names.index.name} {row}: the image {name!r} lies outside of {self.roots[0]}; move "
                        "it there"
                    )
                otherwise += [(row, name, path) for path in fitting]
                path = fitting[0] if fitting else self.roots[0] / name
            found[name] = path
        if otherwise:
            row, name, path = otherwise[0]
            say(
                f"{source}: {len(otherwise):,} of {len(found):,} photos have another name there than on the disk; the "
                f"first, {names.index.name} {row}: {name!r} is {printable(path)}"
            )
        return names.map(found)

    def _as_it_is(self, name):
        """The path of the photo that has exactly this name, with or without its folder; else None."""
        if "\0" in name or self._leads_out(name):
            return None  # a path cannot hold NUL
        candidates = [root / name for root in self.roots]  # an absolute name stays what it is
        # COCO's names come with their folder (train2017/1.jpg), which is left out when the image folder is that folder.
        candidates += [root / Path(name).name for root in self.roots if "/" in name and not Path(name).is_absolute()]
        return next((path for path in candidates if is_image_file(path)), None)

    def _leads_out(self, name):
        """Whether a name leads to a place outside of all folders, with the separators of any system."""
        windows = name.replace("\\", "/") if ".." in PureWindowsPath(name).parts else name
        return any(
            (Path(path).is_absolute() or ".." in Path(path).parts)
            and ("\0" in path or not any((r / path).resolve().is_relative_to(r.resolve()) for r in self.roots))
            for path in (name, windows)
        )


class PhotoIndex:
    """The photos in a folder and in those below it, but for folders that are data sets of their own. The folder is
    looked through when the first name is asked for."""

    def __init__(self, folder):
        self.folder, self.by_stem, self.by_id = Path(folder), None, {}

    def find(self, name):
        """The photos that `name` may mean: none, one, or several that fit equally well.

        The folders in the name and those on the disk have to agree, as far as both have some: train/1.jpg is never
        val/1.jpg. A name without the ending of a photo may also be a COCO id, 522418 for
        COCO_train2014_000000522418.jpg.
        """
        if self.by_stem is None:
            self._look_through()
        parts = _parts(name)
        if not parts or ".." in parts:
            return []
        last = parts[-1]
        has_ending = Path(last).suffix.lower() in IMAGE_SUFFIXES
        found = self.by_stem.get(plain_name(last), [])
        if has_ending:
            found = [path for path in found if _plain(path.name) == _plain(last)]
        elif not found and last.isascii() and last.isdigit():
            found = self.by_id.get(int(last), [])
        agreeing = {path: same for path in found if (same := self._agreeing_folders(path, parts)) is not None}
        most = max(agreeing.values(), default=0)
        found = [path for path in agreeing if agreeing[path] == most]
        for exact in (str, lambda text: unicodedata.normalize("NFC", text)):
            found = [path for path in found if exact(path.name) == exact(last)] or found
        return found

    def _agreeing_folders(self, path, parts):
        """How many folders a path and the parts of a name have in common at their ends; None where they differ."""
        inner = [_plain(part) for part in path.relative_to(self.folder).parts[:-1]]
        outer = [_plain(part) for part in self.folder.absolute().parts]
        named, whole = [_plain(part) for part in parts[:-1]], outer + inner
        common = min(len(named), len(whole))
        same = next((n for n in range(common) if named[-1 - n] != whole[-1 - n]), common)
        return same if same >= min(len(named), len(inner)) else None

    def _look_through(self):
        self.by_stem = {}
        for folder, folders, files in os.walk(self.folder):
            inside = Path(folder) != self.folder
            if inside and not set(KNOWN_FILES).isdisjoint(files):
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith(".") and not is_litter(name))
            for name in sorted(files):
                path = Path(folder, name)
                if is_photo_file(path):
                    self.by_stem.setdefault(plain_name(name), []).append(path)
                    if match := COCO_NAME.fullmatch(path.stem):
                        self.by_id.setdefault(int(match[1]), []).append(path)
