"""`mimo demo`: a small network of any system, trained in minutes on a CPU, and what it predicts.

run.py trains and compares, clips.py holds real clips, page.py shows the results.
"""

from mimo.demo.run import SHAPES, demo

__all__ = ["SHAPES", "demo"]
