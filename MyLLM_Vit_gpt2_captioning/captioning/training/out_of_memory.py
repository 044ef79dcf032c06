"""A batch that does not fit into the memory of the GPU: what to change."""

from contextlib import contextmanager

import torch


@contextmanager
def explained(config):
    """Where the GPU's memory does not suffice inside, the OutOfMemoryError says how much there is and which constants
    of the train_config `config` to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(advice(config, *memory_of_gpu(config.device))) from error


def memory_of_gpu(device):
    """-> (bytes of its memory, bytes of them that other processes use)."""
    free, total = torch.cuda.mem_get_info(device)
    return total, max(0, total - free - torch.cuda.memory_reserved(device))


def advice(config, total, used_by_others):
    """One line for a batch that does not fit into `total` bytes, of which other processes use some."""
    K, images = config.captions_per_image, config.batch_size // config.captions_per_image
    smaller = max(1, images // 2) * K
    others = f", of which other processes use {used_by_others / 2**30:.1f}" if used_by_others > total / 50 else ""
    lines = [] if images == 1 else [f"--batch_size {smaller} --accumulate {2 * config.accumulate} for the same step"]
    lines += [] if config.gradient_checkpointing else ["--gradient_checkpointing true for the same batch"]
    remedy = " or ".join(lines) or "a smaller encoder or decoder"
    return (
        f"a batch of {config.batch_size} captions of {images} photos does not fit into the GPU's "
        f"{total / 2**30:.1f} GiB of memory{others}: try {remedy}"
    )
