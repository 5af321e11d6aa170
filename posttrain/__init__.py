"""posttrain: alignment and distillation of Hugging Face causal language models.

Importing this package loads nothing heavy; the work lives in its modules (see README.md).
"""

__version__ = "0.1.0"
