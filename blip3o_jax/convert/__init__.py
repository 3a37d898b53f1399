"""Published PyTorch weights in, trained weights out: name tables, import, export, verify."""
