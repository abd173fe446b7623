"""Two small byte-level BPEs, trained in milliseconds: one as Qwen's, one as Mistral's. No test itself."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "Der Patient erhält täglich 5 mg Ramipril, 3× täglich.",
    "Die Leitlinie empfiehlt: Bluthochdruck früh behandeln.",
] * 9


def byte_level(n_merges: int = 60, special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Tokenizer:
    """A byte-level BPE as Qwen's: adds no BOS, and every text comes back from its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def with_bos() -> Tokenizer:
    """A BPE with <s> put before each text by its post-processor, as Mistral's."""
    tokenizer = byte_level(special=("<s>", "</s>"))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    return tokenizer
