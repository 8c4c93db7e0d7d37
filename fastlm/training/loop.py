"""The training loop."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models import GPT2LMHeadModel
from ..tokenizer import GPT2Tokenizer
from . import checkpoint, log
from .config import TrainingConfig
from .data import TokenData, Windows, validation_batches
from .distributed import World
from .memory import keep_freed_memory
from .optimizer import learning_rate, make_optimizer, set_learning_rate
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
        self.device = torch.device(config.device)
        self.model = model.to(self.device)
        self.parallel_model = self.world.wrap(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.windows = Windows(data.train, config.seq_len, config.seed)
        self.step = 0
        self.position = 0  # windows taken, by all processes
        self.seconds = 0.0
        self.baselines: dict[str, float] = {}  # drawn into the plot
        if config.seq_len > model.config.n_positions:
            raise ValueError(
                f"train: seq_len: got {config.seq_len}, accepted is at most the "
                f"model's n_positions = {model.config.n_positions}"
            )

    def restore(self, folder: Path) -> None:
        """Takes up the state that `save` wrote to `folder`; the caller loads the weights."""
        state = checkpoint.load_state(folder)
        if state["tokens"] != len(self.data.train):
            raise ValueError(
                f"train: {folder} was trained on {state['tokens']} tokens, now the text gives "
                f"{len(self.data.train)}: it has changed, so the run cannot go on; start another "
                "with --init-from"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position = state["step"], state["position"]
        self.seconds = state["seconds"]

    def save(self) -> Path:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": self.position,
            "seconds": self.seconds,
            "tokens": len(self.data.train),
        }
        return checkpoint.save(
            self.out_dir, self.step, self.model, self.tokenizer, state, self.config.keep
        )

    def run(self) -> bool:
        """Trains to the last step; False where Ctrl-C stopped it, with a checkpoint written."""
        if self.device.type == "cpu":
            keep_freed_memory()
        records = log.Log(self.out_dir / "log.csv", self.step) if self.world.leads else None
        stopped = False
        with stop_on_signal() as stop, self._bar() as bar:
            losses: list[Tensor] = []
            mark = time.perf_counter(), self.position
            while self.step < self.config.steps and not stopped:
                loss, norm = self.train_step()
                losses.append(loss)
                bar.update()
                stopped = self.world.sum(stop.requested, self.device) > 0
                last = stopped or self.step == self.config.steps
                if self.step % LOG_EVERY == 0 or last or self._due("eval_every"):
                    self._record(bar, records, losses, norm, mark)
                    losses, mark = [], (time.perf_counter(), self.position)
                if self.world.leads and (last or self._due("save_every")):
                    self.save()
        return not stopped

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

    def _record(self, bar, records, losses, norm, mark) -> None:
        """Reads the losses since the last record, and shows and writes what is due."""
        began, position = mark
        train_loss = torch.stack(losses).mean().item()
        elapsed = time.perf_counter() - began
        speed = (self.position - position) * self.config.seq_len / elapsed
        self.seconds += elapsed
        if not self.world.leads:
            return
        validation = self._evaluate_if_due()
        records.write(
            step=self.step,
            tokens=self.position * self.config.seq_len,
            train_loss=f"{train_loss:.6f}",
            validation_loss=validation,
            learning_rate=f"{learning_rate(self.step - 1, self.config):.3e}",
            gradient_norm=f"{norm.item():.4f}",
            tokens_per_second=round(speed),
            seconds=f"{self.seconds:.1f}",
        )
        shown = {"loss": f"{train_loss:.3f}", "tokens/s": f"{speed:,.0f}"}
        bar.set_postfix(shown | ({"val": validation[:5]} if validation else {}))
        if validation and log.can_plot():
            log.plot(self.out_dir / "log.csv", self.out_dir / "loss.png", self.baselines)
        if self._due("sample_every"):
            self._show_sample(bar)

    def _evaluate_if_due(self) -> str:
        due = self._due("eval_every") or self.step == self.config.steps
        if not due or len(self.data.validation) <= self.config.seq_len:
            return ""
        return f"{self.evaluate(self.config.eval_batches):.6f}"

    def _show_sample(self, bar) -> None:
        text = f"--- step {self.step}\n{self.sample()}\n"
        with open(self.out_dir / "samples.txt", "a", encoding="utf-8") as file:
            file.write(text)
        bar.write(text)
