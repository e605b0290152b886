"""What a run looks like from outside: sparsity, memory, throughput and energy, to console, JSONL, W&B and HTML.

Start at `monitor.Monitor`, the callback that the training loop calls; `report.write_report` reads what it wrote.
"""
