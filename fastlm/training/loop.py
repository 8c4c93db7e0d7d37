"""The training loop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..devices import find_device
from ..models import GPT2LMHeadModel
from ..tokenizer import GPT2Tokenizer
from . import checkpoint, lock, log
from .config import TrainingConfig
from .data import TokenData, Windows, validation_batches
from .distributed import World
from .finite import diverged, first_not_finite, read_recent
from .memory import keep_freed_memory
from .optimizer import learning_rate, load_moments, make_optimizer, set_learning_rate
from .signals import stop_on_signal

LOG_EVERY = 10  # steps; reading a loss waits for the device
SAMPLE_TOKENS = 80


class Trainer:
    """A run: `model` trained on `data` as `config` says, with its files under `out_dir`.

    Writes log.csv, loss.png, samples.txt and checkpoints/. Two runs with the same arguments give
    the same bits, also when one of them was stopped and restored on the way: the data's order
    follows from the position, and torch's generator is seeded anew at every step.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        tokenizer: GPT2Tokenizer,
        data: TokenData,
        config: TrainingConfig,
        out_dir: Path,
        world: World | None = None,
    ):
        self.config, self.tokenizer, self.data, self.out_dir = config, tokenizer, data, out_dir
        self.world = world or World()
        self.device = find_device(config.device, "train")
        self.model = model.to(self.device)
        self.parallel_model = self.world.wrap(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.windows = Windows(data.train, config.seq_len, config.seed)
        self.step = 0
        self.position = 0  # windows taken, by all processes
        self.seconds = 0.0  # of training, without evaluations, samples and checkpoints
        # Loss and gradient norm, (2,), of each step since the last row of the log.
        self.recent: list[Tensor] = []
        self.log, self.samples = log.Log(out_dir / log.LOG), log.Samples(out_dir / log.SAMPLES)
        self.baselines: dict[str, float] = {}  # drawn into the plot
        if config.seq_len > model.config.n_positions:
            raise ValueError(
                f"train: seq_len: got {config.seq_len}, accepted is at most the "
                f"model's n_positions = {model.config.n_positions}"
            )

    def restore(self, folder: Path) -> None:
        """Takes up the state that `save` wrote to `folder`; the caller loads the weights."""
        state = checkpoint.load_state(folder)
        tokens, text = len(self.data.train), self.data.text
        if state["tokens"] != tokens or (text and state["text"] not in ("", text)):
            raise ValueError(
                f"train: data: expected the text that {folder} was trained on, "
                f"{state['tokens']} tokens, got other text, {tokens} tokens: it has changed, so "
                "the run cannot go on; start another with --init-from"
            )
        if state["step"] > self.config.steps:
            raise ValueError(
                f"train: steps: expected at least {state['step']}, which {folder} has done, got "
                f"{self.config.steps}"
            )
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        ordered = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        load_moments(self.optimizer, ordered, state["optimizer"], str(folder / checkpoint.STATE))
        self.step, self.position = state["step"], state["position"]
        self.seconds, self.samples.size = state["seconds"], state["samples"]
        self.recent = list(state["recent"].to(self.device))

    def save(self) -> Path:
        """Writes a checkpoint; FloatingPointError, and none, where a number is not finite."""
        recent = read_recent(self.recent, self.step, self.out_dir)
        optimizer = self.optimizer.state_dict()
        tensors = dict(self.model.state_dict())
        for number, entries in optimizer["state"].items():
            tensors |= {f"{name} of parameter {number}": entries[name] for name in entries}
        wrong = first_not_finite(tensors)
        if wrong is not None:
            raise diverged(f"{wrong} holds inf or nan", self.step, self.out_dir)
        state = {
            "optimizer": optimizer,
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "tokens": len(self.data.train),
            "text": self.data.text,
            "recent": recent,
            "samples": self.samples.size,
        }
        return checkpoint.save(
            self.out_dir, self.step, self.model, self.tokenizer, state, self.config.keep
        )

    def run(self) -> bool:
        """Trains to the last step; False where Ctrl-C stopped it, with a checkpoint written.

        Raises FloatingPointError for a loss, gradient or weight that is not finite, OSError for a
        file that cannot be written, and ValueError where another process trains in the folder.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        with self._alone(), stop_on_signal() as stop, self._bar() as bar:
            if self.world.leads:
                self.log.begin(self.step)
                self.samples.begin()
            stopped = False
            self._row_began = self.seconds, self.position
            if self.recent and self._records():  # the row that a full disk did not take
                self._record(bar, read_recent(self.recent, self.step, self.out_dir))
            self._clock = time.perf_counter()
            while self.step < self.config.steps and not stopped:
                loss, norm = self.train_step()
                self.recent.append(torch.stack([loss, norm]))
                bar.update()
                stopped = self.world.sum(stop.requested, self.device) > 0
                self._after_step(bar, stopped)
        return not stopped

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.world.leads:
            lock.hold(self.out_dir)
        try:
            yield
        finally:
            lock.release(self.out_dir)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step; (loss, gradient norm) as tensors, not yet waited for."""
        self.model.train()
        self._seed()
        batches, counted = self._batches()
        # The mean over the step's tokens, however they fall into passes and processes. DDP averages
        # gradients over processes, which the factor world.size undoes.
        items = self.world.sum(counted, self.device) / self.world.size
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(batches):
            last = number + 1 == len(batches)
            with self.world.exchange(self.parallel_model, last), self._autocast():
                loss = self.parallel_model(
                    inputs, shift_labels=targets, num_items_in_batch=items
                ).loss
                loss.backward()
            total += loss.detach()
        norm = self._clip()
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    @torch.no_grad()
    def evaluate(self, batches: int | None = None) -> float:
        """Mean loss per token over `batches` validation batches, or over all validation tokens."""
        self.model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for inputs, targets in validation_batches(
            self.data.validation, self.config.seq_len, self.config.batch_size, batches
        ):
            with self._autocast():
                loss = self.model(
                    inputs.to(self.device),
                    shift_labels=targets.to(self.device),
                    num_items_in_batch=1,
                ).loss
            total, count = total + loss, count + targets.numel()
        return float(total) / count if count else float("nan")

    def sample(self, tokens: int = SAMPLE_TOKENS) -> str:
        """A continuation of config.sample_prompt, from the same draws each time, to compare."""
        room = self.model.config.n_positions
        prompt = self.tokenizer.encode(self.config.sample_prompt)[: room - 1]
        ids = torch.tensor([prompt or [self.tokenizer.bos_token_id]], device=self.device)
        tokens = min(tokens, room - ids.shape[1])
        output = self.model.generate(
            ids, max_new_tokens=tokens, do_sample=True, temperature=0.8, seed=self.config.seed
        )
        return self.tokenizer.decode(output[0], skip_special_tokens=True)

    def _batches(self) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """This process's share of a step, on the device, and how many targets it has."""
        size, batches, counted = self.config.batch_size, [], 0
        for _ in range(self.config.accumulate):
            first = self.position + self.world.rank * size
            inputs, targets = self.windows.batch(first, size)
            counted += int((targets != -100).sum())
            batches.append((inputs.to(self.device), targets.to(self.device)))
            self.position += size * self.world.size
        return batches, counted

    def _seed(self) -> None:
        """Dropout's masks follow from the run's seed, the step and the process."""
        entropy = np.random.SeedSequence([self.config.seed, self.step, self.world.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _autocast(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        )

    def _clip(self) -> Tensor:
        limit = self.config.clip or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _due(self, setting: str) -> bool:
        every = getattr(self.config, setting)
        return every > 0 and self.step % every == 0

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.world.leads,
            dynamic_ncols=True,
        )

    def _records(self) -> bool:
        """Whether the log has a row for this step; it has the same ones however a run is cut."""
        last = self.step == self.config.steps
        return last or self.step % LOG_EVERY == 0 or self._due("eval_every")

    def _after_step(self, bar, stopped: bool) -> None:
        """Reads the losses, and shows and writes what is due."""
        record, sample = self._records(), self._due("sample_every")
        save = stopped or self.step == self.config.steps or self._due("save_every")
        if not (record or sample or save):
            return
        recent = read_recent(self.recent, self.step, self.out_dir)
        self.seconds += time.perf_counter() - self._clock
        with checkpoint.saved_if_writing_fails(self.save, self.out_dir):
            if record:
                self._record(bar, recent)
            if sample and self.world.leads:
                bar.write(self.samples.write(self.step, self.sample()))
        if save and self.world.leads:
            self.save()
        self._clock = time.perf_counter()

    def _record(self, bar, recent: Tensor) -> None:
        """Adds a row to the log, and draws the plot where there is a new validation loss."""
        seconds, position = self._row_began
        elapsed, windows = self.seconds - seconds, self.position - position
        speed = windows * self.config.seq_len / elapsed if elapsed else 0.0
        validation = self._evaluate_if_due() if self.world.leads else ""
        train_loss, norm = recent[:, 0].mean().item(), recent[-1, 1].item()
        if self.world.leads:
            self.log.write(
                step=self.step,
                tokens=self.position * self.config.seq_len,
                train_loss=f"{train_loss:.6f}",
                validation_loss=validation,
                learning_rate=f"{learning_rate(self.step - 1, self.config):.3e}",
                gradient_norm=f"{norm:.4f}",
                tokens_per_second=round(speed),
                seconds=f"{self.seconds:.1f}",
            )
        self.recent, self._row_began = [], (self.seconds, self.position)
        shown = {"loss": f"{train_loss:.3f}", "tokens/s": f"{speed:,.0f}"}
        bar.set_postfix(shown | ({"val": validation[:5]} if validation else {}))
        if validation and log.can_plot():
            log.plot(self.log.path, self.out_dir / log.PLOT, self.baselines)

    def _evaluate_if_due(self) -> str:
        due = self._due("eval_every") or self.step == self.config.steps
        if not due or len(self.data.validation) <= self.config.seq_len:
            return ""
        loss = self.evaluate(self.config.eval_batches)
        if not math.isfinite(loss):
            raise diverged(f"the validation loss is {loss}", self.step, self.out_dir)
        return f"{loss:.6f}"
