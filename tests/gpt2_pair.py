"""A GPT-2 of ours and transformers' with the same random weights."""

import torch
import transformers

from fastlm.models import GPT2Config, GPT2LMHeadModel

SHAPE = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
END = 7
DEEPER = {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 3}


def pair(shape=SHAPE, seed=0, scale=0.3, **settings):
    """(ours, theirs), with weights large enough that the likeliest token changes at every step."""
    torch.manual_seed(seed)
    settings = {**shape, "bos_token_id": END, "eos_token_id": END, **settings}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    ours = GPT2LMHeadModel(GPT2Config(**settings))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def prompts(batch=4, length=12, seed=1, vocab=SHAPE["vocab_size"]):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=generator)


def left_mask(*lengths, width=12):
    return torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
