"""Text written while it is generated."""

import io

import pytest
import torch

from fastlm.generation import TextStreamer
from fastlm.tokenizer import GPT2Tokenizer


@pytest.mark.parametrize("text", ["plain words", "naïve 🙂🏽 東京", "ends in half \ufffd"])
def test_text_streamer_writes_whole_characters(text):
    tokenizer, written = GPT2Tokenizer(), io.StringIO()
    streamer = TextStreamer(tokenizer, file=written)
    ids = tokenizer.encode(text)
    streamer.put(torch.tensor([ids[:1]]))
    for token in ids[1:]:
        streamer.put(torch.tensor([token]))
        shown = written.getvalue()
        assert text.startswith(shown), f"{shown!r} is not how the text begins"
    streamer.end()
    assert written.getvalue() == text + "\n"


def test_text_streamer_can_skip_the_prompt():
    tokenizer, written = GPT2Tokenizer(), io.StringIO()
    streamer = TextStreamer(tokenizer, skip_prompt=True, file=written, skip_special_tokens=True)
    streamer.put(torch.tensor([[464, 2068]]))
    streamer.put(torch.tensor([7586]))
    streamer.put(torch.tensor([50256]))
    streamer.end()
    assert written.getvalue() == " brown\n"
    with pytest.raises(ValueError, match="batch of 2"):
        streamer.put(torch.ones(2, 3))
