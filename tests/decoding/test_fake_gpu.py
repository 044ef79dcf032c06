"""Everything that a caption needs runs on tensors that say they are on a GPU and hold no values (`FakeTensorMode`): an
operation on tensors of two devices, or of dtypes that do not fit, is an error there without a GPU, too."""

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.decoding import cached_decoder, packed_weights
from captioning.decoding.cached_decoder import CachedDecoder, GraphedDecoder, cuda_graphs_disabled
from captioning.decoding.cuda_graphs import CudaGraphs
from captioning.decoding.search import generate_ids, log_probabilities
from conftest import REDUCED_ENCODERS

aten = torch.ops.aten
OPTIONS = {
    "greedy": dict(deterministic=True),
    "draws": dict(num_return_sequences=3, temperature=0.7, top_k=20, top_p=0.9),
    "penalties": dict(deterministic=True, repetition_penalty=1.5, min_tokens=2, max_words=4),
    "beams": dict(num_beams=4, length_penalty=2.0),
    "early": dict(num_beams=3, early_stopping=True, num_return_sequences=3),
    "never": dict(num_beams=3, early_stopping="never", max_chars=9),
}
BATCH, LENGTH = 5, 7
VALUES = aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default


class Answers(TorchDispatchMode):
    """Answers where a search asks for values: a quarter of the images is finished in every step, never all of them."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten.nonzero.default:  # of a flag for each image
            return self.unfinished(args[0])[:, None]
        if operation is aten.index.Tensor and any(part is not None and part.dtype == torch.bool for part in args[1]):
            return operation(args[0], [self.unfinished(part) for part in args[1]])
        if operation in VALUES:
            return args[0] is self.few_unfinished
        result = operation(*args, **(kwargs or {}))
        if operation is aten.le.Scalar and not result.dim():
            self.few_unfinished = result
        return result

    few_unfinished = None

    @staticmethod
    def unfinished(flags):
        return torch.arange(max(1, len(flags) * 3 // 4), device=flags.device)


def zeros(tensor):
    return np.zeros(tuple(tensor.shape), dtype=float if tensor.is_floating_point() else int).tolist()


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which new tensors are fake; `gpu.move(model)` puts a model there."""
    mode = FakeTensorMode()
    with mode:  # before there seems to be a GPU: PyTorch then does without its driver
        pass

    def fake(tensor):
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    def move(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
            module._buffers = {
                name: buffer if buffer is None else fake(buffer) for name, buffer in module._buffers.items()
            }
        return model

    mode.move = move
    monkeypatch.setattr(FakeTensor, "tolist", zeros)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor))
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(packed_weights, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(CudaGraphs, "capture", lambda graphs, function: function)  # replaying it does it again
    return mode


def caption(model, dtype, images=BATCH, **options):
    pixels = torch.zeros(images, 3, *[model.preprocessing["img_size"]] * 2, dtype=torch.uint8, device="cuda")
    start = torch.full((images, 2), model.config.eos_token_id, device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return generate_ids(model, pixels, start, LENGTH, **options)


@pytest.fixture
def asked(monkeypatch):
    """{(kind of decoder, method)} of what the searches asked decoders for."""
    asked = set()
    for kind in (CachedDecoder, GraphedDecoder):
        for name in ("start", "append", "select", "keep_images"):
            monkeypatch.setattr(kind, name, recording(asked, name, getattr(kind, name)))
    return asked


def recording(asked, name, method):
    def recorded(self, *args):
        asked.add((type(self), name))
        return method(self, *args)

    return recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_captions(tiny_model, bpe, gpu, asked, name, graphs, dtype, monkeypatch):
    monkeypatch.setattr(cached_decoder, "CUDA_GRAPHS", graphs)
    model, options = gpu.move(tiny_model), OPTIONS[name]
    with gpu, Answers():
        for _ in range(3 if graphs else 1):  # run, recorded, replayed
            ids = caption(model, dtype, tokenizer=bpe, **options)
    assert ids.device.type == "cuda"
    assert ids.shape == (BATCH * options.get("num_return_sequences", 1), 2 + LENGTH)
    kind = GraphedDecoder if graphs else CachedDecoder
    assert {(kind, "start"), (kind, "append")} <= asked
    assert ((kind, "select") in asked) or options.get("num_beams", 1) == 1
    assert ((kind, "keep_images") in asked) != graphs
    assert {of for of, _ in asked} == {kind}


# One of each kind: what differs among the others are layers of timm's, which know nothing of devices.
KINDS = ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "resnet10t",
         "swin_tiny_patch4_window7_224", "mixer_s32_224")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in KINDS and "SOAK" not in os.environ, reason="make soak"))
        for name in REDUCED_ENCODERS
    ],
)
def test_captions_with_any_encoder(script, tiny_config, gpu, name):
    tiny_config.encoder, tiny_config.encoder_options = name, REDUCED_ENCODERS[name]
    tiny_config.normalize_tokens = True
    model = gpu.move(script.VisionGPT2Model(tiny_config).eval())
    with gpu, Answers():
        assert caption(model, torch.bfloat16, **OPTIONS["beams"]).shape == (BATCH, 2 + LENGTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_log_probabilities(tiny_model, gpu, dtype):
    model = gpu.move(tiny_model)
    with gpu, torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        pixels = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8, device="cuda")
        ids = torch.zeros(BATCH * 3, 6, dtype=torch.long, device="cuda")
        loss = model.train()(pixels, ids, ids, torch.arange(11, device="cuda"))
        likely = log_probabilities(model, pixels, ids, 2)
        assert model.encoder_states(pixels)[0].dtype == dtype
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
    assert (likely.shape, likely.dtype, likely.device.type) == ((BATCH * 3,), torch.float32, "cuda")


@pytest.mark.parametrize("part", ["gpt.trf_blocks.0.mlp.expand.bias", "gpt.tok_emb.weight", "encoder.vit.cls_token"])
def test_what_is_left_on_the_cpu_is_an_error(tiny_model, gpu, part):
    model = gpu.move(tiny_model)
    owner, name = part.rsplit(".", 1)
    with gpu:
        setattr(model.get_submodule(owner), name, nn.Parameter(torch.zeros(model.get_parameter(part).shape)))
    with gpu, Answers(), cuda_graphs_disabled(), pytest.raises(RuntimeError, match="device"):
        caption(model, torch.float32, deterministic=True)


def test_what_the_search_asks_for_is_on_the_gpu(tiny_model, gpu):
    """As are the ids to start from: a search is not begun on the CPU by mistake."""
    model = gpu.move(tiny_model)
    with gpu, Answers(), cuda_graphs_disabled(), pytest.raises(RuntimeError, match="device"):
        generate_ids(model, torch.zeros(1, 3, 32, 32, device="cuda"), torch.zeros(1, 1, dtype=torch.long), 3)
