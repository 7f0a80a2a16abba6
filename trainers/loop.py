"""The only training loop: step or minute budget, EMA, checkpoints that resume to the same weights, on a CPU bit for bit."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamenv.artifacts import atomic_file, atomic_folder, read_json, recover_folder, sha256_file, write_json
from dreamenv.bundle import pick_device, pick_precision
from dreamenv.config import check
from dreamenv.errors import CheckpointError
from dreamenv.models.io import save_model
from dreamenv.noise import philox
from trainers.ahead import ahead, pick_workers


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to optimise."""

    steps: int | None = 10000
    """Optimiser steps; None when `minutes` decides."""
    minutes: float | None = None
    """Budget of time spent in training steps (validation and saving come on top); it wins over `steps`. The schedules
    follow the fraction done."""
    batch_size: int = 64
    """Samples a step, per process."""
    lr: float = 1e-3
    """Peak learning rate (AdamW, Loshchilov & Hutter 2019)."""
    warmup: float = 0.02
    """Fraction of the budget that warms up; a cosine to `final_lr` * lr follows."""
    final_lr: float = 0.01
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and kernels only."""
    grad_clip: float = 1.0
    """Limit of the gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved; ramped up as (1 + step) / (10 + step)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA and on CPUs with instructions for it, fp32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    workers: int | None = None
    """Processes that draw batches ahead of time, which changes no batch; None: on CUDA one a spare core, up to 8, else none."""
    cuda_graphs: bool = True
    """On CUDA, record a step once and replay it (CUDA graphs): small networks wait for Python otherwise. Tasks whose steps
    differ, and training in several processes, go without."""
    seed: int = 0
    """Decides initial weights, samples and noise."""
    log_every: int = 50
    """Steps between rows of metrics.csv."""
    val_every: int = 2000
    """Steps between validations (there is always one at the end)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    wandb: str = ""
    """Weights & Biases project; empty turns it off."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.steps is not None or self.minutes is not None, "steps: give steps or minutes")
        check(self.steps is None or self.steps >= 1, f"steps {self.steps}: must be >= 1")
        check(self.minutes is None or self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        for name in ("batch_size", "log_every", "val_every", "checkpoint_every"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        check(0 < self.lr <= 1, f"lr {self.lr}: must be in (0, 1]")
        check(0 <= self.warmup < 1, f"warmup {self.warmup}: must be in [0, 1)")
        check(0 <= self.final_lr <= 1, f"final_lr {self.final_lr}: must be in [0, 1]")
        check(0 <= self.ema < 1, f"ema {self.ema}: must be in [0, 1)")
        check(self.workers is None or self.workers >= 0, f"workers {self.workers}: must be >= 0")
        check(self.grad_clip > 0, f"grad_clip {self.grad_clip}: must be > 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")
        check(self.weight_decay >= 0, f"weight_decay {self.weight_decay}: must be >= 0")


class Task(Protocol):
    """What a model's short trainer module provides."""

    model: nn.Module
    """If it has `learning_rates`, these parameters (name -> factor) learn faster, and do not decay."""
    critic: nn.Module | None
    """A network trained beside the model, by the same loss, and neither averaged nor saved with it; usually None."""

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Draw one batch of CPU tensors; all randomness from `rng`."""
        ...

    def stage(self, progress: float) -> int | None:
        """Which computation `loss` is now; None: one that must not be recorded.

        While it stays the same, on tensors of the same shapes, a step is recorded once and replayed. What is recorded must not
        ask the device for a value, nor use tensors that lie elsewhere.
        """
        ...

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the scalar loss and metrics to log; noise from `generator`, `progress` in [0, 1)."""
        ...

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Measure the averaged weights; may write pictures to `folder`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What to store with the saved model."""
        ...


def learning_rate(config: LoopConfig, progress: float) -> float:
    """Warm-up, then cosine to `final_lr`; `progress` is the fraction of the budget done."""
    if progress < config.warmup:
        return config.lr * max(progress, 1e-4) / config.warmup
    done = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Loop:
    """Trains one task into `folder`: metrics.csv, tensorboard/, checkpoint/, pictures/ and model/ (EMA weights)."""

    def __init__(self, config: LoopConfig, task: Task, folder: Path, identity: dict[str, Any]) -> None:
        self.config, self.task, self.folder = config, task, Path(folder)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(config.device)
        if config.device == "auto" and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.bf16 = pick_precision(config.precision, self.device) == "bf16"
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.model = task.model.to(self.device, memory_format=torch.channels_last)
        self.trained = nn.parallel.DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.critic = None if task.critic is None else task.critic.to(self.device, memory_format=torch.channels_last)
        named = dict(self.model.named_parameters())
        own, rates = list(named.values()), getattr(self.model, "learning_rates", {})
        others = [] if self.critic is None else list(self.critic.parameters())
        self.groups, self.parameters = [own, others], own + others
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for n, p in named.items() if p.ndim >= 2 and n not in rates], "weight_decay": config.weight_decay},
             {"params": [p for n, p in named.items() if p.ndim < 2 and n not in rates], "weight_decay": 0.0},
             *({"params": [named[n]], "weight_decay": 0.0, "rate": rate} for n, rate in rates.items()),
             *([{"params": others, "weight_decay": 0.0, "betas": (0.5, 0.99)}] if others else [])],
            lr=config.lr, betas=(0.9, 0.99), fused=True,
        )  # fmt: skip
        self.ema = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step, self.elapsed = 0, 0.0
        self._recorded: _Recorded | None = None
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # the shapes stay the same

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
        """
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        recover_folder(self.folder / "checkpoint")
        if resume and (self.folder / "checkpoint").exists():
            self._load()
        elif self.rank == 0:  # a fresh start leaves nothing behind that a later resume could pick up
            (self.folder / "metrics.csv").unlink(missing_ok=True)
            for stale in ("checkpoint", "model"):
                shutil.rmtree(self.folder / stale, ignore_errors=True)
        log = _Log(self.folder, self.step, self.config.wandb) if self.rank == 0 else None
        with contextlib.closing(log) if log else contextlib.nullcontext():
            validated = self._train(log)
        if self.world > 1:
            dist.barrier()
        return validated

    def _train(self, log: _Log | None) -> dict[str, float]:
        if self.progress >= 1:
            return self._validate() if self.rank == 0 else {}
        validated: dict[str, float] = {}
        workers = pick_workers(self.config.workers, self.device)
        batches = ahead(self._draw, itertools.count(self.step), workers, self.device)
        window, since = time.monotonic(), self.step
        while self.progress < 1:
            began = time.monotonic()
            metrics = self._update(*next(batches))
            self.step += 1
            self.elapsed = self._agree(self.elapsed + time.monotonic() - began)
            if log and (self.step % self.config.log_every == 0 or self.step == 1):
                now = time.monotonic()
                speed = (self.step - since) * self.config.batch_size * self.world / (now - window)
                window, since = now, self.step
                log.write(self.step, {k: float(v) for k, v in metrics.items()} | {"samples_per_s": speed,
                          "progress": self.progress, "minutes": self.elapsed / 60})  # fmt: skip
            last = self.progress >= 1
            if self.rank == 0 and (last or self.step % self.config.val_every == 0):
                validated = self._validate()
                assert log is not None
                log.write(self.step, {f"val_{k}": v for k, v in validated.items()})
            if self.rank == 0 and (last or self.step % self.config.checkpoint_every == 0):
                self._save()
        return validated

    def _agree(self, elapsed: float) -> float:
        """Rank 0's clock, so that all processes stop at the same step of a minute budget."""
        if self.world == 1:
            return elapsed
        shared = torch.tensor(elapsed, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def _draw(self, step: int) -> tuple[int, dict[str, Tensor]]:
        """The seed of a step's noise and its batch, which depend on its number alone."""
        rng = philox((self.config.seed, step * self.world + self.rank))
        seed = int(rng.integers(2**62))
        return seed, self.task.batch(rng, self.config.batch_size)

    def _update(self, seed: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        rate = learning_rate(self.config, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        self.trained.train()
        stage = self.task.stage(self.progress) if self.config.cuda_graphs and self.device.type == "cuda" else None
        if stage is None or self.world > 1:
            metrics, norms = self.gradients(batch, torch.Generator(self.device).manual_seed(seed))
        else:
            if self._recorded is None or self._recorded.stage != stage:
                self._recorded = None  # its memory is free for the next
                self._recorded = _Recorded(self, stage, batch)
            metrics, norms = self._recorded.replay(batch, seed)
        if all(torch.isfinite(n) for n in norms):  # one bad batch must not end a long run
            self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            state = self.model.state_dict()
            torch._foreach_lerp_(list(self.ema.values()), [state[k] for k in self.ema], 1 - decay)
        return {"grad_norm": norms[0], "lr": torch.tensor(rate), **metrics}

    def gradients(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Clipped gradients of a batch's loss, in the parameters; returns the metrics and the norms before clipping."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, metrics = self.task.loss(self.trained, batch, generator, self.progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.critic is not None and self.world > 1:  # the model's gradients DDP has averaged already
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

    def _save(self) -> None:
        # the model before the checkpoint: a kill between them repeats the last steps, to the same model
        save_model(self.folder / "model", self.model, self.task.facts() | {"step": self.step}, self.ema)
        moments: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{index}.{name}"] = value.detach().cpu().contiguous()
        with atomic_folder(self.folder / "checkpoint") as temporary:
            files = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": moments}
            if self.critic is not None:
                files["critic"] = self.critic.state_dict()
            for name, tensors in files.items():
                plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                save_file(plain, temporary / f"{name}.safetensors")
            write_json(temporary / "state.json", {
                "step": self.step, "elapsed": self.elapsed, "identity": self.identity,
                "sha256": {name: sha256_file(temporary / f"{name}.safetensors") for name in files},
            })  # fmt: skip

    def _load(self) -> None:
        folder = self.folder / "checkpoint"
        remedy = "delete the checkpoint to start anew"
        state = read_json(folder / "state.json", CheckpointError, remedy)
        files = ("model", "ema", "optimizer") if self.critic is None else ("model", "ema", "optimizer", "critic")
        digests = state.get("sha256")
        sound = isinstance(digests, dict) and set(digests) == set(files) and isinstance(state.get("step"), int)
        if not sound or not isinstance(state.get("elapsed"), float) or "identity" not in state:
            raise CheckpointError(f"{folder / 'state.json'}: is damaged; {remedy}")
        for name in files:
            path = folder / f"{name}.safetensors"
            if not path.exists() or sha256_file(path) != digests[name]:
                raise CheckpointError(f"{path}: missing, or its sha256 differs from state.json; {remedy}")
        if state["identity"] != self.identity:
            raise CheckpointError(f"{folder}: was made with another configuration; use the same one, or another --out")
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        if self.critic is not None:
            self.critic.load_state_dict(load_file(folder / "critic.safetensors"))
        self.ema = {k: v.to(self.device) for k, v in load_file(folder / "ema.safetensors").items()}
        moments = load_file(folder / "optimizer.safetensors")
        for index, parameter in enumerate(self.parameters):
            prefix = f"{index}."
            values = {k[len(prefix) :]: v for k, v in moments.items() if k.startswith(prefix)}
            if values:
                self.optimizer.state[parameter] = {
                    k: v.to(self.device) if k == "step" else v.to(self.device).to(memory_format=_format(parameter))
                    for k, v in values.items()
                }  # fmt: skip
        self.step, self.elapsed = state["step"], state["elapsed"]


class _Recorded:
    """A step's loss and gradients as a CUDA graph, to be replayed on other batches of the same shapes."""

    def __init__(self, loop: Loop, stage: int, batch: dict[str, Tensor]) -> None:
        self.stage = stage
        self._batch = {k: v.clone() for k, v in batch.items()}
        self._generator = torch.Generator(loop.device).manual_seed(0)
        with torch.cuda.device(loop.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is chosen or set up at a first use must not be recorded
                for _ in range(3):
                    loop.gradients(self._batch, self._generator)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self._generator)
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._result = loop.gradients(self._batch, self._generator)

    def replay(self, batch: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """See `Loop.gradients`; what it returns holds until the next replay."""
        for name, value in batch.items():
            self._batch[name].copy_(value, non_blocking=True)
        self._generator.manual_seed(seed)
        self._graph.replay()
        return self._result


def _format(parameter: Tensor) -> torch.memory_format:
    return torch.channels_last if parameter.ndim == 4 else torch.contiguous_format


class _Log:
    """metrics.csv in long form (step, name, value), TensorBoard if installed, W&B if asked for."""

    def __init__(self, folder: Path, step: int, wandb_project: str) -> None:
        path = folder / "metrics.csv"
        rows = []
        if path.exists():  # a resumed run repeats the steps after its checkpoint: drop their old rows
            with open(path, newline="") as file:
                rows = [r for r in csv.reader(file) if len(r) == 3 and r[0].isdigit() and int(r[0]) <= step]
        with atomic_file(path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([["step", "name", "value"], *rows])
        self._file = open(path, "a", newline="")  # noqa: SIM115 - kept open for the run
        self._csv = csv.writer(self._file)
        self._board: Any = None
        self._wandb: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            pass
        if wandb_project:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb = wandb.init(project=wandb_project, name=folder.name, dir=str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one step's values."""
        self._csv.writerows([step, name, f"{value:.6g}"] for name, value in values.items())
        self._file.flush()
        print(f"step {step}: " + " ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
