"""One token of every row after the other on one cache, from the second on replayed."""

from torch import Tensor

from ..replay import NotReplayable, Replay
from .cache import KVCache


class Steps:
    """Logits after one more token of each row.

    The first token runs the model's layers and records them (see `replay.Replay`); the others run
    the recorded kernels, which saves a third of the time of a small model on a CPU. What cannot be
    recorded, a model with hooks, and other devices run the model as it is.
    """

    def __init__(self, model, cache: KVCache):
        self.model, self.cache = model, cache
        self.replay: Replay | None = None
        self.recordable = model.device.type == "cpu" and not _is_watched(model)

    def logits(self, tokens: Tensor) -> Tensor:
        """(R, 1, V) after tokens (R, 1)."""
        if not self.recordable:
            return self.model(tokens, past_key_values=self.cache, return_dict=True).logits
        trunk = self.model.transformer
        embedded = trunk.wte(tokens) + trunk.wpe(self.cache.lengths[:, None])
        if self.replay is None:
            self.cache.make_room(1)
            self.input, self.memory = embedded, self.cache.keys[0]
            try:
                self.replay = Replay(self._layers, embedded)
            except NotReplayable:
                # What it wrote into the cache is written again.
                self.recordable = False
                return self.logits(tokens)
            logits = self.replay.result
        else:
            self.input.copy_(embedded)
            logits = self.replay.run()
        self.cache.advance(1)
        return logits.clone()  # the next step writes over it

    def fits(self, cache: KVCache | None) -> bool:
        """Whether these are still the steps of `cache`."""
        if cache is not self.cache:
            return False
        moved = self.replay is not None and cache.keys[0] is not self.memory
        return not moved and (self.replay is None or cache.longest < cache.capacity)

    def _layers(self, x: Tensor) -> Tensor:
        states, _, _ = self.model.transformer.run_layers(x, self.cache)
        return self.model.lm_head(states)


def _is_watched(model) -> bool:
    """Whether Python looks at, or replaces, what runs inside."""
    return "forward" in vars(model) or any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )
