"""Import published PyTorch weights and export trained ones: name tables, import, export, verify."""
