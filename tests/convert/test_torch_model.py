"""The PyTorch model against itself in other shapes: batched and padded against row by row, tiny and
in float32.

Whether it is the same model as the JAX one is for the parity tests; here only the numbers of
parameters are compared.
"""

import copy
import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from blip3o_jax import blip3o, config
from blip3o_jax.convert import torch_model, torch_parts
from blip3o_jax.convert.tables import PUBLISHED_PARTS
from tests import tiny
from tests.conftest import relative_error

TEXT = 40  # ids of text; 5 of tags and scales, then the codes
IMAGE_TOKEN_OFFSET = TEXT + 5
MODEL = dataclasses.replace(
    tiny.model(),
    ar=dataclasses.replace(
        tiny.model().ar, vocab_size=IMAGE_TOKEN_OFFSET + 32, tie_word_embeddings=False
    ),
)
N = MODEL.tokenizer.num_tokens


@functools.cache
def model(cfg=MODEL):
    """Return a model with all parameters random: initial ones leave much at zero."""
    torch.manual_seed(0)
    found = torch_model.Blip3o(cfg, {name: torch_model.part(name, cfg) for name in PUBLISHED_PARTS})
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found.requires_grad_(False)


def row(length, seed):
    return torch.randint(0, TEXT, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=value
    ), torch.tensor([len(r) for r in rows])


@pytest.fixture
def images():
    size = MODEL.tokenizer.encoder.image_size
    return torch.empty(3, 3, size, size).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))


LAYER = [
    f"{name}.{kind}"
    for name in ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    + [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")]
    for kind in ("weight", "bias")
]
VISION = [
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embedding.bias",
    "embeddings.position_embedding.weight",
    *(f"encoder.layers.{i}.{name}" for i in range(2) for name in LAYER),
    "post_layernorm.weight",
    "post_layernorm.bias",
    "head.probe",
    "head.attention.in_proj_weight",
    "head.attention.in_proj_bias",
    *(
        f"head.{name}.{kind}"
        for name in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
]
LINEAR = ["encode_task_layer.0", "decode_task_layer.0", "decode_task_layer.2"]
LINEAR += ["bottleneck.in_linear", "bottleneck.out_linear", "bottleneck.regularizer.embedding_proj"]
KEYS = {
    "tokenizer": [
        *(f"encoder.{name}" for name in VISION),
        *(f"decoder.vision_model.{name}" for name in VISION),
        *(f"{name}.{kind}" for name in LINEAR for kind in ("weight", "bias")),
        "bottleneck.regularizer.embedding.weight",
    ],
    "connector": ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight"],
}


@pytest.mark.parametrize("name", KEYS)
def test_published_keys(name):
    assert sorted(getattr(model(), name).state_dict()) == sorted(KEYS[name])


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts_at_published_size(tied):
    """Count as many as the JAX parts have, but for the AR's padding."""
    cfg = config.ModelConfig(ar=config.Qwen3Config(tie_word_embeddings=tied))
    state = nnx.eval_shape(lambda: nnx.state(blip3o.Blip3o(cfg, PUBLISHED_PARTS, seed=0)))
    padding = (
        (cfg.ar.padded_vocab_size - cfg.ar.vocab_size) * cfg.ar.hidden_size * (1 if tied else 2)
    )
    for name in ("ar",) if tied else PUBLISHED_PARTS:
        want = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state[name])) - (
            padding if name == "ar" else 0
        )
        made = torch_model.part(name, cfg, device="meta")
        assert sum(p.numel() for p in made.parameters()) == want, name
        assert not made.training and {p.dtype for p in made.parameters()} == {torch.float32}


def test_parts():
    latent, feature = (
        torch_model.part(name, MODEL) for name in ("latent_connector", "feature_connector")
    )
    assert (latent[0].in_features, latent[2].out_features) == (
        MODEL.vae.latent_channels,
        MODEL.dit.caption_channels,
    )
    assert (feature[0].in_features, feature[2].out_features) == (
        MODEL.tokenizer.encoder.hidden_size,
        MODEL.ar.hidden_size,
    )
    assert (
        torch.all(latent[3].weight == MODEL.connector.norm_init)
        and latent[3].eps == MODEL.connector.rms_norm_eps
    )
    eager = torch_model.part("ar", MODEL, attn_implementation="eager")
    assert (eager.config._attn_implementation, model().ar.config._attn_implementation) == (
        "eager",
        "sdpa",
    )
    with pytest.raises(ValueError, match="no part 'text_tower': use one of tokenizer, ar"):
        torch_model.part("text_tower", MODEL)


