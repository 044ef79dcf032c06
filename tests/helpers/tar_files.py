"""Tar files as any program may write them, and shards of a dataset."""

import io
import json
import tarfile

from helpers.image_files import jpeg

COUNTS = [[5, 1, 3], [2], [1, 4, 4, 2, 1, 1], [3] * 5]  # captions of each photo, by training shard


def write_tar(path, content):
    """A tar as any program may write it: {name: bytes}, or a `TarInfo` for a member without bytes."""
    with tarfile.open(path, "w") as tar:
        for name, value in content.items():
            member = value if isinstance(value, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name, member.size = name, len(value) if isinstance(value, bytes) else member.size
            tar.addfile(member, io.BytesIO(value) if isinstance(value, bytes) else None)
    return path


def members(shard, photo, count):
    captions = [f"shard {shard} photo {photo} caption {c}{' long' * c}" for c in range(count)]
    record = dict(captions=captions, image="any.jpg")
    return {f"{photo:06d}.jpg": jpeg(10 * shard + photo), f"{photo:06d}.json": json.dumps(record).encode()}


def make_shards(folder, counts=COUNTS):
    """Shards without a manifest, and one for validation."""
    folder.mkdir()
    for shard, photos in enumerate(counts):
        content = {}
        for photo, count in enumerate(photos):
            content |= members(shard, photo, count)
        write_tar(folder / f"train-{shard:06d}.tar", content)
    write_tar(folder / "val-000000.tar", members(99, 0, 2) | members(99, 1, 2))
    return folder
