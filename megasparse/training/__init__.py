"""The training loop: data, optimizer, schedules, checkpoints, signals, and the callbacks that watch it."""
