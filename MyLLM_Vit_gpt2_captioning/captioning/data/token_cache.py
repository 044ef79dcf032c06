"""Token cache: what a frozen encoder makes of a photo never changes, so it is computed once and kept on disk. Where the
encoder's last `trainable_stages` train, that is what its front makes: see `model.front`.

A cache is a folder that holds one view of the photos, plain or augmented:
    manifest.json      everything except the photos that its tokens depend on; a hash of it ends the folder's name
    index.jsonl        one line per photo, in the order of the rows: path, size, time of last change, may be mirrored,
                       CRC-32 of the tokens
    level_0.float16    tokens (rows, N, C); a file for each level of the encoder
    entering.float16   in front of stages that train, what enters them, (rows, C, h, w) or (rows, N, C); beside it only
                       those first levels that do not follow from it
A photo's tokens are on the disk before its line, so whatever ends the work, what the index lists is whole, and the rest
is computed the next time. A photo that changed gets a new row.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import zlib
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from captioning.common import stopping
from captioning.common.files import read_json, write_atomically
from captioning.common.locks import LOCK_FILE, after_other_writers
from captioning.common.precision import autocast_dtype
from captioning.common.progress import progress_bar
from captioning.data import resumable_work
from captioning.data.batching import stack, to_device
from captioning.data.workers import Loader
from captioning.images import tar_members
from captioning.images.augmentation import TrainingTransforms, may_mirror
from captioning.images.preprocessing import load_image, preprocess
from captioning.model.front import FrontOutput, front_of
from captioning.model.stages import stages_of_run, trainable_names

CACHE_FORMAT = 2  # of these files; a change makes every cache a new one
AUGMENTATION_VERSION = 3  # of TrainingTransforms; a change makes every cache of an augmented view a new one
MIXED_PRECISION_DEVICES = ("cuda",)  # device types on which it makes the tokens
SYNC_EVERY = 512  # photos between two points from which interrupted work goes on
SPARE_BYTES = 2**30  # of the disk stay free


class TokenCache:
    """`cache[path]` -> the photo's tokens, a float16 tensor (N, C) for each level of the encoder; a `FrontOutput` of
    such tensors for a captioner whose encoder's last stages alone train."""

    def __init__(self, folder, model, view=0, crop_scale=0.8, precision="auto"):
        """The cache in `folder` for `model`, a `VisionGPT2Model`; nothing is computed before `fill`.

        View 0 is the plain photo, the others are augmented as in training, drawn from (view, photo): alike in all runs.
        On a GPU tokens are computed with mixed precision, as training would with this `precision`; on a CPU always in
        float32.
        """
        config, encoder = model.config, model.encoder
        device = next(model.parameters()).device
        self.dtype = autocast_dtype(device, precision) if device.type in MIXED_PRECISION_DEVICES else None
        augmented = dict(view=view, crop_scale=crop_scale, augmentation=AUGMENTATION_VERSION) if view else dict(view=0)
        self.view, self.preprocessing = augmented, model.preprocessing
        self.last, self.kept_levels = front_of(model)
        # As a ViT has in "final" coupling. A refiner's output is normalised, too, but tokens are cached before it.
        has_final_norm = encoder.normalized and getattr(encoder, "refiner", None) is None
        self.manifest = {
            "format": CACHE_FORMAT,
            "encoder": str(config.encoder),
            "encoder_options": config.encoder_options,
            "weights": weights_digest(encoder, self.last),
            "own final norm": has_final_norm,
            "levels": len(encoder.widths),
            "preprocessing": {key: list(v) if isinstance(v, tuple) else v for key, v in self.preprocessing.items()},
            **({"in front of": self.last, "levels kept": self.kept_levels} if self.last else {}),
            **({"computed in": str(self.dtype)} if self.dtype else {}),
            **augmented,
        }
        key = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(folder) / f"{Path(config.encoder).name}-view{view}-{key}"
        self.shapes, self.index, self.rows, self._maps = [], {}, 0, None
        self._checked = set()  # rows whose checksum this process has compared
        self._read_index()

    def __getstate__(self):
        return self.__dict__ | {"_maps": None}  # for data workers: a pickled memory map would be a copy of the file

    def __contains__(self, path):
        return os.path.abspath(path) in self.index

    def __getitem__(self, path):
        if self._maps is None:
            self._maps = [
                np.memmap(file, np.float16, "r", shape=(file.stat().st_size // (2 * math.prod(shape)), *shape))
                for file, shape in zip(self._files(), self.shapes, strict=True)
            ]
        row, *_, checksum = self.index[os.path.abspath(path)]
        levels = [np.array(level[row]) for level in self._maps]
        if row not in self._checked:
            if _checksum(levels) != checksum:
                raise ValueError(
                    f"{self.folder}: the tokens of {path} are damaged; remove this folder, and they are computed again"
                )
            self._checked.add(row)
        levels = [torch.from_numpy(level) for level in levels]
        return FrontOutput(levels[0], levels[1:]) if self.last else levels

    def batch(self, paths):
        """Photos -> their tokens as the model takes them: float16 (B, N, C) for each level, or a `FrontOutput`."""
        return stack([self[path] for path in paths])

    def missing(self, images, captions_of=None):
        """Photos (paths) that are not in the cache, or changed since -> {absolute path: identity, see `_identity`}.

        `captions_of` {path: captions} says which photos augmentation may mirror.
        """
        captions_of = {os.path.abspath(path): captions for path, captions in (captions_of or {}).items()}
        identities = {path: self._identity(path, captions_of.get(path, ())) for path in map(os.path.abspath, images)}
        return {path: same for path, same in identities.items() if self.index.get(path, [None])[1:-1] != same}

    def fill(self, model, images, captions_of=None, batch_size=32, num_workers=0):
        """Compute the tokens that are `missing` -> the cache.

        Raises ValueError that names a photo that cannot be read or whose tokens float16 cannot hold; the tokens of the
        photos before it stay. OSError that names the folder when the disk is full; the tokens before that stay, too.
        Stopped as in `stop_if_asked`, with all tokens computed so far on the disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with after_other_writers(self.folder / LOCK_FILE):  # a second run that needs the same tokens waits for them
            entries, shapes = self._read_index(), self.shapes_of(model)
            if self.shapes != shapes:  # a damaged manifest: all is computed again
                entries, self.shapes, self.index, self.rows = [], shapes, {}, 0
            missing = self.missing(images, captions_of)
            if missing:
                content = json.dumps(self.manifest | {"shapes": self.shapes}, indent=2) + "\n"
                write_atomically(self.folder / "manifest.json", lambda path: path.write_text(content))
                self._compute(model, missing, entries, captions_of or {}, batch_size, num_workers)
        return self

    def _compute(self, model, identities, entries, captions_of, batch_size, num_workers):
        """Append the tokens of the photos in `identities`, and a line for each behind the `entries` of the index."""
        paths = list(identities)
        load_input = partial(preprocess, **self.preprocessing)
        if self.view["view"]:
            load_input = _AugmentedView(self.preprocessing, self.view, captions_of)
        on_gpu = next(model.parameters()).device.type == "cuda"
        jobs = resumable_work.Jobs(load_input, paths)
        loader = Loader(jobs, batch_size, num_workers=num_workers, pin_memory=on_gpu)
        model.eval()
        computed, unsynced = 0, {}  # {path: checksum of its tokens}
        bar = progress_bar(len(paths), "tokens")
        try:
            with ExitStack() as open_files:
                index = open_files.enter_context(resumable_work.open_index(self.folder / "index.jsonl", entries))
                levels = [open_files.enter_context(file.open("ab")) for file in self._files()]
                for file, shape in zip(levels, self.shapes, strict=True):
                    file.truncate(self.rows * 2 * math.prod(shape))  # behind these may be unfinished work
                for images in loader:  # (B, 3, H, W)
                    batch = paths[computed : computed + len(images)]
                    tokens = [level.numpy() for level in self._float16_tokens(model, images, batch)]
                    for file, level in zip(levels, tokens, strict=True):
                        file.write(level.tobytes())
                    unsynced |= {path: _checksum([level[i] for level in tokens]) for i, path in enumerate(batch)}
                    computed += len(batch)
                    bar.update(len(batch))
                    if len(unsynced) >= SYNC_EVERY or computed == len(paths) or stopping.asked():
                        for file in levels:
                            file.flush()
                            os.fsync(file.fileno())
                        new = [[path, *identities[path], checksum] for path, checksum in unsynced.items()]
                        resumable_work.add_entries(index, *new)
                        os.fsync(index.fileno())
                        for path, *rest in new:
                            self.index[path] = [self.rows, *rest]
                            self.rows += 1
                        unsynced = {}
                    stopping.stop_if_asked()
        except OSError as error:
            if isinstance(error, FileNotFoundError):  # a photo's
                raise
            raise OSError(
                f"{self.folder}: the tokens could not be written ({error.strerror or error}); those of {self.rows:,} "
                "photos are kept. Make room, or give another disk with --cache_dir FOLDER, and start again"
            ) from error
        finally:
            bar.close()

    def shapes_of(self, model):
        """The shape of each tensor that is kept of a photo."""
        side, device, was_training = model.preprocessing["img_size"], next(model.parameters()).device, model.training
        model.eval()  # BatchNorm must not take up the statistics of a photo of zeros
        try:
            return [tuple(part.shape[1:]) for part in self._parts(model, torch.zeros(1, 3, side, side, device=device))]
        finally:
            model.train(was_training)

    @torch.inference_mode()
    def _parts(self, model, images):
        """images (B, 3, H, W) -> list of the tensors that are kept of them, B in front."""
        if not self.last:
            return model.levels(images)
        front = model.encoder.front(images, self.last, self.kept_levels)
        return [front.entering, *front.levels]

    def _float16_tokens(self, model, images, paths):
        """images (B, 3, H, W) -> their tokens (B, N, C) for each level, on the CPU. Raises ValueError that names the
        first of the `paths` whose tokens float16 cannot hold."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, self.dtype) if self.dtype else nullcontext():
            levels = self._parts(model, to_device(images, device))
        levels = [level.half().cpu().contiguous() for level in levels]
        for level in levels:
            bad = (~level.isfinite()).flatten(1).any(1).nonzero()
            if len(bad):
                raise ValueError(f"{paths[int(bad[0])]}: its tokens do not fit float16; leave out --cache_tokens")
        return levels

    def _identity(self, path, captions):
        """[size, time of the last change, may be mirrored] of a photo: while these stay, its tokens do."""
        try:
            return [*tar_members.file_identity(path), may_mirror(captions) if self.view["view"] else None]
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such image") from None

    def _files(self):
        names = ["entering"] if self.last else []
        names += [f"level_{i}" for i in range(len(self.shapes) - len(names))]
        return [self.folder / f"{name}.float16" for name in names]

    def _read_index(self):
        """Read {path: [row, size, time, mirrored, checksum]} from the disk -> the entries of the index that count: in
        front of the first damaged line whose tokens are on the disk. Changes no file: another run may be at work."""
        self.index, self.rows, self._maps, self._checked = {}, 0, None, set()
        index, manifest = self.folder / "index.jsonl", self.folder / "manifest.json"
        if not (index.is_file() and manifest.is_file()):
            return []
        try:
            self.shapes = [tuple(int(side) for side in shape) for shape in read_json(manifest)["shapes"]]
        except (ValueError, KeyError, TypeError, OverflowError):
            self.shapes = []
        if not (self.shapes and all(shape and min(shape) > 0 for shape in self.shapes)):
            return []  # damaged: all is computed again
        sizes = [file.stat().st_size if file.is_file() else 0 for file in self._files()]
        stored = min(size // (2 * math.prod(shape)) for size, shape in zip(sizes, self.shapes, strict=True))
        entries = resumable_work.read_index(index)[:stored]
        entries = list(itertools.takewhile(_is_entry, entries))
        self.index = {path: [row, *identity] for row, (path, *identity) in enumerate(entries)}
        self.rows = len(entries)
        return entries


def _is_entry(entry):
    """Whether a line of the index is [path, size, time, mirrored, checksum]."""
    return (
        isinstance(entry, list)
        and len(entry) == 5
        and isinstance(entry[0], str)
        and all(type(number) is int for number in (entry[1], entry[2], entry[4]))
        and entry[3] in (None, True, False)
    )


def _checksum(levels):
    """CRC-32 of a photo's tokens, an array (N, C) for each level."""
    checksum = 0
    for level in levels:
        checksum = zlib.crc32(np.ascontiguousarray(level), checksum)
    return checksum


def fill_caches(model, jobs, num_workers=0):
    """Fill the caches of one folder, jobs = [(cache, images, captions_of), ...]; prints first how much disk they take.

    Raises OSError before anything is computed when the disk has too little room.
    """
    missing = [len(cache.missing(images, captions_of)) for cache, images, captions_of in jobs]
    if any(missing):
        folder, shapes = jobs[0][0].folder.parent, jobs[0][0].shapes_of(model)
        need = sum(missing) * sum(2 * math.prod(shape) for shape in shapes)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        each = " + ".join(" x ".join(map(str, shape)) for shape in shapes)
        print(f"token cache: {sum(missing):,} views of photos x {each} numbers take {need / 1e9:.2f} GB in {folder}")
        if need > free - SPARE_BYTES:
            raise OSError(
                f"{folder}: the tokens take {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free, 1 GB to spare: "
                "give another disk with --cache_dir FOLDER, fewer --cache_views, or train without --cache_tokens"
            )
    with stopping.listening("the tokens computed so far are kept, and the same command goes on"):
        for cache, images, captions_of in jobs:
            cache.fill(model, images, captions_of, num_workers=num_workers)


def read_tokens_from_disk(model, loaders, train_config):
    """Let the `Dataset`s of the training and the validation loader read the tokens of the encoder, or of the front of
    one whose last stages train, from caches in `train_config.cache_dir`; those that are not there are computed first.

    Raises ValueError when what would be kept does not stay frozen, and what `fill_caches` and `TokenCache.fill` raise.
    """
    config = train_config
    trainable = set().union(*(trainable_names(stage, model) for stage in stages_of_run(model, config)))
    last, _ = front_of(model)
    trained = [name for name in model.encoder.weights_before(last) if f"encoder.{name}" in trainable]
    if trained:
        remedy = "set --trainable_stages 0 (or 1: only the last stage trains), or leave out --cache_tokens"
        if model.config.trainable_stages > 0:
            remedy = f"{model.config.encoder} cannot be entered in front of its last stages; leave out --cache_tokens"
        if not set(model.pretrained_parameters()) & {f"encoder.{name}" for name in trained}:
            remedy = "an encoder from scratch has to train; leave out --cache_tokens"
        raise ValueError(
            f"cache_tokens: {len(trained)} parameters of the encoder train (the first is {trained[0]}), so its tokens "
            f"change: {remedy}"
        )
    views = [
        TokenCache(config.cache_dir, model, view, config.crop_scale, config.precision)
        for view in range(config.cache_views)
    ]
    training, validation = (loader.dataset for loader in loaders)
    jobs = [(cache, list(training.captions_of), training.captions_of) for cache in views]
    jobs.append((views[0], list(validation.captions_of), validation.captions_of))
    fill_caches(model, jobs, config.num_workers)
    training.token_caches, validation.token_caches = views, views[:1]


def weights_digest(encoder, last=0):
    """SHA-256 of all weights and buffers that cached tokens depend on, those in front of the `last` stages, as
    hexadecimal text."""
    digest, tensors = hashlib.sha256(), encoder.state_dict()
    for name in sorted(encoder.weights_before(last)):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _AugmentedView:
    """path -> image tensor (3, H, W) of one augmented view, the same in every run."""

    def __init__(self, preprocessing, view, captions_of):
        self.transforms = TrainingTransforms(crop_scale=view["crop_scale"], **preprocessing)
        self.view, self.captions_of = view, captions_of

    def __call__(self, path):
        seed = [self.view["view"], zlib.crc32(Path(path).name.encode())]
        pixels = np.asarray(load_image(path, grey16=self.transforms.grey16))  # (H, W, 3)
        return self.transforms(image=pixels, captions=self.captions_of.get(path, ()), seed=seed)["image"]
