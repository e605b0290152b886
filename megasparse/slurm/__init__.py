"""Jobs on SLURM: writing and submitting batch scripts (`launch`), what a run is doing (`status`)."""
