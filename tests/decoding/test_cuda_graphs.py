"""Decoding by CUDA graphs gives the captions of the plain decoder. Where there is no GPU, `Tape` stands in for one."""

import gc
import warnings
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioning.decoding import cached_decoder, cuda_graphs, packed_weights
from captioning.decoding.cached_decoder import GraphedDecoder, cuda_graphs_disabled, decoder_for
from captioning.decoding.cuda_graphs import CudaGraphs
from captioning.decoding.search import generate_ids
from conftest import REDUCED_ENCODERS, randomize

OPTIONS = {
    "greedy": dict(deterministic=True),
    "beams": dict(num_beams=4),
    "early": dict(num_beams=3, early_stopping=True, num_return_sequences=3),
    "draws": dict(seed=1, num_return_sequences=3, top_k=20),
    "penalty": dict(deterministic=True, repetition_penalty=1.5),
}


WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # for a tensor's values
RANDOM = {getattr(torch.ops.aten, name) for name in ("rand", "multinomial", "bernoulli", "bernoulli_", "dropout")}


class Tape(TorchDispatchMode):
    """Records the operations of a function and repeats them as a CUDA graph does: the same ones, with the same numbers
    and shapes, on the same memory. Recording does none of them. It refuses operations that ask what a tensor holds or
    draw numbers; it does not see what goes around PyTorch's operations, like `tolist`."""

    def __init__(self):
        super().__init__()
        self.operations, self.written = [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # Indexing with numbers makes a shape that is known, with a mask it does not.
        indexing = operation is torch.ops.aten.index.Tensor and all(leaf.dtype != torch.bool for leaf in given[1:])
        waits = (WAITING & set(operation.tags) or operation is torch.ops.aten.item.default) and not indexing
        draws = operation.overloadpacket in RANDOM and args[-1] is not False  # dropout that is off
        if waits or draws:
            raise RuntimeError(f"{operation} is not permitted when stream is capturing")
        if operation._schema.is_mutable:
            for tensor in given:
                self.written.setdefault(id(tensor), (tensor, tensor.clone()))
        made = operation(*args, **(kwargs or {}))
        memory = {tensor.untyped_storage()._cdata for tensor in given}
        new = [
            out
            for out in tree_leaves(made)
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in memory
        ]
        if new or operation._schema.is_mutable:  # else a view, which lies where it lay
            self.operations.append((operation, args, kwargs or {}, made, bool(new)))
        return made

    def undo(self):
        for tensor, before in reversed(self.written.values()):
            tensor.copy_(before)

    def replay(self):
        for operation, args, kwargs, made, is_new in self.operations:
            again = operation(*args, **kwargs)
            if is_new:
                for place, value in zip(tree_leaves(made), tree_leaves(again), strict=True):
                    if isinstance(place, torch.Tensor):
                        place.copy_(value)


def record(graphs, function):
    tape = Tape()
    try:
        with tape:
            function()
    finally:
        tape.undo()
    return tape.replay


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(cached_decoder, "CUDA_GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(CudaGraphs, "capture", record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where something cannot be recorded
        yield


@pytest.fixture
def ending(tiny_model, tiny_config):
    """The tiny model, changed so that captions end at different lengths."""
    with torch.no_grad():
        tiny_model.gpt.tok_emb.weight[tiny_config.eos_token_id] *= 3
    return tiny_model


def photos(seed, count=5):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def starts(model, images, tokens=1):
    return torch.full((len(images), tokens), model.config.eos_token_id)


def plainly(*args, **options):
    """What `generate_ids` gives without graphs, with every image in its batch to the end as with them."""
    with pytest.MonkeyPatch.context() as patch, cuda_graphs_disabled():
        patch.setattr("captioning.decoding.search.SHRINK_BELOW", 0)
        return generate_ids(*args, **options)


def count_decoding(monkeypatch, model):
    """-> a list that gets an entry for each time that Python goes through the decoder."""
    calls, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda *args: calls.append(None) or decode(*args))
    return calls


def test_the_tape_repeats_what_was_recorded_on_the_same_memory():
    x, y, factor = torch.ones(3), torch.zeros(3), 2

    def double():
        y.copy_(torch.cat([x[1:] * factor, x[:1]]))
        y.add_(torch.arange(3))

    replay = record(None, double)
    assert y.tolist() == [0, 0, 0]  # nothing happened yet
    x.fill_(5)
    factor = 100
    replay()
    assert y.tolist() == [10, 11, 7]


@pytest.mark.parametrize("inference", [False, True])
def test_the_tape_refuses_what_a_recording_cannot_do(inference):
    x = torch.arange(3.0)
    refused = [
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        lambda: torch.rand(3),
        lambda: F.dropout(x, 0.5),
    ]
    with torch.inference_mode(inference):
        for function in refused:
            with pytest.raises(RuntimeError, match="capturing"):
                record(None, function)
        record(None, lambda: x[torch.tensor([0, 2])])


@pytest.mark.parametrize("name", OPTIONS)
def test_captions_are_the_plain_decoders(ending, name, graphs_on_cpu, monkeypatch):
    """Batch after batch; from the third on Python does not go through the decoder any more."""
    options, found = OPTIONS[name], set()
    for batch in range(4):
        images = photos(batch)
        start = starts(ending, images)
        expected = plainly(ending, images, start, 9, **options)
        with monkeypatch.context() as patch:
            calls = count_decoding(patch, ending)
            ids = generate_ids(ending, images, start, 9, **options)
        assert torch.equal(ids, expected)
        assert bool(calls) == (batch < 2) or ids.size(1) > 8  # a longer caption than those before is new
        found.update(map(tuple, ids.tolist()))
    assert len(found) > 6


@pytest.mark.parametrize("name", REDUCED_ENCODERS)
def test_any_encoder(script, tiny_config, name, graphs_on_cpu):
    tiny_config.encoder, tiny_config.encoder_options = name, REDUCED_ENCODERS[name]
    tiny_config.normalize_tokens = True
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model.gpt)
    randomize(model.bridges)
    size = model.preprocessing["img_size"]
    for batch in range(3):
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(batch))
        start = starts(model, images)
        expected = plainly(model, images, start, 6, num_beams=2)
        assert torch.equal(generate_ids(model, images, start, 6, num_beams=2), expected)


