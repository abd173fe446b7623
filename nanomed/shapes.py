"""The models that recipes name, by hub id: what their own config.json say, so that planning asks no hub."""

from nanomed.hf import Llama3Scaling, ModelConfig

# fmt: off
MODELS = {
    #                vocab  hidden    MLP  layers  heads  KV  dim   eps  theta   tied
    "Qwen/Qwen2.5-7B-Instruct": ModelConfig(
                152064,   3584, 18944,     28,    28,  4, 128, 1e-6,   1e6, False,
                qkv_bias=True, max_position_embeddings=32768,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": ModelConfig(
                 32768,   4096, 14336,     32,    32,  8, 128, 1e-5,   1e6, False,
                max_position_embeddings=32768,
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": ModelConfig(
                131072,   5120, 32768,     40,    32,  8, 128, 1e-5,   1e8, False,
                max_position_embeddings=32768,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": ModelConfig(
                128256,   4096, 14336,     32,    32,  8, 128, 1e-5,   5e5, False,
                rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192), max_position_embeddings=131072,
    ),
    "Qwen/Qwen3-8B": ModelConfig(
                151936,   4096, 12288,     36,    32,  8, 128, 1e-6,   1e6, False,
                qk_norm=True, max_position_embeddings=40960,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
                 49152,    576,  1536,     30,     9,  3,  64, 1e-5,   1e5,  True,
                max_position_embeddings=8192,
    ),
}
# fmt: on
