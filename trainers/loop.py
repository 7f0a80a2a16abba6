"""The only training loop: step or minute budget, EMA, checkpoints that resume to the same weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreamenv import checkpoints
from dreamenv.artifacts import only_writer, present, read_json
from dreamenv.config import check
from dreamenv.contract.noise import philox
from dreamenv.device import pick_device, pick_precision
from dreamenv.errors import CheckpointError
from dreamenv.models.io import save_model
from trainers.batch import Batch
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.graphs import Recorded
from trainers.log import Log, write_run
from trainers.optimizer import make_optimizer
from trainers.prefetch import pick_workers, prefetch
from trainers.tasks.interface import Renewing, Task


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to optimise."""

    steps: int | None = 10000
    """Optimiser steps; None when `minutes` decides."""
    minutes: float | None = None
    """Budget of time spent in training steps and in what a task makes anew for them (validation and saving come on
    top); it wins over `steps`. The schedules follow the fraction done."""
    batch_size: int = 64
    """Samples a step, per process."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (Loshchilov & Hutter 2019) for all weights, or muon for convolutions' kernels and AdamW for the rest, see
    `trainers.optimizer`. Auxiliary networks have AdamW."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    """cosine: a linear warm-up, then a cosine to `final_lr` * lr. one_cycle: PyTorch's OneCycleLR with its defaults
    (Smith & Topin 2019), which cycles AdamW's momentum too."""
    warmup: float = 0.02
    """Fraction of the budget that warms up, of the cosine."""
    final_lr: float = 0.01
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and kernels only; 0 makes AdamW Adam."""
    grad_clip: float = 1.0
    """Limit of the gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved; ramped up as (1 + step) / (10 + step)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA and on CPUs with instructions for it, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    workers: int | None = None
    """Processes that draw batches ahead of time, which changes no batch; None: on CUDA one a spare core, up to 8, else
    none."""
    cuda_graphs: bool = True
    """On CUDA, record a step once and replay it (CUDA graphs): small networks wait for Python otherwise. Tasks whose
    steps differ, and training in several processes, go without."""
    seed: int = 0
    """Decides initial weights, samples and noise."""
    log_every: int = 50
    """Steps between rows of metrics.csv."""
    val_every: int = 2000
    """Steps between validations (there is always one at the end)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    best: str = ""
    """A figure of the validation, such as psnr: the model with the largest so far is kept in best/; -loss: the
    smallest. Empty keeps none."""
    keep_every: int = 0
    """Steps between models that are kept for good, in models/; 0 keeps none."""
    wandb: str = ""
    """Weights & Biases project; empty turns it off."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.steps is not None or self.minutes is not None, "steps: give steps or minutes")
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.minutes is None or self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        for name in ("batch_size", "log_every", "val_every", "checkpoint_every"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(self.keep_every >= 0, f"keep_every {self.keep_every}: must be >= 0")
        known = ("cosine", "one_cycle")
        check(self.schedule in known, f"schedule {self.schedule!r}: must be one of {', '.join(known)}")
        known = ("adamw", "muon")
        check(self.optimizer in known, f"optimizer {self.optimizer!r}: must be one of {', '.join(known)}")
        check(0 < self.lr <= 1, f"lr {self.lr}: must be in (0, 1]")
        check(0 <= self.warmup < 1, f"warmup {self.warmup}: must be in [0, 1)")
        check(0 <= self.final_lr <= 1, f"final_lr {self.final_lr}: must be in [0, 1]")
        check(0 <= self.ema < 1, f"ema {self.ema}: must be in [0, 1)")
        check(self.workers is None or self.workers >= 0, f"workers {self.workers}: must be >= 0")
        check(self.grad_clip > 0, f"grad_clip {self.grad_clip}: must be > 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")
        check(self.weight_decay >= 0, f"weight_decay {self.weight_decay}: must be >= 0")


def learning_rate(config: LoopConfig, progress: float) -> float:
    """The schedule's rate; `progress` is the fraction of the budget done."""
    if config.schedule == "one_cycle":
        return config.lr * _cycle(progress, 1 / 25, 1.0, 1 / 25e4)
    if progress < config.warmup:
        return config.lr * max(progress, 1e-4) / config.warmup
    done = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def momentum(config: LoopConfig, progress: float) -> float:
    """AdamW's first beta: 0.9, or what one cycle makes of it."""
    return _cycle(progress, 0.95, 0.85, 0.95) if config.schedule == "one_cycle" else 0.9


def _cycle(progress: float, first: float, middle: float, last: float) -> float:
    """A cosine from `first` to `middle` over three tenths of the budget, then one to `last`."""
    rising = progress < 0.3
    begin, end, done = (first, middle, progress / 0.3) if rising else (middle, last, (progress - 0.3) / 0.7)
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Loop:
    """Trains one task into a run folder.

    The folder gets config.yaml and run.json (what was asked, and by which code), metrics.csv, tensorboard/,
    checkpoint/, pictures/ and model/ (averaged weights); best/ and models/ where they are asked for.

    Args:
        config: how long and how.
        task: what is trained.
        folder: the run folder.
        settings: the whole configuration, sections model, task and loop; what of it decides weights decides whether a
            checkpoint may be resumed.
    """

    def __init__(self, config: LoopConfig, task: Task, folder: Path, settings: dict[str, Any]) -> None:
        self.config, self.task, self.folder, self.settings = config, task, Path(folder), settings
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(config.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.bf16 = pick_precision(config.precision, self.device) == "bf16"
        self.model = self._placed(task.model)
        self.trained = nn.parallel.DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.auxiliary = None if task.auxiliary is None else self._placed(task.auxiliary)
        own, others = (list(n.parameters()) if n is not None else [] for n in (self.model, self.auxiliary))
        self.groups, self.parameters = [own, others], own + others
        self.optimizer = make_optimizer(
            self.model, self.auxiliary, config.optimizer, config.lr, config.weight_decay, self.bf16
        )
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step, self.elapsed = 0, 0.0
        self.recorded: Recorded | None = None
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # the shapes stay the same

    def _placed(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def progress(self) -> float:
        """Fraction of the budget done."""
        if self.config.minutes is not None:
            return self.elapsed / (60 * self.config.minutes)
        assert self.config.steps is not None
        return self.step / self.config.steps

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train to the end of the budget and return the last validation's figures.

        Raises:
            CheckpointError: `resume` finds a checkpoint that is damaged or of another configuration.
            BusyError: another process is training into the folder.
            StorageError: it cannot be written.
        """
        with only_writer(self.folder) if self.rank == 0 else contextlib.nullcontext():
            return self._run(resume)

    def _run(self, resume: bool) -> dict[str, float]:
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        if resume and checkpoints.exists(self.folder / "checkpoint"):
            load_checkpoint(self)
        elif self.rank == 0:  # a fresh start leaves nothing behind that a later resume could pick up
            (self.folder / "metrics.csv").unlink(missing_ok=True)
            checkpoints.discard(self.folder / "checkpoint")
            for stale in ("model", "best", "models"):
                shutil.rmtree(self.folder / stale, ignore_errors=True)
        log = None
        if self.rank == 0:
            write_run(self.folder, self.settings)
            log = Log(self.folder, self.step, self.config.wandb, self.settings)
        with contextlib.closing(log) if log else contextlib.nullcontext():
            validated = self._train(log)
        if self.world > 1:
            dist.barrier()
        return validated

    def _train(self, log: Log | None) -> dict[str, float]:
        if self.progress >= 1:
            return self._validate() if self.rank == 0 else {}
        validated: dict[str, float] = {}
        batches = self._batches()
        window, since = time.monotonic(), self.step
        while self.progress < 1:
            began = time.monotonic()
            if isinstance(self.task, Renewing) and self.task.renew(self.step):
                batches.close()
                batches = self._batches()
            metrics = self.update(*next(batches))
            self.step += 1
            self.elapsed = self._agree(self.elapsed + time.monotonic() - began)
            if log and (self.step % self.config.log_every == 0 or self.step == 1):
                now = time.monotonic()
                speed = (self.step - since) * self.config.batch_size * self.world / (now - window)
                window, since = now, self.step
                figures = {k: float(v) for k, v in metrics.items()}
                figures |= {"samples_per_s": speed, "progress": self.progress, "minutes": self.elapsed / 60}
                log.write(self.step, figures)
            last, best = self.progress >= 1, {}
            if self.rank == 0 and (last or self.step % self.config.val_every == 0):
                validated = self._validate()
                assert log is not None
                log.write(self.step, {f"val_{k}": v for k, v in validated.items()})
                best = validated
            if self.rank == 0 and self.config.keep_every and self.step % self.config.keep_every == 0:
                self._save(f"models/step-{self.step:07d}")
            if self.rank == 0 and (last or self.step % self.config.checkpoint_every == 0):
                # the model before the checkpoint: a kill between them repeats the last steps, to the same model
                self._save("model")
                save_checkpoint(self)
            if best:
                self._keep_best(best)
        return validated

    def _save(self, name: str, **facts: Any) -> None:
        """Write the averaged weights to a model folder of the run."""
        save_model(self.folder / name, self.model, self.task.facts() | {"step": self.step} | facts, self.ema)

    def _keep_best(self, validated: dict[str, float]) -> None:
        """Keep the model in best/ if its figure is the best so far, of this and of resumed runs."""
        name = self.config.best.removeprefix("-")
        if not name:
            return
        check(name in validated, f"loop.best {self.config.best!r}: the validation has {', '.join(validated)}")
        value, path = validated[name], self.folder / "best" / "model.json"
        before = read_json(path, CheckpointError, "delete it")["facts"].get("best") if present(path) else None
        sign = -1 if self.config.best.startswith("-") else 1
        if not math.isnan(value) and (before is None or sign * value > sign * before):
            self._save("best", best=value)

    def _agree(self, elapsed: float) -> float:
        """Rank 0's clock, so that all processes stop at the same step of a minute budget."""
        if self.world == 1:
            return elapsed
        shared = torch.tensor(elapsed, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _batches(self) -> Generator[tuple[int, Batch]]:
        """What `_draw` makes of this step and all that follow."""
        workers = pick_workers(self.config.workers, self.device)
        return prefetch(self._draw, itertools.count(self.step), workers, self.device)

    def _draw(self, step: int) -> tuple[int, Batch]:
        """The seed of a step's noise and its batch, which depend on its number alone."""
        rng = philox((self.config.seed, step * self.world + self.rank))
        seed = int(rng.integers(2**62))
        return seed, self.task.batch(rng, self.config.batch_size)

    def update(self, seed: int, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on a batch of CPU tensors; returns what to log."""
        batch = batch.to(self.device)
        rate = learning_rate(self.config, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
            if self.config.schedule == "one_cycle" and group.get("cycles", True):
                group["betas"] = (momentum(self.config, self.progress), group["betas"][1])
        self.trained.train()
        graphs = self.config.cuda_graphs and self.device.type == "cuda"
        key = self.task.graph_key(self.progress) if graphs else None
        if key is None or self.world > 1:
            metrics, norms = self.gradients(batch, torch.Generator(self.device).manual_seed(seed))
        else:
            if self.recorded is None or self.recorded.key != key:
                self.recorded = None  # its memory is free for the next
                self.recorded = Recorded(self.gradients, key, batch, self.device)
            metrics, norms = self.recorded.replay(batch, seed)
        if all(torch.isfinite(n) for n in norms):  # one bad batch must not end a long run
            self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            state = self.model.state_dict()
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(self.ema.values()), [state[k] for k in self.ema], 1 - decay
            )
        return {"grad_norm": norms[0], "lr": torch.tensor(rate), **metrics}

    def gradients(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Clipped gradients of a batch's loss, in the parameters; returns the metrics and the norms before clipping."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, metrics = self.task.loss(self.trained, batch, generator, self.progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.auxiliary is not None and self.world > 1:  # the model's gradients DDP has averaged already
            for parameter in self.groups[1]:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
        norms = [nn.utils.clip_grad_norm_(group, self.config.grad_clip) for group in self.groups if group]
        return {"loss": loss.detach(), **metrics}, norms

    def _validate(self) -> dict[str, float]:
        live = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        with torch.no_grad():
            figures = self.task.validate(self.model, self.folder / "pictures", self.step)
        self.model.load_state_dict(live)
        return figures
