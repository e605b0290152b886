"""Learning rate and weight decay as functions of the step, by Megatron's `OptimizerParamScheduler`."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megasparse.config import Config


class LearningRate:
    """Sets learning rate and weight decay of every parameter group before each step.

    The rate depends on the number of the step alone, so there is nothing to save: a resumed run continues exactly,
    and a change of the schedule in the configuration takes effect at once. With `w` warm-up steps, step `s` (the
    first is 1) runs at `lr * s / w` while `s <= w`; the decay ends at `min_lr` in the last step (`decay_steps` of
    `cosine` and `linear`, `training.steps` of `wsd`).
    """

    def __init__(self, cfg: Config, optimizer: Any) -> None:
        schedule, steps = cfg.optimizer.schedule, cfg.training.steps
        wsd = schedule.kind == "wsd"
        end = steps if wsd or schedule.decay_steps is None else schedule.decay_steps
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=cfg.optimizer.lr,
            min_lr=cfg.optimizer.min_lr,
            lr_warmup_steps=schedule.warmup_steps,
            lr_decay_steps=max(end, schedule.warmup_steps + 1),  # Megatron asks for it even where nothing decays
            lr_decay_style="WSD" if wsd else schedule.kind,
            start_wd=cfg.optimizer.weight_decay,
            end_wd=cfg.optimizer.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
            wsd_decay_steps=schedule.decay_steps if wsd else None,
            lr_wsd_decay_style=schedule.wsd_decay if wsd else None,
        )

    def set_step(self, step: int) -> float:
        """Prepares the parameter groups for step `step` (1 is the first); returns its learning rate."""
        for group in self._scheduler.optimizer.param_groups:
            # Megatron keeps a copy of the bounds in every group, and its checkpoints bring back those they had.
            group["max_lr"], group["min_lr"] = self._scheduler.max_lr, self._scheduler.min_lr
        self._scheduler.num_steps = step
        self._scheduler.step(0)
        return self.rate(step)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, without touching the optimizer."""
        before, self._scheduler.num_steps = self._scheduler.num_steps, step
        rate = float(self._scheduler.get_lr({}))
        self._scheduler.num_steps = before
        return rate
