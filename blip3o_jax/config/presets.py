"""Published sizes by name.

Language models: Qwen3 (arXiv 2505.09388, table 1; `config.json` of Qwen/Qwen3-*), and Qwen2.5
(arXiv 2412.15115; `config.json` of Qwen/Qwen2.5-*), the backbones of Tar (arXiv 2506.18898).
Diffusion heads: SANA (arXiv 2410.10629; `config.json` of
Efficient-Large-Model/Sana_600M_1024px_diffusers) and SANA 1.5 (arXiv 2501.18427;
SANA1.5_1.6B_1024px_diffusers, SANA1.5_4.8B_1024px_diffusers). Chips are in parallel/chips.py,
strategies in parallel/rules.py.
"""

from blip3o_jax.config.ar import LanguageModelConfig, Qwen2Config, Qwen3Config
from blip3o_jax.config.dit import DiffusionHeadConfig, SanaConfig
from blip3o_jax.config.errors import check_choice

LANGUAGE_MODELS: dict[str, LanguageModelConfig] = {
    "0.6b": Qwen3Config(hidden_size=1024, intermediate_size=3072),
    "1.7b": Qwen3Config(hidden_size=2048, intermediate_size=6144),
    "4b": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
    ),
    "8b": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "qwen2.5-1.5b": Qwen2Config(),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}

DIFFUSION_HEADS: dict[str, DiffusionHeadConfig] = {
    "0.6b": SanaConfig(
        num_layers=28,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        qk_norm=None,
    ),
    "1.6b": SanaConfig(num_layers=20),
    "4.8b": SanaConfig(num_layers=60),
}
PUBLISHED_HEAD = "1.6b"  # of BLIP3o-NEXT


def model_sizes(argument: str) -> tuple[LanguageModelConfig, DiffusionHeadConfig]:
    """Return the language model and the diffusion head that a config file's argument names, SIZE or
    SIZE+HEAD: "1.7b", "8b+4.8b". ConfigError that names the nearest size where there is none.
    """
    size, plus, head = argument.partition("+")
    check_choice("size", size, LANGUAGE_MODELS)
    check_choice("diffusion head", head if plus else PUBLISHED_HEAD, DIFFUSION_HEADS)
    return LANGUAGE_MODELS[size], DIFFUSION_HEADS[head if plus else PUBLISHED_HEAD]
