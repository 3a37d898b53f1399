"""Torch parameter names to parameter paths here, for the SigLIP encoder and TA-Tok: one line a parameter.

A rule is (torch name, path here, what turns one into the other); `{i}` stands for the layer, whose arrays are stacked. The
same tables carry weights and gradients across, so a gradient is compared parameter by parameter.
"""

import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

SAME = lambda x: x
LINEAR = lambda x: x.T
CONV = lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
VECTOR = lambda x: x.reshape(-1)


def third(i, convert):
    """Query, key or value of `torch.nn.MultiheadAttention`, which stores the three as one."""
    return lambda x: convert(np.split(x, 3)[i])


def linear(torch, jax):
    return [(f"{torch}.weight", f"{jax}.kernel", LINEAR), (f"{torch}.bias", f"{jax}.bias", SAME)]


def norm(torch, jax):
    return [(f"{torch}.weight", f"{jax}.scale", SAME), (f"{torch}.bias", f"{jax}.bias", SAME)]


def prefixed(torch, jax, rules):
    return [(torch + name, jax + path, convert) for name, path, convert in rules]


LAYER = [
    *norm("layer_norm1", "norm1"),
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
    *linear("self_attn.out_proj", "attention.out"),
    *norm("layer_norm2", "norm2"),
    *linear("mlp.fc1", "mlp.up"),
    *linear("mlp.fc2", "mlp.down"),
]
HEAD = [
    ("probe", "probe", VECTOR),
    *[("attention.in_proj_weight", f"attention.{n}.kernel", third(i, LINEAR)) for i, n in enumerate(("query", "key", "value"))],
    *[("attention.in_proj_bias", f"attention.{n}.bias", third(i, SAME)) for i, n in enumerate(("query", "key", "value"))],
    *linear("attention.out_proj", "attention.out"),
    *norm("layernorm", "norm"),
    *linear("mlp.fc1", "mlp.up"),
    *linear("mlp.fc2", "mlp.down"),
]
TRUNK = [
    ("embeddings.patch_embedding.bias", "patch_embedding.bias", SAME),
    ("embeddings.position_embedding.weight", "position_embedding", SAME),
    *prefixed("encoder.layers.{i}.", "encoder.layers.", LAYER),
    *norm("post_layernorm", "post_layernorm"),
    *prefixed("head.", "head.", HEAD),
]
SIGLIP = [("embeddings.patch_embedding.weight", "patch_embedding.kernel", CONV), *TRUNK]
SIGLIP2 = [("embeddings.patch_embedding.weight", "patch_embedding.kernel", LINEAR), *TRUNK]
TA_TOK = [
    *prefixed("encoder.", "encoder.", SIGLIP),
    *linear("encode_task_layer.0", "encode_task_layer"),
    *linear("bottleneck.in_linear", "bottleneck.in_linear"),
    ("bottleneck.regularizer.embedding.weight", "bottleneck.codebook.embedding", SAME),
    *linear("bottleneck.regularizer.embedding_proj", "bottleneck.codebook.embedding_proj"),
    *linear("bottleneck.out_linear", "bottleneck.out_linear"),
    *prefixed("decoder.vision_model.", "decoder.", SIGLIP2),
    *linear("decode_task_layer.0", "decode_task_layer1"),
    *linear("decode_task_layer.2", "decode_task_layer2"),
]


def to_jax(rules, arrays):
    """{path: array} from {torch name: array}; every torch array must be taken by a rule."""
    found, taken = {}, set()
    for name, path, convert in rules:
        pattern = re.compile(re.escape(name).replace(re.escape("{i}"), r"(\d+)"))
        hits = [(match, arrays[key]) for key in arrays if (match := pattern.fullmatch(key))]
        assert hits, f"no torch array {name}"
        taken |= {match.string for match, _ in hits}
        if "{i}" in name:
            hits.sort(key=lambda hit: int(hit[0][1]))
            found[path] = np.stack([convert(array) for _, array in hits])
        else:
            found[path] = convert(hits[0][1])
    assert taken == set(arrays), f"not in the table: {sorted(set(arrays) - taken)}"
    return found


def state_paths(state):
    """{dotted path: nnx.Variable}."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def load(make, rules, torch_module):
    """The module of `make()` with the weights of `torch_module`; every parameter here must be set."""
    module = nnx.eval_shape(make)
    values = to_jax(rules, {name: value.detach().numpy() for name, value in torch_module.named_parameters()})
    parameters = state_paths(nnx.state(module, nnx.Param))
    assert set(parameters) == set(values), set(parameters) ^ set(values)
    for path, parameter in parameters.items():
        assert parameter.shape == values[path].shape, (path, parameter.shape, values[path].shape)
        parameter.set_value(jnp.asarray(values[path]))
    return module


def randomise(torch_module, seed=0):
    """Every parameter random, norms and biases too: a mixed-up pair must show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in torch_module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(
                1 + 0.2 * noise if is_scale else noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
            )
    return torch_module


def torch_gradients(torch_module):
    """{torch name: gradient}, zeros where none arrived."""
    return {
        name: (np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy())
        for name, p in torch_module.named_parameters()
    }


def count(module_or_state):
    """Parameters of an abstract or real nnx state."""
    return sum(int(np.prod(leaf.shape)) for leaf in state_paths(module_or_state).values())
