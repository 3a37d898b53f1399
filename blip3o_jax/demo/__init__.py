"""The whole way of an image in one command, on a machine without an accelerator: data, four stages,
samples, scores, report.
"""
