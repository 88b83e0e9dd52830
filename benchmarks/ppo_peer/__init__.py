"""The parts of `benchmarks/ppo_vs_trl.py`: workloads, the two programs, what they are judged by."""
