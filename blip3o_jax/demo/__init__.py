"""Train, sample and score in one command, on a machine without an accelerator: data, four stages,
reinforcement learning, report.
"""
