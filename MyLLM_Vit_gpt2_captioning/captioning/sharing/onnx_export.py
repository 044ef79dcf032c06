"""A captioner as two ONNX graphs, which onnxruntime runs without torch, here or in a browser.

encoder.onnx      pixels (H, W, 3) uint8 -> image (depth, 2, heads, N, head_dim): keys and values of the N image tokens
                  for the cross-attention of each decoder block
decoder.onnx      tokens (rows, T) int64, past (rows, depth, 2, heads, P, head_dim), image -> logits (rows, vocab_size)
                  of the next token, present (rows, depth, 2, heads, P + T, head_dim): keys and values of self-attention
captioner.json    size of the photo, special ids, the text of each token
example_onnx.py   captions photos with these files

The rows are captions of the one image, for example beams. A step has T = 1, a prompt more; at the start P is 0. Both
graphs are traced from the model's own code, and the photo is normalised inside, so that only resizing is left outside.
"""

import contextlib
import importlib
import io
import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from captioning.common.files import write_atomically
from captioning.decoding.cached_decoder import BlockCache, next_token_logits
from captioning.decoding.search import caption_images, generate_ids, trim
from captioning.images.preprocessing import resize, to_tensor

EXAMPLE = Path(__file__).with_name("example_onnx.py")
ENCODER_FILE, DECODER_FILE, DESCRIPTION_FILE = "encoder.onnx", "decoder.onnx", "captioner.json"
LARGEST_GRAPH = 2_000_000_000  # bytes of weights; an ONNX file is a protocol buffer, which may have 2 GiB
MAX_TOKENS = 50  # new tokens of a caption, EOS included, as in `Options`
INT8_OPERATORS = ["MatMul", "Gather"]  # linear layers and embeddings; convolutions would be slower than in float32


class EncoderGraph(nn.Module):
    """Everything that happens once a photo."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(model.preprocessing[name]).view(3, 1, 1))

    def forward(self, pixels):
        """pixels (H, W, 3) uint8 -> (depth, 2, heads, N, head_dim)."""
        images = (pixels.permute(2, 0, 1).float() / 255 - self.mean) / self.std  # (3, H, W), as `normalize` does it
        states = self.model.encoder_states(images[None])  # a (1, N, embed_dim) for each block
        pairs = zip(self.model.gpt.trf_blocks, states, strict=True)
        return torch.stack([torch.cat(block.cross_attn.project(tokens, tokens)) for block, tokens in pairs])


class GrowingCache:
    """A `KeyValueCache` that a graph can have as input and output: it grows by concatenation."""

    def __init__(self, keys, values):
        self.keys, self.values, self.length = keys, values, keys.size(2)  # (rows, heads, P, head_dim) each

    def append(self, keys, values):
        """keys and values (rows, heads, T, head_dim) of the newest tokens -> those of all (rows, heads, P + T,
        head_dim)."""
        self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class DecoderGraph(nn.Module):
    """One step of the decoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, past, image):
        """Shapes as at the top of this file."""
        caches = []
        for i in range(self.model.config.depth):
            caches.append(BlockCache(GrowingCache(past[:, i, 0], past[:, i, 1])))
            caches[-1].cross_attn = image[i, :1], image[i, 1:]  # (1, heads, N, head_dim) each
        hidden = self.model.decode(tokens, [None] * len(caches), caches)[:, -1]  # (rows, embed_dim), last token
        present = [torch.stack([cache.self_attn.keys, cache.self_attn.values], dim=1) for cache in caches]
        return next_token_logits(self.model, hidden), torch.stack(present, dim=1)


