"""Text <-> ids: the two text tokenizers (tokenizers.py) and the joint text-and-image vocabulary
(vocabulary.py).
"""
