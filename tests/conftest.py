"""Small models, batches and runs that several tests share. No network, no GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the hub would hang where there is none

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanomed.batches import Batch
from nanomed.kernels.linear_cross_entropy import IGNORED


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch_of(documents: list[torch.Tensor], pad_to: int = 0) -> Batch:
    """Token tensors → one batch, written in the slow, obvious way."""
    documents = list(documents)
    if (n_tokens := sum(map(len, documents))) < pad_to:
        documents.append(torch.zeros(pad_to - n_tokens, dtype=torch.int64))
    end = torch.tensor([IGNORED])
    borders = torch.tensor([0] + [len(d) for d in documents]).cumsum(0)
    return Batch(
        tokens=torch.cat(documents),
        labels=torch.cat([torch.cat((d[1:], end)) for d in documents]),
        positions=torch.cat([torch.arange(len(d)) for d in documents]),
        cu_seqlens=torch.cat((borders, borders[-1:].repeat(3))).to(torch.int32),
        max_seqlen=max(map(len, documents)),
        sum_squared_lens=sum(len(d) ** 2 for d in documents),
    )


def save_reference(config, folder, dtype=torch.float32):
    """A transformers model with random weights (norms and biases too) saved to the folder; returns it."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for param in model.parameters():
        torch.nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return model.eval()
