"""The systems that `benchmarks/progressive.py` compares, one file each; all but ours are optional packages."""
