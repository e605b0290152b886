"""The dry run's arithmetic: parameters, layout, memory per GPU (`plan.py`), and how they are printed (`text.py`)."""

from megasparse.plan.parameters import checkpoint_bytes, count_parameters, parameters_on_stage
from megasparse.plan.plan import Plan, make_plan

__all__ = ["Plan", "checkpoint_bytes", "count_parameters", "make_plan", "parameters_on_stage"]
