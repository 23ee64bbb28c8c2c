"""The parts of `eval/overhead.py` and `eval/throughput.py`."""
