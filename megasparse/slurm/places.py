"""Prints the run directory and the checkpoint directory of a configuration, a line each, for the batch scripts.

`python -m megasparse.slurm.places CONFIG [a.b=c ...]`: exit code 2 and the message where the configuration is wrong.
"""

from __future__ import annotations

import sys

from megasparse.config import ConfigError, check_files, load_config


def main() -> int:
    """See the module."""
    try:
        cfg = load_config(sys.argv[1], sys.argv[2:])
        check_files(cfg)
    except ConfigError as error:
        print(f"megasparse: {error}", file=sys.stderr)
        return 2
    print(cfg.run_directory.absolute())
    print(cfg.checkpoint_directory.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
