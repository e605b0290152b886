"""`megasparse preflight CONFIG`: do all nodes of an allocation fit together, before the long start of a run.

Read `run.preflight` first: it is the whole check in the order in which things happen. `facts` is what one rank looks
at, `network` what ranks measure together, `compare` turns everybody's answers into verdicts that name hosts and
ranks, `meeting` is the key-value store they talk through: it never waits without a limit.
"""

from megasparse.preflight.run import preflight

__all__ = ["preflight"]
