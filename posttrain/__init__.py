"""The vocabulary of post-training and its loops: types, ports, recipes, engine, rollouts, learner, report.

Importing this package loads neither torch, trl, ray nor transformers; each is imported by the module that uses it.
"""

import os

__version__ = "0.1.0"

# PyTorch reads this at its first large allocation. Without huge pages a third of the time of reverse KL on a CPU goes
# by while the kernel hands out memory in pieces of 4 KiB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
