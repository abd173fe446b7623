"""A checkpoint's decoder and tokenizer in memory, by torch and tokenizers alone."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from nanomed import InputError, first_line
from nanomed.hf import check_weights, model_config
from nanomed.model import Decoder
from nanomed.model_files import stored_name
from nanomed.shards import open_safetensors


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The checkpoint in FOLDER, its products in dtype. InputError where weights are missing or misshapen.

    On a CPU the weights stay in the file, mapped into memory, in its own dtype; a layer's are cast as it runs. bfloat16 is
    exact in float32, so nothing is lost, and half the memory and all of the loading time are saved.
    """
    with torch.device("meta"):
        model = Decoder(model_config(folder), dtype)
    files = check_weights(model, folder)
    if not files:
        raise InputError(f"{folder}: has no weights (model.safetensors)")
    handles = {file: open_safetensors(file) for file in set(files.values())}
    to: dict = {} if device.type == "cpu" else {"device": device, "dtype": dtype}
    weights = {name: handles[file].get_tensor(stored_name(name, handles[file].keys())).to(**to) for name, file in files.items()}
    model.load_state_dict(weights, assign=True, strict=False)  # a tied lm_head has no tensor of its own
    model._tie()
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Tokenizer:
    """FOLDER's tokenizer.json, without the truncation and padding that a file may have kept. InputError where it has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no tokenizer.json; copy the model's tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"{path}: cannot be read as a tokenizer ({first_line(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
