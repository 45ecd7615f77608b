"""Sharpness-aware training for scripts/finetune.py: steps along the gradient at the worst weights nearby.

    w      weights in training; g their gradient on a step's rows, averaged over the processes
    m      mask of 0 and 1 over the weights; 1 throughout for SAM
    F      empirical Fisher information on some of the rows: mean over them of (grad loss(row))^2
    rho    radius, > 0, in the unit of the weights

    e = rho m g / |g|                      |g| over all weights
    one step = the optimizer's, at w, with the gradient at w + e

SAM (Foret et al., https://arxiv.org/abs/2010.01412) has rho 0.05.  FSAM (Zhong et al., https://arxiv.org/abs/2210.05497)
has m = 1 for the share `keep` of weights with the largest F, chosen anew every `mask_every` steps; a tenth, 100 steps
and 32 rows are what its authors' code has.  There F squares the sum over a batch, here the gradient of every row.
Experts trained so interfere less when they are merged (SAFT-Merge, https://arxiv.org/abs/2504.14662).

A step costs two passes instead of one, and the memory of one more copy of the weights; FSAM's masks a byte per weight.
pytorch_optimizer's SAM knows neither masks nor the scaled gradients of fp16, hence these lines.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from dfmerge_studies.errors import InputError
from dfmerge_studies.params import evaluating
from dfmerge_studies.tasks.encoding import Encoded
from scripts.lora import trainable
from scripts.trainee import Trainee

DEFAULTS = {"rho": 0.05, "keep_ratio": 0.1, "mask_every": 100, "mask_rows": 32}
_OF_MASKS = ("keep_ratio", "mask_every", "mask_rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of sharpness-aware training.

    Args:
        parser: of the whole command line.
    """
    group = parser.add_argument_group("sharpness-aware training", "Experts that interfere less; twice the time.")
    group.add_argument(
        "--sharpness-aware", choices=["sam", "fsam"], help="perturb all weights, or those of most Fisher"
    )
    group.add_argument("--rho", type=float, help=f"radius of the perturbation (default {DEFAULTS['rho']})")
    keep = f"fsam: share of weights that are perturbed (default {DEFAULTS['keep_ratio']})"
    group.add_argument("--keep-ratio", type=float, metavar="SHARE", help=keep)
    every = f"fsam: the mask is chosen anew (default {DEFAULTS['mask_every']})"
    group.add_argument("--mask-every", type=int, metavar="STEPS", help=every)
    rows = f"fsam: rows of a step that the mask's Fisher takes (default {DEFAULTS['mask_rows']})"
    group.add_argument("--mask-rows", type=int, metavar="ROWS", help=rows)