def test_prompts_of_several_lengths_share_a_decoder(ending, graphs_on_cpu):
    generator = torch.Generator().manual_seed(0)
    for length in (1, 4, 2, 4, 1, 2, 4):
        images = photos(length)
        prompts = torch.randint(0, 40, (len(images), length), generator=generator)
        ids = generate_ids(ending, images, prompts, 8, deterministic=True)
        assert torch.equal(ids, plainly(ending, images, prompts, 8, deterministic=True))
    assert len(cached_decoder._kept_decoders[ending]) == 1


def test_one_model_is_asked_in_many_ways(ending, graphs_on_cpu, monkeypatch):
    """Decoders of all kinds, for one model: none is given to another kind of batch."""
    monkeypatch.setattr(cached_decoder, "MAX_KEPT_DECODERS", 100)
    images = photos(0)

    def ask(max_tokens, options, count=5):
        start = starts(ending, range(count))
        ids = generate_ids(ending, images[:count], start, max_tokens, **options)
        assert torch.equal(ids, plainly(ending, images[:count], start, max_tokens, **options))

    for _ in range(3):
        for options in OPTIONS.values():
            ask(6, options)
        ask(20, OPTIONS["greedy"])  # more room
        ask(6, OPTIONS["greedy"], count=2)
        with torch.autocast("cpu", torch.bfloat16):
            ask(6, OPTIONS["greedy"])
        likeliest = generate_ids(ending, images, starts(ending, images), 1, deterministic=True)[0, 1].item()
        with monkeypatch.context() as patch:
            patch.setattr(ending.config, "unk_token_id", likeliest)
            ask(6, OPTIONS["greedy"])
    kinds = [kind for kind, _ in cached_decoder._kept_decoders[ending]]
    assert len(kinds) == 3 + 4  # 1, 3 or 4 rows an image; more room, fewer images, autocast, another unknown word
    assert len({id(decoder) for _, decoder in cached_decoder._kept_decoders[ending]}) == len(kinds)


def test_weights_that_change_are_seen(ending, graphs_on_cpu):
    """In place the graphs stay right; a weight that lies elsewhere gets new ones."""
    images = photos(0)
    start = starts(ending, images)

    def check():
        ids = generate_ids(ending, images, start, 8, deterministic=True)
        assert torch.equal(ids, plainly(ending, images, start, 8, deterministic=True))
        return ids.tolist(), cached_decoder._kept_decoders[ending][-1][1]

    for _ in range(3):
        before, decoder = check()
    with torch.no_grad():
        randomize(ending.gpt)
    changed, same_decoder = check()
    assert changed != before
    assert same_decoder is decoder
    layer = ending.gpt.trf_blocks[0].mlp.expand
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    replaced, new_decoder = check()
    assert replaced != changed
    assert new_decoder is not decoder


def test_autocast_and_training_between_captions(ending, graphs_on_cpu, monkeypatch):
    """As self-critical training does on a GPU: weights are cast once a step, to where the graphs read them."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(packed_weights, "MIN_WEIGHTS", 0)
    optimizer = torch.optim.SGD(ending.gpt.parameters(), lr=0.5)
    images, decoders, seen = photos(0), set(), set()
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            ids = generate_ids(ending, images, starts(ending, images), 8, deterministic=True)
            expected = plainly(ending, images, starts(ending, images), 8, deterministic=True)
        assert torch.equal(ids, expected)
        for layer in (ending.gpt.trf_blocks[0].mlp.expand, ending.gpt.trf_blocks[1].cross_attn.c_proj):
            _, _, casts = packed_weights._packed[layer][torch.bfloat16]
            assert torch.equal(casts[0], layer.weight.bfloat16()) and torch.equal(casts[1], layer.bias.bfloat16())
        decoders.add(id(cached_decoder._kept_decoders[ending][-1][1]))
        seen.add(str(ids.tolist()))
        ending(images, ids.clone(), ids.clone()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(decoders) == 1
    assert len(seen) > 1
    # Without autocast the same model multiplies in float32: other graphs.
    ids = generate_ids(ending, images, starts(ending, images), 8, deterministic=True)
    assert torch.equal(ids, plainly(ending, images, starts(ending, images), 8, deterministic=True))
    assert len(cached_decoder._kept_decoders[ending]) == 2


def test_few_decoders_are_kept_and_none_keeps_its_model(script, tiny_config, graphs_on_cpu):
    model = script.VisionGPT2Model(tiny_config).eval()
    for count in (1, 2, 3, 2):
        generate_ids(model, photos(0, count), starts(model, range(count)), 4, deterministic=True)
    kept = [decoder for _, decoder in cached_decoder._kept_decoders[model]]
    assert [len(decoder.prompts) for decoder in kept] == [3, 2]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_decoder_in_use_is_not_given_twice(tiny_model, graphs_on_cpu):
    with torch.inference_mode():
        states = tiny_model.encoder_states(photos(0))
        with decoder_for(tiny_model, states, 1, 9, []) as first:
            assert isinstance(first, GraphedDecoder)
            with decoder_for(tiny_model, states, 1, 9, []) as second:
                assert second is not first
        with pytest.raises(KeyError), decoder_for(tiny_model, states, 1, 9, []) as third:
            assert third is first  # kept last
            raise KeyError
        with decoder_for(tiny_model, states, 1, 9, []) as fourth:
            assert fourth is second  # what failed half-way is not used again


def test_other_arithmetic_is_another_decoder(tiny_model, graphs_on_cpu, monkeypatch):
    """Also where the tokens of the images are of one dtype, as those of a ViT as wide as the decoder."""
    monkeypatch.setattr(cached_decoder, "MAX_KEPT_DECODERS", 100)
    with torch.inference_mode():
        states, decoders = tiny_model.encoder_states(photos(0)), []
        for autocast, weights in ((False, []), (True, []), (True, [7]), (True, [8]), (True, [7])):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                decoder_for(tiny_model, states, 1, 9, weights) as decoder,
            ):
                decoders.append(decoder)
    assert decoders[4] is decoders[2]
    assert len(set(decoders)) == 4


def test_without_graphs_where_there_are_none_or_they_are_not_wanted(tiny_model, graphs_on_cpu, monkeypatch):
    images = photos(0)
    with pytest.raises(KeyError), cuda_graphs_disabled():
        generate_ids(tiny_model, images, starts(tiny_model, images), 4)
        raise KeyError
    assert cached_decoder.CUDA_GRAPHS
    monkeypatch.setattr(cached_decoder, "CUDA_GRAPH_DEVICES", ("cuda",))
    generate_ids(tiny_model, images, starts(tiny_model, images), 4)
    assert tiny_model not in cached_decoder._kept_decoders


def test_what_cannot_be_recorded_is_run(ending, graphs_on_cpu, monkeypatch):
    """With one warning, and the right captions."""
    decode = ending.decode
    monkeypatch.setattr(ending, "decode", lambda ids, *rest: ids.sum().item() * 0 + decode(ids, *rest))
    images = photos(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ids = generate_ids(ending, images, starts(ending, images), 8, num_beams=3)
            assert torch.equal(ids, plainly(ending, images, starts(ending, images), 8, num_beams=3))
    said = [str(warning.message) for warning in caught if "CUDA graphs" in str(warning.message)]
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]


class PytorchGraphs:
    """Stands in for PyTorch's part: `done` lists what it was asked, in order. A capture in which something failed ends
    with an error of its own."""

    def __init__(self, monkeypatch):
        self.done, self.current, self.failing = done, current, failing = [], ["default"], []
        self.free = 50  # of 100 bytes

        class Graph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                done.append(("begin", pool, capture_error_mode, current[-1]))

            def capture_end(self):
                done.append("end")
                if failing:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                done.append("replay")

        @contextmanager
        def stream(name):
            current.append(name)
            try:
                yield
            finally:
                current.pop()

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter("abc").__next__)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 100))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: done.append("wait"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)


@pytest.fixture
def pytorch_graphs(monkeypatch):
    cuda_graphs._capture_stream.cache_clear()
    yield PytorchGraphs(monkeypatch)
    cuda_graphs._capture_stream.cache_clear()


def test_what_is_asked_of_pytorch(pytorch_graphs):
    """One pool for all recordings of a decoder, one stream for all of a device, other threads are let be, and autocast
    keeps nothing. The allocator is emptied only where memory is short, and nothing waits for the device."""
    done, device = pytorch_graphs.done, torch.device("cpu", 1)
    first, second = CudaGraphs(device), CudaGraphs(device)

    def function():
        done.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    def asked_by(graphs, key):
        done.clear()
        graphs.run(key, function)
        assert pytorch_graphs.current == ["default"]
        return list(done)

    plain, recorded = (True, True), (True, False)
    begin_a, begin_b = (("begin", pool, "thread_local", "stream of cpu:1") for pool in "ab")
    with torch.autocast("cpu", torch.bfloat16):
        assert [asked_by(first, key) for key in (1, 2)] == [[plain], [plain]]  # run first
        assert asked_by(first, 1) == [begin_a, recorded, "end", "replay"]
        assert asked_by(first, 2) == [begin_a, recorded, "end", "replay"]
        assert asked_by(first, 1) == ["replay"]
        assert asked_by(second, 1) == [plain]
        assert torch.is_autocast_cache_enabled()
    pytorch_graphs.free = 5
    assert asked_by(second, 1) == ["empty", begin_b, (False, True), "end", "replay"]  # off stays off


@pytest.mark.parametrize("in_pytorch", [False, True])
def test_what_failed_in_a_recording_is_said(pytorch_graphs, in_pytorch):
    """Its end only says that something did. The recording is ended, and the work is done without it."""
    pytorch_graphs.failing += [True] * in_pytorch
    graphs = CudaGraphs(torch.device("cpu", 1))
    graphs.run(1, lambda: None)
    pytorch_graphs.done.clear()
    function = failing_once()
    with pytest.warns(UserWarning, match="without CUDA graphs, more slowly: no such kernel"):
        graphs.run(1, function)
    assert pytorch_graphs.done[-1] == "end"
    assert pytorch_graphs.current == ["default"]
    assert len(function.calls) == 2
    pytorch_graphs.done.clear()
    graphs.run(1, lambda: pytorch_graphs.done.append("eager"))
    assert pytorch_graphs.done == ["eager"]


def failing_once():
    """A function that fails the first time, as one that cannot be recorded does."""

    def function():
        function.calls.append(None)
        if len(function.calls) == 1:
            raise RuntimeError("no such kernel")

    function.calls = []
    return function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_on_a_gpu(ending, name, dtype):
    model = ending.to("cuda", dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(4):
            images = photos(batch).to("cuda", dtype)
            start = starts(model, images).cuda()
            ids = generate_ids(model, images, start, 9, **OPTIONS[name])
            assert torch.equal(ids, plainly(model, images, start, 9, **OPTIONS[name]))
    assert all(cached_decoder._kept_decoders[model][0][1].graphs.replays.values())
