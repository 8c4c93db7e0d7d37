"""Text written while it is generated."""

import io
from queue import Empty
from threading import Thread

import pytest
import torch

from fastlm.generation import TextIteratorStreamer, TextStreamer
from fastlm.models import GPT2Config, GPT2LMHeadModel
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


def test_text_iterator_streamer_hands_text_to_another_thread():
    tokenizer = GPT2Tokenizer()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64))
    prompt = tokenizer.encode("naïve 🙂", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    expected = model.generate(prompt, **options)[0]
    for skip_prompt, start in ((False, 0), (True, prompt.shape[1])):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt, timeout=60)
        thread = Thread(
            target=model.generate, args=[prompt], kwargs={**options, "streamer": streamer}
        )
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert len(pieces) > 3 and "".join(pieces) == tokenizer.decode(expected[start:])
    with pytest.raises(Empty):
        next(iter(TextIteratorStreamer(tokenizer, timeout=0.01)))
