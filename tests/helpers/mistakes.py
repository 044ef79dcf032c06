"""Mistakes that a GPT-2 with the right shapes may hold; a test of equality has to see them."""

from torch import nn

from MyLLM.ch4 import LayerNorm


def swap_norms(gpt):
    for block in gpt.trf_blocks:
        block.ln_1, block.ln_2 = block.ln_2, block.ln_1


def exact_gelu(gpt):
    for block in gpt.trf_blocks:
        block.mlp.activation = nn.GELU()


def wrong_epsilon(gpt):
    for norm in (module for module in gpt.modules() if isinstance(module, LayerNorm)):
        norm.eps = 1e-6


def drop_one_bias(gpt):
    nn.init.zeros_(gpt.trf_blocks[1].mlp.expand.bias)
