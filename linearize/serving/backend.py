"""What vLLM tells a mixer about a batch: decodes first, then prompts, and the page of each request.

The builder is vLLM's for Mamba layers, without the tables of its convolutions. It takes a prompt
of one token for a prompt; vLLM's builder for linear attention takes it for a decode, which would
continue the state that another request left in the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout


@dataclass
class MixerMetadata(BaseMambaAttentionMetadata):
    """The batch, as vLLM describes it to layers with a state."""


class MixerMetadataBuilder(BaseMambaAttentionMetadataBuilder[MixerMetadata]):
    """Makes the metadata of a step, once for all mixers."""

    metadata_cls = MixerMetadata
    needs_causal_conv1d_metadata = False
    # Mixers have not been captured: they may look at the host.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER


class MixerBackend(AttentionBackend):
    """Names the builder."""

    @staticmethod
    def get_name() -> str:
        return "LOWLINE"

    @staticmethod
    def get_builder_cls() -> type[MixerMetadataBuilder]:
        return MixerMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return first the one in which the pages of all layers lie side by side."""
        return (KVCacheLayout.BLHNC, *(x for x in KVCacheLayout if x is not KVCacheLayout.BLHNC))

    @classmethod
    def is_ssm(cls) -> bool:
        return True
