"""Step 1 of the data flow: captions and images on disk -> batches.

`sources` reads records, `images` decodes and crops them, `sequence` lays out their tokens, `loader`
turns them into batches.
"""
