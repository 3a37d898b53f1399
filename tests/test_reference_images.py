"""Compare reference images in the joint loss and in sampling with the stock PyTorch classes put
together one row at a time; and run all tasks.

Each row there has exactly its own images: no empty slots, no masks, no rows of other tasks.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from blip3o_jax import blip3o, config, nn, sampling_programs
from blip3o_jax.convert import mapping, torch_model
from blip3o_jax.data.sequence import pack_rows
from blip3o_jax.train import checkpoint, supervised
from blip3o_jax.train.freezing import trainable_filter
from blip3o_jax.train.joint_loss import joint_loss, joint_normalizers, sample_training_noise
from blip3o_jax.train.metrics import read_rows
from blip3o_jax.train.stages import stage_parts
from blip3o_jax.train.state import plan_state
from tests import stock_weights, tiny
from tests.conftest import relative_error

ROUTES = {
    "latents": config.EditingConfig(reference_slots=2, latents=True),
    "latent_concat": config.EditingConfig(reference_slots=2, latent_concat=True),
    "both": config.EditingConfig(
        reference_slots=2, latents=True, latent_concat=True, uncond_latent_concat=False
    ),
    "features": config.EditingConfig(
        reference_slots=2, features=True, latents=True, latent_concat=True
    ),
}
IMAGE_TOKEN_OFFSET, N, ROWS, R, LENGTH = 45, 4, 5, 2, 32
SHOWN = (
    0,
    1,
    2,
    1,
    1,
)  # reference images of each row: t2i, edit, edit of two, reconstruct, understand
DRAWN = (1, 1, 1, 1, 0)
LOSS = config.LossConfig(ce_chunk=8, condition_dropout=0.4, instruction_dropout=0.2, flow_samples=2)


def model_config(route):
    cfg = tiny.model()
    return dataclasses.replace(
        cfg,
        ar=dataclasses.replace(cfg.ar, vocab_size=IMAGE_TOKEN_OFFSET + 32),
        editing=ROUTES[route],
    )


@functools.cache
def models(route):
    """Return (the stock parts together, graphdef, weights that are trained, others) with the same
    random weights."""
    cfg = model_config(route)
    run = config.Config(model=cfg)
    torch.manual_seed(0)
    parts = {name: torch_model.part(name, cfg) for name in stage_parts(run)}
    with torch.no_grad():
        for part in parts.values():
            for p in part.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model = nnx.eval_shape(lambda: blip3o.Blip3o(cfg, parts, seed=0))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        part, *rest = map(str, path)
        variable.set_value(jnp.asarray(weights(route, part, parts[part])["/".join(rest)]))
    nnx.update(model, state)
    return torch_model.Blip3o(cfg, parts), *blip3o.split(model, trainable_filter(run))


@functools.cache
def weights(route, part, module):
    named = {
        key: x.detach().numpy() for key, x in module.state_dict().items() if key != "lm_head.weight"
    }
    return mapping.to_jax(part, model_config(route), named)


@functools.cache
def batch(route):
    """Return rows of five tasks, of made-up text."""
    cfg, rng = model_config(route), np.random.default_rng(1)
    side, channels = cfg.latent_size, cfg.vae.latent_channels
    tokens_BL = rng.integers(0, 40, (ROWS, LENGTH)).astype(np.int32)
    reference_span_BR, image_span_B = np.zeros((ROWS, R), np.int32), np.zeros(ROWS, np.int32)
    loss_mask_BL, segments_BL = (
        np.zeros((ROWS, LENGTH), np.float32),
        np.zeros((ROWS, LENGTH), np.int32),
    )
    for b in range(ROWS):
        at = 3 + b
        for r in range(SHOWN[b]):
            reference_span_BR[b, r] = at
            at += N + 2
        image_span_B[b] = at if DRAWN[b] else 0
        end = at + (N if DRAWN[b] else 2) + 3
        loss_mask_BL[b, at + 1 : end], segments_BL[b, :end] = 1, 1
    pixels = cfg.tokenizer.encoder.image_size
    made = {
        "tokens": tokens_BL,
        "loss_mask": loss_mask_BL,
        "segment_ids": segments_BL,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
        "image_span": image_span_B,
        "target": np.asarray(DRAWN, np.float32),
        "reference_span": reference_span_BR,
        "reference_mask": (np.arange(R) < np.asarray(SHOWN)[:, None]).astype(np.float32),
        "label_count": np.full(ROWS, loss_mask_BL.sum() / ROWS, np.float32),
        "target_count": np.full(ROWS, sum(DRAWN) / ROWS, np.float32),
    }
    if cfg.editing.features:
        views = {
            "tokenizer_pixels": rng.integers(0, 256, (ROWS, pixels, pixels, 3), np.uint8),
            "pixels": rng.integers(0, 256, (ROWS, cfg.image_size, cfg.image_size, 3), np.uint8),
            "reference_tokenizer_pixels": rng.integers(
                0, 256, (ROWS, R, pixels, pixels, 3), np.uint8
            ),
            "reference_pixels": rng.integers(
                0, 256, (ROWS, R, cfg.image_size, cfg.image_size, 3), np.uint8
            ),
        }
    else:
        views = {
            "codes": rng.integers(0, 32, (ROWS, N)).astype(np.int32),
            "latents": rng.normal(size=(ROWS, side, side, channels)).astype(np.float32),
            "reference_codes": rng.integers(0, 32, (ROWS, R, N)).astype(np.int32),
            "reference_latents": rng.normal(size=(ROWS, R, side, side, channels)).astype(
                np.float32
            ),
        }
    return made | views


def keys():
    return jax.random.split(jax.random.key(15), ROWS)


def encoded(route, model, b):
    """Return (codes, latents, reference codes, reference latents, features) of row b, latents [..,
    C, H, W]."""
    x = batch(route)
    if "codes" in x:
        to = lambda z: torch.tensor(z).movedim(-1, -3)
        return (
            x["codes"][b],
            to(x["latents"][b]),
            x["reference_codes"][b],
            to(x["reference_latents"][b]),
            None,
        )
    scaled = lambda y: torch.tensor(y).float().movedim(-1, -3) / 127.5 - 1
    seen = scaled(
        np.concatenate([x["tokenizer_pixels"][b][None], x["reference_tokenizer_pixels"][b]])
    )
    z = model.latents(scaled(np.concatenate([x["pixels"][b][None], x["reference_pixels"][b]])))
    codes = model.codes(seen).numpy()
    return codes[0], z[0], codes[1:], z[1:], model.tokenizer.features(seen[1:])


def condition(model, hidden_TD, shown_RCHW, keep, keep_shown):
    """Return the condition tokens [1, T + R H W, C] of one row."""
    tokens = model.connector(hidden_TD[None], torch.tensor([keep]))
    if not (model.cfg.editing.latents and len(shown_RCHW)):
        return tokens
    more = model.latent_connector(shown_RCHW.movedim(1, -1).reshape(1, -1, shown_RCHW.shape[1]))
    return torch.cat([tokens, more * keep_shown], dim=1)


def velocity(model, x_CHW, timestep, tokens, shown_RCHW):
    """Return the velocity [C, H, W] of one row: the stock class on a map as wide as its references
    make it."""
    wide = torch.cat([x_CHW, *shown_RCHW], dim=-1) if model.cfg.editing.latent_concat else x_CHW
    return model.velocity(wide[None], torch.tensor([timestep]), tokens)[0, :, :, : x_CHW.shape[-1]]


def row_loss(route, model, b, drawn):
    """Return (sum of the cross entropy, sum of the flow losses of its draws) of one row."""
    x, cfg = batch(route), model.cfg
    codes, z_CHW, shown_codes, shown_RCHW, features = encoded(route, model, b)
    shown_RCHW, length = shown_RCHW[: SHOWN[b]], int(x["segment_ids"][b].sum())
    tokens = x["tokens"][b, :length].copy()
    for r in range(SHOWN[b]):
        at = x["reference_span"][b, r] + 1
        tokens[at : at + N] = shown_codes[r] + IMAGE_TOKEN_OFFSET
    span = int(x["image_span"][b])
    if DRAWN[b]:
        tokens[span + 1 : span + 1 + N] = codes + IMAGE_TOKEN_OFFSET
    tokens = torch.tensor(tokens).long()
    embedded = model.ar.model.embed_tokens(tokens)
    if cfg.editing.features:
        for r in range(SHOWN[b]):
            at = int(x["reference_span"][b, r]) + 1
            embedded = torch.cat(
                [embedded[:at], model.feature_connector(features[r][None])[0], embedded[at + N :]]
            )
    hidden_LD = model.ar.model(inputs_embeds=embedded[None]).last_hidden_state[0]
    labels = np.flatnonzero(x["loss_mask"][b])
    ce = F.cross_entropy(model.ar.lm_head(hidden_LD[labels - 1]), tokens[labels], reduction="sum")
    flow = torch.zeros(())
    for draw in range(LOSS.flow_samples) if DRAWN[b] else ():
        noise_CHW, sigma = (
            torch.tensor(drawn.noise[b, draw]).movedim(-1, 0),
            float(drawn.sigma[b, draw]),
        )
        keep, keep_shown = bool(drawn.keep_B[b]), bool(drawn.keep_references_B[b])
        given = condition(model, hidden_LD[span : span + N + 1], shown_RCHW, keep, keep_shown)
        latent_concat = (
            shown_RCHW if keep_shown or cfg.editing.uncond_latent_concat else shown_RCHW[:0]
        )
        got = velocity(
            model, (1 - sigma) * z_CHW + sigma * noise_CHW, 1000 * sigma, given, latent_concat
        )
        flow = flow + F.mse_loss(got, noise_CHW - z_CHW)
    return ce, flow


@pytest.mark.parametrize("route", ROUTES)
def test_joint_loss_and_gradients_are_the_stock_classes_row_by_row(route):
    """Compare float32 in other shapes, through two layers of each network: 1e-5; gradients are of
    the sum of both losses."""
    reference, graphdef, trained, frozen = models(route)

    @jax.jit
    def loss(trained, frozen, x):
        model = nnx.merge(graphdef, trained, frozen)
        return joint_loss(model, x, keys(), loss=LOSS, image_token_offset=IMAGE_TOKEN_OFFSET)

    (_, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        trained, frozen, batch(route)
    )
    shape = (
        reference.cfg.latent_size,
        reference.cfg.latent_size,
        reference.cfg.vae.latent_channels,
    )
    drawn = jax.tree.map(np.asarray, sample_training_noise(keys(), shape, reference.cfg, LOSS))
    kinds = list(
        zip(drawn.keep_B[1:4].tolist(), drawn.keep_references_B[1:4].tolist(), strict=True)
    )
    assert len(set(kinds)) == 3, (
        "of the rows with references one keeps all, one its references, one nothing"
    )
    reference.zero_grad()
    rows = [row_loss(route, reference, b, drawn) for b in range(ROWS)]
    ce = sum(ce for ce, _ in rows) / batch(route)["loss_mask"].sum()
    flow = sum(flow for _, flow in rows) / (sum(DRAWN) * LOSS.flow_samples)
    (ce + flow).backward()
    assert relative_error(metrics["ce"], ce.item()) < 1e-5
    assert relative_error(metrics["flow"], flow.item()) < 1e-5

    got = stock_weights.flat(gradients)
    for part in {path.split("/")[0] for path in got}:
        named = {
            name: x.numpy() for name, x in stock_weights.gradients(getattr(reference, part)).items()
        }
        want = mapping.to_jax(
            part, reference.cfg, {k: x for k, x in named.items() if k != "lm_head.weight"}
        )
        mine = {
            path.removeprefix(f"{part}/"): x
            for path, x in got.items()
            if path.startswith(f"{part}/")
        }
        assert mine and mine.keys() <= want.keys()
        whole = np.sqrt(sum(np.sum(want[path] ** 2) for path in mine))
        for path, gradient in mine.items():
            assert np.linalg.norm(np.asarray(gradient) - want[path]) < 1e-5 * whole, (part, path)


SETTINGS = {
    "one": config.SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, steps=3, guidance=2.0),
    "two": config.SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, steps=3, guidance=2.0, reference_guidance=1.3
    ),
}


def sampled_row(route, model, b, noise_CHW, settings):
    """Return (image [3, H, W], ids) of the prompt of row b: every token from a pass over all
    before it."""
    x, cfg = batch("features"), model.cfg
    scaled = lambda y: torch.tensor(y).float().movedim(-1, -3) / 127.5 - 1
    seen, z_RCHW = (
        scaled(x["reference_tokenizer_pixels"][b, : SHOWN[b]]),
        torch.zeros((0, *noise_CHW.shape)),
    )
    tokens = torch.tensor(x["tokens"][b, : x["image_span"][b] + 1]).long()
    embedded = None
    if SHOWN[b]:
        z_RCHW, codes = (
            model.latents(scaled(x["reference_pixels"][b, : SHOWN[b]])),
            model.codes(seen),
        )
        for r in range(SHOWN[b]):
            at = int(x["reference_span"][b, r]) + 1
            tokens[at : at + N] = codes[r] + IMAGE_TOKEN_OFFSET
    embedded = model.ar.model.embed_tokens(tokens)
    if SHOWN[b] and cfg.editing.features:
        features = model.feature_connector(model.tokenizer.features(seen))
        for r in range(SHOWN[b]):
            at = int(x["reference_span"][b, r]) + 1
            embedded = torch.cat([embedded[:at], features[r], embedded[at + N :]])
    ids = []
    for _ in range(N):
        hidden_LD = model.ar.model(inputs_embeds=embedded[None]).last_hidden_state[0]
        ids.append(
            int(model.ar.lm_head(hidden_LD[-1])[IMAGE_TOKEN_OFFSET:].argmax()) + IMAGE_TOKEN_OFFSET
        )
        embedded = torch.cat([embedded, model.ar.model.embed_tokens(torch.tensor(ids[-1:]))])
    span_TD = model.ar.model(inputs_embeds=embedded[None]).last_hidden_state[0, -N - 1 :]
    branches = {
        (keep, shown): condition(model, span_TD, z_RCHW, keep, shown)
        for keep in (False, True)
        for shown in (0, 1)
    }
    euler = torch_model.scheduler(cfg.flow)
    euler.set_timesteps(sigmas=np.linspace(1, 1 / settings.steps, settings.steps))
    x_CHW = noise_CHW
    for timestep in euler.timesteps:
        at = lambda branch, timestep=timestep, x=x_CHW: velocity(
            model,
            x,
            float(timestep),
            branches[branch],
            z_RCHW if branch[1] or cfg.editing.uncond_latent_concat else z_RCHW[:0],
        )
        v, uncond, towards = (
            at((1, 1)),
            at((0, 0)),
            settings.reference_guidance or settings.guidance,
        )
        shown = at((0, 1))
        v = uncond + towards * (shown - uncond) + settings.guidance * (v - shown)
        x_CHW = euler.step(v, timestep, x_CHW).prev_sample
    return model.pixels(x_CHW[None])[0], ids


@pytest.mark.parametrize(
    ("route", "guidance"),
    [("latents", "one"), ("latent_concat", "two"), ("both", "two"), ("features", "one")],
)
def test_a_sampled_image_is_the_stock_classes_row_by_row(route, guidance):
    reference, graphdef, trained, frozen = models(route)
    settings, rows, x = SETTINGS[guidance], [0, 1, 2, 3], batch("features")
    shown = {name: value[rows] for name, value in x.items() if name.startswith("reference")}
    keys_B = sampling_programs.sampling_keys(jnp.uint32(7), jnp.arange(4, dtype=jnp.uint32))
    tokens_BL = np.where(np.arange(LENGTH) <= x["image_span"][rows][:, None], x["tokens"][rows], 0)

    @jax.jit
    def sample(trained, frozen, shown):
        model = nnx.merge(graphdef, trained, frozen)
        ids = IMAGE_TOKEN_OFFSET, IMAGE_TOKEN_OFFSET + 32
        drawn = sampling_programs.generate_images(
            model, tokens_BL, x["image_span"][rows] + 1, keys_B, settings, ids, shown
        )
        return *drawn, sampling_programs.prepare_latents(model.cfg, keys_B[1])

    images_BHWC, ids_BN, noise_BHWC = sample(trained, frozen, shown)
    with torch.no_grad():
        for b in rows:
            want_CHW, ids = sampled_row(
                route,
                reference,
                b,
                torch.tensor(np.asarray(noise_BHWC[b])).movedim(-1, 0),
                settings,
            )
            assert ids_BN[b].tolist() == ids
            # In [0, 1], where a scale that reaches outside is cut off; three steps of guidance and
            # a decoder in float32.
            assert relative_error(images_BHWC[b], want_CHW.movedim(0, -1)) < 1e-5


def only(x, b):
    """Return the batch with the labels and the target of row b alone."""
    at_B = np.arange(len(x["target"])) == b
    mask_BL, target_B = x["loss_mask"] * at_B[:, None], (x["target"] * at_B).astype(np.float32)
    return x | {
        "loss_mask": mask_BL,
        "target": target_B,
        "label_count": np.full(len(at_B), mask_BL.sum() / len(at_B), np.float32),
        "target_count": np.full(len(at_B), max(target_B.sum(), 1) / len(at_B), np.float32),
    }


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1},
        {"name": "fsdp_tp", "data": 2, "fsdp": 2, "tensor": 2},
        {"name": "fsdp_sp", "fsdp": 4, "sequence": 2},
    ],
)
def test_a_row_among_all_tasks_has_the_loss_that_it_has_alone(mesh):
    """Compare with a batch that has slots for the row's own images only, none for a
    text-to-image row."""
    route, strategy = "both", tiny.strategy(**mesh)
    _, graphdef, trained, frozen = models(route)
    keys_B = jnp.concatenate([keys(), keys()[:3]])
    mixed = {name: np.concatenate([value, value[:3]]) for name, value in batch(route).items()}

    def loss(trained, frozen, x, keys_B):
        model = nnx.merge(graphdef, trained, frozen)
        _, metrics = joint_loss(model, x, keys_B, loss=LOSS, image_token_offset=IMAGE_TOKEN_OFFSET)
        return metrics["ce"], metrics["flow"]

    def spread(*inputs):
        with nn.sharding_resolver(strategy.resolver):
            return loss(*inputs)

    alone, together = jax.jit(loss), jax.jit(spread)
    at = strategy.batch_sharding()
    for b in range(ROWS):
        count = SHOWN[b]
        one = {name: value[b : b + 1] for name, value in only(mixed, b).items()}
        one["label_count"], one["target_count"] = (
            one["loss_mask"].sum(axis=1),
            np.ones(1, np.float32),
        )
        for name in [name for name in one if name.startswith("reference")]:
            one[name] = one[name][:, :count]
        if not count:
            one = {name: value for name, value in one.items() if not name.startswith("reference")}
        want = alone(trained, frozen, one, keys_B[b : b + 1])
        got = together(
            trained, frozen, jax.device_put(only(mixed, b), at), jax.device_put(keys_B, at)
        )
        assert relative_error(got[0], want[0]) < 1e-6 and (
            relative_error(got[1], want[1]) < 1e-6 if DRAWN[b] else got[1] == 0
        )


@pytest.mark.parametrize("route", ["both", "features"])
def test_packed_rows_are_rows_of_their_own(route):
    """Pack up to two examples a row: the losses of rows of one, and their gradients, with prompts
    hidden as well, whatever the noise of empty slots."""
    _, graphdef, trained, frozen = models(route)
    order = [0, 1, 4, 2, 3, 1]
    apart = {
        name: value[order] for name, value in batch(route).items() if not name.endswith("_count")
    }
    single = [{name: value[b] for name, value in apart.items()} for b in range(6)]
    shared = [(0, 1), (2,), (3, 4), (5,)]
    rows = [pack_rows([single[b] for b in row], "ab"[: len(row)], 48, 2) for row in shared]
    packed = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert packed["tokens"].shape == (4, 48) and packed["image_span"].shape == (4, 2)
    assert packed["segment_ids"].max() == 2 and set(packed["positions"][:, 0]) == {0}
    keys_B = jax.random.split(jax.random.key(15), 6)
    other = jax.random.key(16)
    keys_RE = jnp.stack(
        [jnp.stack([keys_B[b] for b in row] + [other] * (2 - len(row))) for row in shared]
    )
    settings = dataclasses.replace(LOSS, caption_dropout=0.5)

    @jax.jit
    def loss(trained, frozen, x, keys_B):
        x = x | {
            name: jnp.broadcast_to(value, keys_B.shape)
            for name, value in joint_normalizers(x, keys_B.size).items()
        }
        model = nnx.merge(graphdef, trained, frozen)
        return joint_loss(model, x, keys_B, loss=settings, image_token_offset=IMAGE_TOKEN_OFFSET)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, want), want_by = both(trained, frozen, apart, keys_B)
    (_, got), got_by = both(trained, frozen, packed, keys_RE)
    for name in ("ce", "flow"):
        assert relative_error(got[name], want[name]) < 1e-6, name
    whole = np.sqrt(sum(np.sum(np.asarray(x) ** 2) for x in jax.tree.leaves(want_by)))
    for a, b in zip(jax.tree.leaves(got_by), jax.tree.leaves(want_by), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < 1e-5 * whole


def test_a_run_on_all_tasks_is_the_same_from_the_cache_and_runs_packed(tmp_path, monkeypatch):
    """Compare the losses up to the float32 rounding of another program. The connector and layers of
    editing are trained too. Packed rows mix other examples in a batch, and have a length that is
    chosen by them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = tiny.write_data(tmp_path / "images")
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    kinds = [
        {},
        {"instruction": "red", "input_image": "000.png"},
        {"instruction": "both", "input_images": ["001.png", "002.png"]},
        {"task": "reconstruct"},
        {"question": "what", "answer": "a cat", "input_image": "003.png"},
    ]
    mixed = [line | kinds[i % 5] for i, line in enumerate(lines)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    losses = []
    for number, data in enumerate(
        ({}, {"cache_dir": str(tmp_path / "cache")}, {"pack": 2, "max_length": 0})
    ):
        cfg = tiny.run_config(
            folder,
            model={"editing": dataclasses.asdict(ROUTES["both"])},
            data={"batch_size": 16} | data,
            steps=3,
        )
        workdir = tmp_path / str(number)
        supervised.train(cfg, workdir)
        losses.append(
            [(row["train/ce"], row["train/flow"]) for row in read_rows(workdir / "metrics.jsonl")]
        )
    online, cached, packed = losses
    assert np.isfinite(online).all() and np.isfinite(packed).all()
    assert relative_error(cached, online) < 1e-5
    row = read_rows(workdir / "metrics.jsonl")[-1]
    assert 0.99 < row["data/filled_slots"] <= 1 and 0 < row["data/filled_tokens"] < 1
    root, _ = checkpoint.find(workdir)
    assert checkpoint.read_config(root).data.max_length == 128
    plan = plan_state(checkpoint.read_config(root), tiny.strategy())
    assert set(plan.abstract["params"]) == {"ar", "connector", "dit", "latent_connector"}
    assert set(plan.abstract["params"]["dit"]) == {
        "caption_projection",
        "caption_norm",
        "patch_embed",
        "proj_out",
    }
