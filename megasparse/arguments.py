"""Types of command line arguments that several commands have."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)
