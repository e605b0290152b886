"""The training loop: data, optimizer, schedules, checkpoints, signals, and the callbacks that watch it."""

import warnings

# Megatron-Core says on import, several times a rank, that Transformer Engine or Apex is missing; `megasparse doctor`
# says it once, with what it costs.
warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine).* not installed.*")
warnings.filterwarnings("ignore", message=r".*is not installed\. Falling back to Torch.*")
