"""The benchmark suite: `pytest bench` measures, `python -m bench.report` shows, `python -m bench.proof` does both on a GPU."""
