"""Master copies, moments and step of the translators' training, and the file from which it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.offline.states import StateStore
from zero_ds.training.checkpoint import KEYS


class TrainingState:
    """AdamW over float32 copies of the translators."""

    def __init__(self, config: RunConfig, trained: dict[str, torch.nn.Parameter], store: StateStore) -> None:
        self.config, self.trained = config, trained
        self.content = store.corpus.content()
        self.masters = {name: parameter.detach().float().clone() for name, parameter in trained.items()}
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @staticmethod
    def path(states: Path, config: RunConfig) -> Path:
        """Returns the file of a run's training in the folder of its hidden states."""
        return states / f"training-{config.fingerprint()}.safetensors"

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Makes a step with the gradients that the translators have, clipped to `max_grad_norm`; clears them.

        Raises:
            FloatingPointError: a gradient is not finite; nothing was updated.
        """
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one.float()) for one in gradients]))
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError("the gradient is not finite, though the loss is; lower the learning rate.")
        scale = torch.clamp(self.config.optimizer.max_grad_norm / norm.clamp_min(1e-12), max=1.0)
        for name, parameter in self.trained.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float() * scale
            parameter.grad = None
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        for name, parameter in self.trained.items():
            parameter.copy_(self.masters[name])

    def save(self, states: Path, step: int) -> None:
        """Writes the state after `step` steps, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {}
        for name, master in self.masters.items():
            moments = self.optimizer.state[master]
            for key, value in zip(KEYS, (master, moments["exp_avg"], moments["exp_avg_sq"]), strict=True):
                tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
        path = self.path(states, self.config)
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"step": str(step), "texts": self.content})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    @torch.no_grad()
    def restore(self, states: Path) -> int:
        """Goes on from the file of an earlier attempt; returns its number of steps, 0 if there is none.

        Raises:
            ConfigError: the file is damaged, or of other texts.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(states, self.config)
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                step = int(metadata["step"])
                for name, master in self.masters.items():
                    values = [file.get_tensor(f"{key}/{name}").to(master.device) for key in KEYS]
                    master.copy_(values[0])
                    self.trained[name].copy_(master)
                    self.optimizer.state[master] = {
                        "step": torch.tensor(float(step), device=master.device),
                        "exp_avg": values[1],
                        "exp_avg_sq": values[2],
                    }
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{path} cannot be used ({error}); remove it to train from the beginning.") from None
        if metadata.get("texts") != self.content:
            raise ConfigError(f"{path} was trained on other texts; remove it to train from the beginning.")
        return step