@torch.no_grad()
def export(model, tokenizer, folder, int8=False):
    """Write a captioner in eval mode into `folder`, which exists.

    `int8`: weights of linear layers and embeddings in 8 bits, activations quantised while the graph runs. Raises
    ValueError for a captioner that cannot be exported.
    """
    config, size = model.config, model.preprocessing["img_size"]
    head_dim = config.embed_dim // config.num_heads
    description = dict(
        img_size=size,
        resample=model.preprocessing["resample"],
        bos=tokenizer.bos_token_id,
        eos=config.eos_token_id,
        max_tokens=MAX_TOKENS,
        max_length=config.seq_len,  # of a caption, BOS included
        depth=config.depth,
        heads=config.num_heads,
        head_dim=head_dim,
        tokens=token_texts(tokenizer, config.vocab_size),
    )
    pixels = torch.zeros(size, size, 3, dtype=torch.uint8)
    image = EncoderGraph(model)(pixels)
    # Lengths of 2 and more, all different: 0, 1 and equal ones would be taken for constants.
    tokens = torch.zeros(2, 3, dtype=torch.long)
    past = torch.zeros(2, config.depth, 2, config.num_heads, 4, head_dim)
    any_length = torch.export.Dim.DYNAMIC
    shapes = dict(tokens={0: any_length, 1: any_length}, past={0: any_length, 4: any_length}, image=None)
    graphs = {
        ENCODER_FILE: (EncoderGraph(model), (pixels,), ["pixels"], ["image"], None),
        DECODER_FILE: (DecoderGraph(model), (tokens, past, image), [*shapes], ["logits", "present"], shapes),
    }
    _check_sizes(model)
    for name, graph in graphs.items():
        write_atomically(Path(folder) / name, lambda path, graph=graph: _export_graph(path, *graph, int8))
    text = json.dumps(description, ensure_ascii=False)
    write_atomically(Path(folder) / DESCRIPTION_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    shutil.copyfile(EXAMPLE, Path(folder) / EXAMPLE.name)


def require_libraries():
    """Raise ImportError that says what to install where a library is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"exporting needs {name}: pip install -r requirements-extra.txt") from error


def _check_sizes(model):
    cross_attention = [block.cross_attn for block in model.gpt.trf_blocks]
    keys_and_values = [layer for attention in cross_attention for layer in (attention.k, attention.v)]
    for name, parts in {"encoder": [model.encoder, model.bridges, *keys_and_values], "decoder": [model.gpt]}.items():
        weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        if weights > LARGEST_GRAPH:
            raise ValueError(f"the {name} has {weights / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB")


def _export_graph(path, graph, inputs, input_names, output_names, dynamic_shapes, int8):
    """Trace `graph` (a module) with `inputs` and write it to `path`."""
    import onnx

    try:
        with _silence():
            program = torch.onnx.export(
                graph.eval(),
                inputs,
                dynamo=True,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    except Exception as error:  # torch.export and onnxscript raise classes of their own
        cause = error.__cause__ or error
        raise ValueError(
            f"the {'encoder' if 'pixels' in input_names else 'decoder'} cannot be exported to ONNX with encoder "
            f"{graph.model.config.encoder}: {type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        ) from error
    proto = program.model_proto
    _forget_sources(proto)
    onnx.save(proto, path)
    if int8:
        quantize(path)


def _forget_sources(proto):
    """Remove what the exporter notes of each node: the lines it comes from, with the paths of this machine."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def quantize(path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _silence():
        quantize_dynamic(path, path, op_types_to_quantize=INT8_OPERATORS, per_channel=True, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def _silence():
    """Without the exporters' progress, warnings and hints."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- tokens -----------------------------------------------------------------------------------------------------------


def token_texts(tokenizer, vocab_size):
    """The text of each id from 0 to `vocab_size` - 1, of which a caption's text is put together.

    A text is a string of bytes, one a character from U+0000 to U+00FF, because a token may end within a character of
    the caption: joined, they are the UTF-8 of the caption. Special tokens and ids that the tokenizer does not have are
    "". Raises ValueError for a tokenizer that is neither a byte-level BPE nor a list of words.
    """
    from tokenizers import decoders

    decoder = tokenizer.backend.decoder
    if not (decoder is None or isinstance(decoder, decoders.ByteLevel)):
        raise ValueError(
            f"{tokenizer.source}: its tokens become text by {type(decoder).__name__}; only a byte-level BPE and a list "
            "of words can be exported"
        )
    byte_of, texts = _byte_alphabet(), []
    for i in range(vocab_size):
        token, decoded = tokenizer.backend.id_to_token(i), tokenizer.decode([i])
        if not decoded:
            text = b""
        elif decoder is None:  # words, with spaces between them
            text = f" {token}".encode()
        elif set(token) <= byte_of.keys():
            text = bytes(byte_of[character] for character in token)
        else:
            text = decoded.encode()
        texts.append(text.decode("latin-1"))
    return texts


def _byte_alphabet():
    """{character: byte} of byte-level BPE (Radford et al. 2019): printable bytes stand for themselves, the others, in
    their order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# --- is it the same captioner? ----------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(model, tokenizer, folder, photos, beams=4):
    """Caption `photos` (paths or PIL images) with the model and with the exported folder, one photo at a time.

    Returns a SimpleNamespace: `greedy` and `beam`, how many captions are the same; `logits`, the largest difference of
    logits over all steps of the model's greedy captions, and `largest`, the largest of these logits; `pixels`, how many
    photos have the same pixels; `torch_ms` and `onnx_ms`, medians of a greedy caption in milliseconds, from the photo
    to the text, side by side.
    """
    from captioning.sharing.example_onnx import Captioner

    captioner = Captioner(folder, threads=torch.get_num_threads())
    found = SimpleNamespace(photos=len(photos), greedy=0, beam=0, beams=beams, pixels=0, logits=0.0, largest=0.0)
    times = {"torch": [], "onnx": []}
    for photo in photos:
        size, resample = model.preprocessing["img_size"], model.preprocessing["resample"]
        pixels = to_tensor(resize(photo, size, resample))  # (3, H, W)
        found.pixels += np.array_equal(captioner.pixels(photo), pixels.permute(1, 2, 0).numpy())
        captions = {}
        for name, caption in (
            ("torch", lambda photo: caption_images(model, tokenizer, [photo], MAX_TOKENS)[0]),
            ("onnx", captioner.caption),
        ):
            start = time.perf_counter()
            captions[name] = caption(photo)
            times[name].append((time.perf_counter() - start) * 1000)
        found.greedy += captions["torch"] == captions["onnx"]
        [by_beams] = caption_images(model, tokenizer, [photo], MAX_TOKENS, num_beams=beams)
        found.beam += by_beams == captioner.caption(photo, beams)

        prompt = torch.tensor([[tokenizer.bos_token_id]])
        [ids] = generate_ids(model, pixels[None], prompt, MAX_TOKENS, deterministic=True)
        ids = trim(ids, 1, model.config.eos_token_id)[:-1]  # (T,): what the steps read
        expected = next_token_logits(model, model.decode(ids[None], model.encoder_states(pixels[None]))[0])  # (T, V)
        image, past = captioner.encode(photo), None
        for token, row in zip(ids.tolist(), expected.numpy(), strict=True):
            logits, past = captioner.step([[token]], past, image)
            written = np.isfinite(row)  # not the unknown word, which is -inf
            found.logits = max(found.logits, np.abs(logits[0, written] - row[written]).max().item())
            found.largest = max(found.largest, np.abs(row[written]).max().item())
    found.torch_ms, found.onnx_ms = (median(values) for values in times.values())
    return found
