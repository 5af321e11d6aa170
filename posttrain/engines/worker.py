"""What vLLM's workers learn from here (`worker_extension_cls`): to renew output heads that are tied to the embeddings.

On CPUs vLLM 0.32 computes linear layers from packed copies of their weights, and packs anew those that it reloads. A checkpoint
names a tied weight once, as the embeddings', so the head's copy would stay that of the weights it started with.
"""

from __future__ import annotations

from typing import Any

NAME = "posttrain.engines.worker.TiedHeads"
"""What vLLM calls the class."""

REFRESH = "refresh_tied_heads"
"""What it calls the method."""


class TiedHeads:
    """Added to the classes of a vLLM worker."""

    model_runner: Any

    def refresh_tied_heads(self) -> int:
        """Have each output head whose weight is another layer's processed as after loading; how many there are."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

        modules = list(self.model_runner.get_model().modules())
        heads = [one for one in modules if isinstance(one, ParallelLMHead)]
        others = {id(weight) for one in modules if one not in heads for weight in one.parameters(recurse=False)}
        tied = [one for one in heads if id(one.weight) in others and isinstance(one.quant_method, UnquantizedEmbeddingMethod)]
        for head in tied:
            head.quant_method.process_weights_after_loading(head)
        return len(tied)
