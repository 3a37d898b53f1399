"""Build networks from layers whose parameters and activations carry logical axis names."""

from blip3o_jax.nn.conv import Conv, DepthwiseConv
from blip3o_jax.nn.linear import Linear
from blip3o_jax.nn.logical_axes import (
    Resolver,
    constrain,
    mesh,
    part,
    platform,
    sharding,
    sharding_resolver,
    shards,
)
from blip3o_jax.nn.norms import LayerNorm, RMSNorm, standardise
from blip3o_jax.nn.parameters import fan_in, normal, ones, param, zeros
from blip3o_jax.nn.positions import sinusoids
from blip3o_jax.nn.remat import ATTENTION, REMAT_POLICIES
from blip3o_jax.nn.stacked_layers import LayerCarry, capture_intermediates, scan, stack, unstack

__all__ = [
    "ATTENTION",
    "REMAT_POLICIES",
    "Conv",
    "DepthwiseConv",
    "LayerCarry",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Resolver",
    "capture_intermediates",
    "constrain",
    "fan_in",
    "mesh",
    "normal",
    "ones",
    "param",
    "part",
    "platform",
    "scan",
    "sharding",
    "sharding_resolver",
    "shards",
    "sinusoids",
    "stack",
    "standardise",
    "unstack",
    "zeros",
]
