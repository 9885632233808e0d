"""The vocabulary of post-training and its loops: types, ports, recipes, engine, rollouts, learner, report.

Importing this package loads neither torch, trl, ray nor transformers; each is imported by the module that uses it.
"""

__version__ = "0.1.0"