def read_settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any] | None:
    """What the options ask for, with defaults filled in; None without sharpness-aware training.

    Args:
        parser: ends the program where options do not fit.
        options: of the command line.
    """
    given = {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}
    wanted = {None: (), "sam": ("rho",), "fsam": tuple(DEFAULTS)}[options.sharpness_aware]
    for name in given:
        if name not in wanted:
            kind = "fsam" if name in _OF_MASKS else "sam or fsam"
            parser.error(f"--{name.replace('_', '-')} belongs to --sharpness-aware {kind}")
    if options.sharpness_aware is None:
        return None
    settings = {name: given.get(name, DEFAULTS[name]) for name in wanted}
    if not 0 <= settings["rho"] < math.inf:
        parser.error(f"--rho must be a number from 0 on, not {settings['rho']}")
    if not 0 < settings.get("keep_ratio", 1) <= 1:
        parser.error(f"--keep-ratio must be above 0 and at most 1, not {settings['keep_ratio']}")
    for name in ("mask_every", "mask_rows"):
        if settings.get(name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return {"kind": options.sharpness_aware, **settings}


def check_processes(accelerator: Any) -> None:
    """Refuse processes that share the weights out, since a mask and a length are of all weights.

    Args:
        accelerator: of the training.

    Raises:
        InputError: naming what shares them out.
    """
    if (how := accelerator.distributed_type) in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        what = f"--sharpness-aware needs all weights in every process, and {how.value} shares them out"
        raise InputError(what, hint="Launch with plain data parallelism, such as `accelerate launch --multi_gpu`")


class Perturbation:
    """Moves weights up along their gradient, and back to the bit.

    Args:
        weights: in training, each once.
        rho: radius.
        keep: share of them that is moved; all until `choose_` was called.
    """

    def __init__(self, weights: Sequence[nn.Parameter], rho: float, keep: float = 1.0) -> None:
        self.weights, self.rho, self.keep = weights, rho, keep
        self.masks: list[Tensor] | None = None

    def choose_(self, fishers: Sequence[Tensor]) -> None:
        """Move only the share `keep` of the weights with the largest Fisher information; none where it is 0.

        Args:
            fishers: per weight, of its shape.
        """
        everything = torch.cat([fisher.flatten() for fisher in fishers])
        kept = max(1, int(self.keep * everything.numel()))
        least = everything.kthvalue(everything.numel() - kept + 1).values
        self.masks = [(fisher >= least) & (fisher > 0) for fisher in fishers]

    @contextmanager
    def applied(self) -> Iterator[bool]:
        """The weights at w + e, for a while; False, and nothing moves, where the gradient is 0 or not finite."""
        moved = [(i, w, w.grad) for i, w in enumerate(self.weights) if w.grad is not None]
        norm = _norm([gradient for _, _, gradient in moved])
        if not 0 < norm < math.inf:
            yield False
            return
        before = [w.detach().clone() for _, w, _ in moved]
        try:
            with torch.no_grad():
                for i, w, gradient in moved:
                    e = gradient * (self.rho / norm)
                    w.add_(e if self.masks is None else e * self.masks[i])
            yield True
        finally:
            with torch.no_grad():  # a copy, since (w + e) - e is not w in floating point
                for (_, w, _), value in zip(moved, before, strict=True):
                    w.copy_(value)


def _norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean length of all gradients together."""
    return math.hypot(*torch.stack([torch.linalg.vector_norm(g) for g in gradients]).tolist()) if gradients else 0.0


class Sharpness:
    """Sharpness-aware gradients of a training.

    Args:
        trainee: the model.
        accelerator: who the other processes are.
        settings: of `read_settings`.
    """

    def __init__(self, trainee: Trainee, accelerator: Any, settings: dict[str, Any]) -> None:
        self._trainee, self._accelerator, self._settings = trainee, accelerator, settings
        weights = trainable(trainee)
        self.perturbation = Perturbation(weights, settings["rho"], settings.get("keep_ratio", 1.0))

    def gradient_(self, step: int, rows: Sequence[tuple[str, Encoded]], gradient: Callable[[], float]) -> float:
        """Leave the gradient at w + e in the weights; returns the loss at w.

        Args:
            step: from 1.
            rows: this process's rows of the step, with their tasks.
            gradient: adds the gradient at the present weights, averaged over the processes, and returns the loss.
        """
        if self.perturbation.keep < 1 and (step - 1) % self._settings["mask_every"] == 0:
            self.perturbation.choose_(self.fishers(rows))
        with _same_randomness(self._accelerator.device):  # dropout is that of the second pass
            loss = gradient()
        with self.perturbation.applied() as moved:
            if moved:  # a gradient that is not finite is left to the optimizer: fp16 skips the step and scales down
                for w in self.perturbation.weights:
                    w.grad = None
                gradient()
        return loss

    def fishers(self, rows: Sequence[tuple[str, Encoded]]) -> list[Tensor]:
        """Sums over the first `mask_rows` rows of a step, of all processes, of the squared gradient of each row's loss.

        Args:
            rows: this process's rows: of a step's rows in order, every n-th.

        Returns:
            Per weight, of its shape, the same in all processes.
        """
        weights, n = self.perturbation.weights, self._accelerator.num_processes
        mine = range(self._accelerator.process_index, self._settings["mask_rows"], n)
        sums = [torch.zeros_like(w, requires_grad=False) for w in weights]
        with evaluating(self._trainee):
            # One row at a time is right for any model, and rare; in full precision, where no small square is lost.
            for (task, row), _ in zip(rows, mine, strict=False):
                parts = torch.autograd.grad(self._trainee.losses({task: [row]}).sum(), weights, allow_unused=True)
                for total, part in zip(sums, parts, strict=True):
                    if part is not None:
                        total.add_(part.square())
        return [self._accelerator.reduce(total, "sum") for total in sums]


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """What is drawn in here is drawn again afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield
