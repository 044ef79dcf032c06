"""Weights packed for decoding give the plain layers' numbers, and are packed anew when they change."""

import pytest
import torch

from captioning.decoding import packed_weights
from captioning.decoding.packed_weights import packed_linears
from captioning.decoding.search import generate_ids


@pytest.fixture(autouse=True)
def worthwhile(monkeypatch):
    monkeypatch.setattr(packed_weights, "MIN_WEIGHTS", 0)


@pytest.fixture
def count_packing(monkeypatch):
    """The modules whose weights are packed, one by one."""
    calls, product = [], packed_weights._packed_linear

    def counted(module, dtype, onednn, fingerprint):
        before = packed_weights._packed.get(module, {}).get(dtype)
        result = product(module, dtype, onednn, fingerprint)
        if packed_weights._packed[module][dtype] is not before:
            calls.append(module)
        return result

    monkeypatch.setattr(packed_weights, "_packed_linear", counted)
    return calls


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def start(tiny_config):
    return torch.full((3, 1), tiny_config.eos_token_id)


def packed_linear(layer, dtype, onednn):
    return packed_weights._packed_linear(layer, dtype, onednn, packed_weights._fingerprints([layer])[0])


def scores(model, images):
    """Of the token that follows two, with packed weights where they are."""
    ids = torch.tensor([[5, 6], [7, 8], [9, 5]])
    with torch.inference_mode():
        states = model.encoder_states(images)
        return model.gpt.logits(model.decode(ids, states)).float()


def test_same_scores_and_captions(tiny_model, images, start, count_packing, monkeypatch):
    """And no trace on the model, also when decoding fails."""
    plain = scores(tiny_model, images)
    before = {name: set(vars(module)) for name, module in tiny_model.named_modules()}
    with pytest.raises(KeyError), packed_linears(tiny_model.gpt):
        assert count_packing
        torch.testing.assert_close(scores(tiny_model, images), plain, atol=1e-5, rtol=1e-5)
        raise KeyError
    assert before == {name: set(vars(module)) for name, module in tiny_model.named_modules()}
    for options in (dict(deterministic=True), dict(num_beams=3), dict(seed=0)):
        fast = generate_ids(tiny_model, images, start, 8, **options)
        with monkeypatch.context() as patch:
            patch.setattr(packed_weights, "MIN_WEIGHTS", 10**9)
            assert torch.equal(fast, generate_ids(tiny_model, images, start, 8, **options))


@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 32), (2, 1, 32), (3, 1, 32), (1, 5, 32)])
def test_a_product_of_any_number_of_rows(tiny_model, shape):
    """Few rows are multiplied as copies of themselves."""
    layer = tiny_model.gpt.trf_blocks[0].mlp.expand
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer(x)
        product, _ = packed_linear(layer, torch.float32, True)
        torch.testing.assert_close(product(x), plain, atol=1e-5, rtol=1e-5)
        half, _ = packed_linear(layer, torch.bfloat16, True)
        torch.testing.assert_close(half(x), plain, atol=5e-2, rtol=5e-2)


def test_small_decoders_are_not_packed(tiny_model, images, start, count_packing, monkeypatch):
    monkeypatch.setattr(packed_weights, "MIN_WEIGHTS", 10**9)
    generate_ids(tiny_model, images, start, 3)
    assert not count_packing


def test_packed_once_until_weights_change(tiny_model, images, start, count_packing):
    layers = [m for m in tiny_model.gpt.trf_blocks.modules() if isinstance(m, torch.nn.Linear)]
    for _ in range(2):
        generate_ids(tiny_model, images, start, 3, deterministic=True)
    assert len(count_packing) == len(layers) + 1  # the head
    count_packing.clear()
    optimizer = torch.optim.AdamW([layers[0].weight, layers[1].bias], lr=0.1, fused=True)
    for p in (layers[0].weight, layers[1].bias):
        p.grad = torch.ones_like(p)
    optimizer.step()
    tiny_model.gpt.load_state_dict({"tok_emb.weight": tiny_model.gpt.tok_emb.weight * 2}, strict=False)
    layers[2].weight = torch.nn.Parameter(layers[2].weight.detach().clone())
    plain = scores(tiny_model, images)
    with packed_linears(tiny_model.gpt):
        torch.testing.assert_close(scores(tiny_model, images), plain, atol=1e-5, rtol=1e-5)
    assert count_packing == [tiny_model.gpt.tok_emb, *layers[:3]]


def test_bf16(tiny_model, images, start, count_packing):
    """Under autocast the layers multiply in bf16; scores come in float32 and differ little from those of autocast."""
    exact = scores(tiny_model, images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = scores(tiny_model, images)
        with packed_linears(tiny_model.gpt):
            fast = scores(tiny_model, images)
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        ids = generate_ids(tiny_model, images, start, 8, deterministic=True)
    assert fast.dtype == torch.float32
    assert 0 < (fast - exact).abs().max() <= (rough - exact).abs().max()
    assert ids.shape == (3, 9)
    with packed_linears(tiny_model.gpt):  # bf16 and float32 are kept side by side
        torch.testing.assert_close(scores(tiny_model, images), exact, atol=1e-5, rtol=1e-5)


def test_casts_never_lie_on_a_parameter():
    """They are written over when weights change; a parameter that was replaced may still be somebody's."""
    layer = torch.nn.Linear(4, 3)
    layer.bias = replaced = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    packed_linear(layer, torch.bfloat16, False)
    layer.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    product, casts = packed_linear(layer, torch.bfloat16, False)
    assert replaced.tolist() == [1, 1, 1]
    assert casts[1].tolist() == [0, 0, 0]
    assert torch.equal(product(torch.zeros(1, 4, dtype=torch.bfloat16)), casts[1][None])


def test_autocast_without_onednn(tiny_model, images, count_packing, monkeypatch):
    """As on a GPU: cast once, and autocast stays on; float32 is as it was."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with packed_linears(tiny_model.gpt):
        assert not count_packing
    with torch.autocast("cpu", torch.bfloat16):
        rough = scores(tiny_model, images)
        with packed_linears(tiny_model.gpt):
            assert torch.is_autocast_enabled("cpu")
            torch.testing.assert_close(scores(tiny_model, images), rough, atol=2e-2, rtol=2e-2)
    assert count_packing


@pytest.mark.parametrize("autocast", [False, True])
def test_all_weights_are_looked_at_with_one_read(tiny_model, monkeypatch, autocast):
    """On a GPU every read of values waits for it."""
    reads = []
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: not autocast)
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, read=read: reads.append(read) or read(self, *args))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):  # packs, then finds that nothing has changed
            reads.clear()
            with packed_linears(tiny_model.gpt):
                assert len(reads) == 1


def test_every_layer_has_the_sample_of_its_own_weights(tiny_model):
    layers = [m for m in tiny_model.gpt.trf_blocks.modules() if isinstance(m, torch.nn.Linear)]
    together = packed_weights._fingerprints(layers)
    assert together == [packed_weights._fingerprints([layer])[0] for layer in layers]
    for layer, (weight, bias) in zip(layers, together, strict=True):
        assert weight[2][0] == layer.weight[0, 0].item()
        assert bias[2][0] == layer.bias[0].item()
