"""What several benchmarks share: sizes, child processes, data, proxies.

Start: sizes.py.
Imports: everything but cli.
"""