@pytest.mark.parametrize("scale", [1, 2])
def test_tokenizer_features_are_a_hidden_state(images, scale):
    tokenizer = model().tokenizer
    layers = tokenizer.encoder.encoder.layers
    seen = []
    handle = layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    features_BND = tokenizer.features(images, scale)
    handle.remove()
    grid = MODEL.tokenizer.encoder.grid
    want = (
        seen[0]
        .reshape(3, grid // scale, scale, grid // scale, scale, -1)
        .mean((2, 4))
        .flatten(1, 2)
    )
    assert relative_error(features_BND, want) < 1e-6
    assert features_BND.dtype == torch.float32


@pytest.mark.parametrize("l2", [True, False])
def test_tokenizer_codes(images, l2):
    cfg = dataclasses.replace(
        MODEL, tokenizer=dataclasses.replace(MODEL.tokenizer, l2_normalized=l2)
    )
    tokenizer = model(cfg).tokenizer
    features_BND = tokenizer.features(images)
    quantised = tokenizer.quantise(features_BND)
    z_BND = tokenizer.bottleneck.in_linear(tokenizer.encode_task_layer(features_BND))
    z_BND = z_BND / z_BND.norm(dim=-1, keepdim=True) if l2 else z_BND
    distance_BNK = (z_BND[:, :, None] - tokenizer.table()).square().sum(-1)
    np.testing.assert_array_equal(tokenizer.encode(images), distance_BNK.argmin(-1))
    np.testing.assert_array_equal(quantised.ids_BN, distance_BNK.argmin(-1))
    assert len(quantised.ids_BN.unique()) > 2
    assert relative_error(quantised.codebook_loss, distance_BNK.min(-1).values.mean()) < 1e-5
    assert 0 < quantised.entropy_gap < math.log(cfg.tokenizer.codebook_size)
    assert (
        relative_error(
            tokenizer.decode(quantised.ids_BN), tokenizer.reconstruct(quantised.codes_BND)
        )
        < 1e-5
    )
    in_bfloat16 = copy.deepcopy(tokenizer).to(torch.bfloat16)
    assert relative_error(in_bfloat16.table(), tokenizer.table()) < 1e-2
    assert in_bfloat16.decode(in_bfloat16.encode(images)).dtype == torch.float32


def test_connector():
    torch.manual_seed(0)
    hidden_BTD = torch.randn(2, N + 1, MODEL.ar.hidden_size)
    keep_B = torch.tensor([True, False])
    plain = model().connector
    positioned = torch_parts.Connector(
        dataclasses.replace(MODEL.connector, positions=True),
        MODEL.ar.hidden_size,
        MODEL.dit.caption_channels,
    )
    positioned.requires_grad_(False).load_state_dict(plain.state_dict())
    null_BTC = plain(torch.zeros_like(hidden_BTD))
    for connector, shift in (
        (plain, 0),
        (positioned, torch_parts.sinusoids(N + 1, MODEL.ar.hidden_size)),
    ):
        out_BTC = connector(hidden_BTD, keep_B)
        assert relative_error(out_BTC[0], plain(hidden_BTD + shift)[0]) < 1e-6
        assert relative_error(out_BTC[1], null_BTC[1]) < 1e-6
    table = torch_parts.sinusoids(5, 7).double().numpy()
    np.testing.assert_allclose(table[3, :3], np.sin(3 / 10000 ** (np.arange(3) / 3)), atol=1e-7)
    np.testing.assert_allclose(
        table[3, 3:], [*np.cos(3 / 10000 ** (np.arange(3) / 3)), 0], atol=1e-7
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_rows_are_rows_apart(implementation):
    ar = torch_model.part("ar", MODEL, attn_implementation=implementation)
    ar.load_state_dict(model().ar.state_dict())
    found = torch_model.Blip3o(MODEL, {"ar": ar}).requires_grad_(False)
    first, second = row(5, 1), row(3, 2)
    packed = torch.cat([first, second, torch.zeros(2, dtype=torch.long)])[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    segments = torch.tensor([[1] * 5 + [2] * 3 + [0] * 2])
    got = found.hidden(packed, positions, segments)[0]
    assert relative_error(got[:5], found.hidden(first[None])[0]) < 1e-5
    assert relative_error(got[5:8], found.hidden(second[None])[0]) < 1e-5
    # Padding before the tokens, as `mask_prompts` leaves it, and after them.
    got = found.hidden(packed[:, :7], positions[:, :7] + 4, torch.tensor([[0, 0, 1, 1, 1, 0, 0]]))[
        0
    ]
    assert relative_error(got[2:5], found.hidden(first[None, 2:])[0]) < 1e-5


def test_joint_loss_row_by_row():
    """Compare prompts of two lengths, two draws of noise each, the second row without its
    condition.
    """
    found, size = model(), MODEL.latent_size
    prompts = [row(6, 1), row(9, 2)]
    torch.manual_seed(3)
    codes_BN = torch.randint(0, 32, (2, N))
    z_BCHW, noise_BCHW = torch.randn(2, 4, size, size), torch.randn(4, 4, size, size)
    sigma_B, keep_B = torch.tensor([0.1, 0.9, 0.4, 1.0]), torch.tensor([True, False])
    rows = [torch.cat([p, torch.zeros(N, dtype=torch.long), row(2, 7)]) for p in prompts]
    tokens_BL, lengths_B = padded(rows)
    spans_B = torch.tensor([len(p) - 1 for p in prompts])
    index_L = torch.arange(tokens_BL.shape[1])
    mask_BL = ((index_L > spans_B[:, None]) & (index_L < lengths_B[:, None])).float()
    args = (tokens_BL, mask_BL, spans_B, codes_BN, z_BCHW, noise_BCHW, sigma_B)
    ce, flow = found.joint_loss(*args, image_token_offset=IMAGE_TOKEN_OFFSET, keep_B=keep_B)

    nll, errors = [], []
    for b, prompt in enumerate(prompts):
        whole = torch.cat([prompt, codes_BN[b] + IMAGE_TOKEN_OFFSET, rows[b][-2:]])[None]
        hidden_LD = found.hidden(whole)[0]
        logp_LV = found.ar(whole).logits[0].log_softmax(-1)
        nll += [-logp_LV[i - 1, whole[0, i]] for i in range(len(prompt), whole.shape[1])]
        span_TD = hidden_LD[len(prompt) - 1 : len(prompt) + N]
        condition_BTC = found.connector(span_TD[None] * keep_B[b])
        for i in (2 * b, 2 * b + 1):
            x_CHW = (1 - sigma_B[i]) * z_BCHW[b] + sigma_B[i] * noise_BCHW[i]
            v_CHW = found.velocity(x_CHW[None], 1000 * sigma_B[i : i + 1], condition_BTC)[0]
            errors.append((v_CHW - (noise_BCHW[i] - z_BCHW[b])).square().mean())
    assert relative_error(ce, torch.stack(nll).mean()) < 1e-5
    assert relative_error(flow, torch.stack(errors).mean()) < 1e-5

    # Segments and positions written out change nothing; hiding the first prompt does, in the first
    # row alone.
    segments_BL = (index_L < lengths_B[:, None]).long()
    again = found.joint_loss(
        *args,
        image_token_offset=IMAGE_TOKEN_OFFSET,
        keep_B=keep_B,
        positions_BL=index_L.expand_as(tokens_BL),
        segment_ids_BL=segments_BL,
    )
    assert relative_error(torch.stack(again), torch.stack([ce, flow])) < 1e-5
    segments_BL[0, : spans_B[0]] = 0
    hidden = found.joint_loss(
        *args, image_token_offset=IMAGE_TOKEN_OFFSET, keep_B=keep_B, segment_ids_BL=segments_BL
    )
    assert torch.stack(hidden).isfinite().all() and relative_error(hidden[0], ce) > 1e-3


def test_joint_loss_gradients_reach_the_ar():
    found = model()
    found.ar.requires_grad_(True)
    tokens_BL = row(6 + N, 1)[None]
    z_BCHW = torch.randn(1, 4, MODEL.latent_size, MODEL.latent_size)
    _, flow = found.joint_loss(
        tokens_BL,
        torch.ones_like(tokens_BL),
        torch.tensor([5]),
        torch.zeros(1, N, dtype=torch.long),
        z_BCHW,
        torch.randn_like(z_BCHW),
        torch.tensor([0.5]),
        image_token_offset=IMAGE_TOKEN_OFFSET,
        segment_ids_BL=torch.tensor([[0] * 5 + [1] * (N + 1)]),
    )
    flow.backward()
    gradient = found.ar.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    found.zero_grad(set_to_none=True)
    found.requires_grad_(False)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_prompts_of_different_lengths_do_not_disturb_each_other(guidance):
    """Check that greedy ids and hidden states of a padded batch are those of each prompt alone, in
    a loop without cache.
    """
    found = model()
    settings = config.SamplingConfig(temperature=0, token_guidance=guidance)
    rows = [row(4, 1), row(9, 2), row(7, 3)]
    ids_BN, hidden_BTD = found.generate_image_tokens(
        *padded(rows, 11), image_token_offset=IMAGE_TOKEN_OFFSET, settings=settings
    )
    assert ids_BN.shape == (3, N) and hidden_BTD.shape == (3, N + 1, MODEL.ar.hidden_size)
    for prompt, ids_N, hidden_TD in zip(rows, ids_BN, hidden_BTD, strict=True):
        whole, alone = prompt, prompt[-1:]
        for _ in range(N):
            given, free = (
                found.ar(x[None]).logits[0, -1, IMAGE_TOKEN_OFFSET : IMAGE_TOKEN_OFFSET + 32]
                for x in (whole, alone)
            )
            following = (free + guidance * (given - free)).argmax()[None] + IMAGE_TOKEN_OFFSET
            whole, alone = torch.cat([whole, following]), torch.cat([alone, following])
        np.testing.assert_array_equal(ids_N, whole[-N:])
        assert relative_error(hidden_TD, found.hidden(whole[None])[0, -N - 1 :]) < 1e-5


def test_drawn_ids_follow_the_truncated_distribution():
    """Count the first tokens of 4000 copies of a prompt; standard error at most 0.008."""
    found = model()
    settings = config.SamplingConfig(temperature=1.5, top_k=6, top_p=0.8)
    prompt = row(3, 1)
    scores = found.ar(prompt[None]).logits[0, -1, IMAGE_TOKEN_OFFSET : IMAGE_TOKEN_OFFSET + 32]
    p, order = (scores / 1.5).softmax(-1).sort(descending=True)
    p = p[:6] / p[:6].sum()
    kept = int((p.cumsum(0) < 0.8).sum()) + 1
    assert 1 < kept < 6
    torch.manual_seed(0)
    ids_BN, _ = found.generate_image_tokens(
        prompt.expand(4000, -1),
        torch.full((4000,), 3),
        image_token_offset=IMAGE_TOKEN_OFFSET,
        settings=settings,
    )
    drawn = torch.bincount(ids_BN[:, 0] - IMAGE_TOKEN_OFFSET, minlength=32) / 4000
    np.testing.assert_allclose(drawn[order[:kept]], p[:kept] / p[:kept].sum(), atol=0.03)
    assert set(drawn.nonzero().flatten().tolist()) == set(order[:kept].tolist())
    # Switched off, all 32 can be drawn.
    wide = config.SamplingConfig(temperature=100.0, top_k=0, top_p=1.0)
    ids_BN, _ = found.generate_image_tokens(
        prompt.expand(300, -1),
        torch.full((300,), 3),
        image_token_offset=IMAGE_TOKEN_OFFSET,
        settings=wide,
    )
    assert set(ids_BN.flatten().tolist()) == set(range(IMAGE_TOKEN_OFFSET, IMAGE_TOKEN_OFFSET + 32))


@pytest.mark.parametrize(("guidance", "shift"), [(1.0, 1.0), (2.0, 3.0)])
def test_sampler_is_euler_with_guidance(guidance, shift):
    cfg = dataclasses.replace(MODEL, flow=config.FlowConfig(shift=shift))
    found = torch_model.Blip3o(cfg, dict(model().named_children()))
    torch.manual_seed(0)
    condition_BTC, null_BTC = torch.randn(2, 2, N + 1, MODEL.dit.caption_channels)
    noise_BCHW = torch.randn(2, 4, MODEL.latent_size, MODEL.latent_size)
    got = found.sample_latents(condition_BTC, null_BTC, noise_BCHW, steps=3, guidance=guidance)
    z_BCHW = noise_BCHW
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in (1, 2 / 3, 1 / 3, 0)]
    for now, following in itertools.pairwise(sigmas):
        v, null = (
            found.velocity(z_BCHW, torch.full((2,), 1000 * now), c)
            for c in (condition_BTC, null_BTC)
        )
        z_BCHW = z_BCHW + (following - now) * (null + guidance * (v - null))
    assert relative_error(got, z_BCHW) < 1e-5


def test_text_to_image():
    found, side = model(), MODEL.image_size
    tokens_BL, lengths_B = padded([row(4, 1), row(6, 2)])
    settings = config.SamplingConfig(steps=2)
    images = [
        found.text_to_image(
            tokens_BL,
            lengths_B,
            image_token_offset=IMAGE_TOKEN_OFFSET,
            settings=settings,
            seed=seed,
        )
        for seed in (0, 0, 1)
    ]
    assert images[0].shape == (2, 3, side, side) and images[0].dtype == torch.float32
    assert 0 <= images[0].min() < images[0].max() <= 1
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_bfloat16():
    """Load weights of half the size, as the benchmark has them: losses near those of float32,
    and an image.
    """
    found = copy.deepcopy(model()).to(torch.bfloat16)
    torch.manual_seed(0)
    z_BCHW = torch.randn(2, 4, MODEL.latent_size, MODEL.latent_size)
    tokens_BL, lengths_B = padded([row(6 + N, 1), row(6 + N, 2)])
    args = (
        tokens_BL,
        torch.ones_like(tokens_BL),
        torch.tensor([5, 5]),
        torch.zeros(2, N, dtype=torch.long),
        z_BCHW,
    )
    args += (torch.randn_like(z_BCHW), torch.tensor([0.5, 0.25]))
    want, got = (
        torch.stack(m.joint_loss(*args, image_token_offset=IMAGE_TOKEN_OFFSET))
        for m in (model(), found)
    )
    assert got.dtype == torch.float32 and relative_error(got, want) < 0.02
    image = found.text_to_image(
        tokens_BL[:, :6],
        lengths_B - N,
        image_token_offset=IMAGE_TOKEN_OFFSET,
        settings=config.SamplingConfig(steps=2),
    )
    assert image.isfinite().all() and image.dtype == torch.float32
    assert (
        found.codes(torch.zeros(1, 3, 16, 16)).shape == (1, N)
        and found.latents(torch.zeros(1, 3, 16, 16)).isfinite().all()
    )


def test_autoencoder_scales_latents():
    x_BCHW = (
        torch.rand(
            2, 3, MODEL.image_size, MODEL.image_size, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    z_BCHW = model().latents(x_BCHW)
    raw_BCHW = model().vae.encode(x_BCHW).latent
    assert relative_error(z_BCHW, raw_BCHW * MODEL.vae.scaling_factor) < 1e-6
    want = (model().vae.decode(raw_BCHW).sample / 2 + 0.5).clamp(0, 1)
    assert relative_error(model().pixels(z_BCHW), want) < 1e-5


def test_left_padding():
    tokens_BL, lengths_B = padded([torch.tensor([1, 2]), torch.tensor([3, 4, 5])], value=9)
    rows_BL, mask_BL = torch_model.left_padded(
        torch.nn.functional.pad(tokens_BL, (0, 2), value=9), lengths_B
    )
    assert rows_BL.tolist() == [[0, 1, 2], [3, 4, 5]] and mask_BL.tolist() == [[0, 1, 1], [1, 1, 1]]


def test_stock_classes():
    found = model()
    assert isinstance(found.ar, transformers.Qwen3ForCausalLM)
    assert found.ar.model.embed_tokens.weight.shape == (
        IMAGE_TOKEN_OFFSET + 32,
        MODEL.ar.hidden_size,
    ), "no padded rows"
