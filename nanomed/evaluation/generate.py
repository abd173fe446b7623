"""Generate: a model's answers to instructions, greedy, through its own chat template.

    python eval.py generate runs/x --prompts data/tasks/prompts_de.jsonl --out x.jsonl          in this process
    python eval.py generate http://localhost:8000/v1 --model NAME --prompts P.jsonl --out y.jsonl        vllm serve

In this process transformers generates, in batches padded on the left; a row whose answer has ended stays until the
batch's longest has ended, so for thousands of prompts serve the model with vLLM and give its URL. Greedy means greedy: a
repetition penalty in generation_config.json (Qwen2.5 has one) is not applied; vLLM applies it unless started with
`--generation-config vllm`. Thinking (Qwen3) is switched off by the template's `enable_thinking`, since answers are what is
compared; a server has a setting of its own for that.

A.jsonl has a line per prompt: {id, prompt, answer, finish_reason, completion_tokens, model}; A.run/ beside it records how it
was made. An interrupted run resumes: at a URL with the answers in A.run/, in this process with the first incomplete batch.
Batches are the same slices of the prompts after every resumption, since in bfloat16 the neighbours of a prompt change its
last bits, and with them a weak model's answers: with --batch 6, 5 of 12 answers of SmolLM2-135M-Instruct differed from
those with --batch 1, which gives what `transformers serve` gives, token for token.
"""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from nanomed import InputError, first_line
from nanomed.chat import BODY_HELP, Answer, ask, parse_body, with_extra
from nanomed.evaluation.answers import Sample, model_name, read_answers
from nanomed.evaluation.record import fingerprint, finish_run, open_run, undone_on_failure
from nanomed.files import read_jsonl, write_durably
from nanomed.hf import fetch
from nanomed.prompts import prompt_renderer, read_prompts
from nanomed.redaction import masked
from nanomed.thoughts import without_thoughts
from nanomed.validity import Validity

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "tasks" / "prompts_de.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "source",
        metavar="MODEL|URL",
        help="folder, hub id, run folder of train.py; or an OpenAI-compatible URL with its /v1",
    )
    add("--model", metavar="NAME", help="at a URL: the model's name there (required); else its name in the answers")
    add("--prompts", type=Path, default=PROMPTS, help="JSONL of prompts (default: data/tasks/prompts_de.jsonl)")
    add("--out", type=Path, metavar="A.jsonl", required=True, help="the answers; A.run/ beside it records the run")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="limit of an answer (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--batch", type=int, default=8, metavar="N", help="prompts at once, in this process (default: %(default)s)")
    add("--body", metavar="JSON", help=f"at a URL: {BODY_HELP}")
    add("--concurrency", type=int, default=64, metavar="N", help="requests in flight, at a URL (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds for one answer, at a URL (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """The command; InputError for whatever cannot be done."""
    check_positive(args, "max_new_tokens", "limit", "batch", "concurrency", "timeout")
    at_url = args.source.startswith(("http://", "https://"))
    if not at_url and re.match(r"[\w.\-]+:\d+(?:/|$)", args.source):
        raise InputError(f"{args.source}: is neither a model nor a URL; did you mean http://{args.source}?")
    if at_url and not args.model:
        raise InputError("--model is missing: the name of the model at this URL (curl URL/models lists them)")
    if args.body and not at_url:
        raise InputError("--body: changes what is sent to a URL; MODEL runs in this process")
    extra = parse_body(args.body)
    if args.out.suffix != ".jsonl":
        raise InputError(f"--out {args.out}: expected a name that ends in .jsonl")
    prompts = dict(list(read_prompts(args.prompts).items())[: args.limit])
    name = args.model or args.source
    folder = args.out.with_suffix(".run")
    config = {"model": name, "max_new_tokens": args.max_new_tokens, "limit": args.limit}
    config["body"] = masked(extra) if extra else None
    config |= {"batch": None if at_url else args.batch, "where": "endpoint" if at_url else "in process"}
    if args.out.exists() and not (folder / "run.json").exists():
        raise InputError(f"--out {args.out}: exists already, without {folder}; choose another, or delete it")
    model = None if at_url else fetch(args.source, "MODEL")
    config |= {"fingerprint": fingerprint(model)} if model else {}
    existed = folder.exists()
    if open_run(folder, "generate", config, [args.prompts]) and args.out.exists():
        return print(f"{args.out}: already finished")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with undone_on_failure(folder, existed, args.out):
        if model:
            in_process(args, prompts, name, model)
        else:
            from_url(args, prompts, folder / "answers.sqlite", extra)
    results = summary(list(read_answers(args.out).values()), args.out)
    finish_run(folder, results)
    print(f"{args.out}: {results['n']} answers of {name}, {results['cut']} of them cut at {args.max_new_tokens} tokens, "
          f"{results['empty']} without words")  # fmt: skip


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """InputError for an option that was given and is not positive."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected more than 0")


def summary(samples: list[Sample], path: Path) -> dict:
    """results.json of the run."""
    return {
        "model": model_name(samples, path), "n": len(samples), "cut": sum(s.finish_reason == "length" for s in samples),
        "empty": sum(not s.answer.strip() for s in samples),
        "completion_tokens": sum(s.completion_tokens for s in samples), "answers": path.name,
    }  # fmt: skip


# --- at a URL ------------------------------------------------------------------------------------------------------


def from_url(args: argparse.Namespace, prompts: dict[str, list[dict]], cache: Path, extra: dict) -> None:
    """Ask the endpoint; the file is written when all answers are there, in the order of the prompts. extra: of --body."""
    settings = {"model": args.model, "temperature": 0, "max_tokens": args.max_new_tokens}
    requests = [(name, with_extra({"messages": messages} | settings, extra)) for name, messages in prompts.items()]
    how = {"concurrency": args.concurrency, "timeout_s": args.timeout, "desc": "generate"}
    answers: dict[str, Answer] = {}
    validity = Validity("text after the thoughts", "--max-new-tokens")
    with closing(ask(requests, args.source, cache, len(requests), **how)) as asked:
        for name, found in asked:
            answers[name] = found
            validity.add(found, bool(without_thoughts(found.text).strip()))
    validity.end()
    lines = []
    for name, messages in prompts.items():
        found = answers[name]
        about = (found.text, found.finish_reason, found.completion_tokens, args.model)
        lines.append(Sample(name, messages, *about).line())
    write_durably(args.out, "".join(lines))


# --- in this process -----------------------------------------------------------------------------------------------


def in_process(args: argparse.Namespace, prompts: dict[str, list[dict]], name: str, folder: Path) -> None:
    """Append batch after batch to the file, each synced before the next begins."""
    from tqdm import tqdm

    n_done = keep_whole_batches(args.out, args.batch, list(prompts))
    if n_done == len(prompts):
        return
    texts = render(folder, dict(list(prompts.items())[n_done:]))
    model, tokenizer = load(folder)
    # A special token spelled out in a prompt is read as one, as by transformers and vLLM.
    tokens = {i: tokenizer(text, add_special_tokens=False)["input_ids"] for i, text in texts.items()}
    check_lengths(tokens, model, args.max_new_tokens)
    bar = tqdm(total=len(prompts), initial=n_done, desc="generate", unit="answer", smoothing=0, disable=None)
    with bar, args.out.open("ab") as file:
        for batch in answer(model, tokenizer, tokens, args.batch, args.max_new_tokens):
            lines = []
            for i, (text, reason, n_tokens, n_turns) in batch:
                lines.append(Sample(i, prompts[i], text, reason, n_tokens, name, n_turns).line())
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(lines))


def keep_whole_batches(path: Path, batch: int, names: list[str]) -> int:
    """Truncate the file to the batches that an earlier run completed; returns their number of answers."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    n_whole = len(lines) if len(lines) == len(names) else len(lines) // batch * batch
    if path.exists():
        os.truncate(path, sum(map(len, lines[:n_whole])))
    for (number, record), name in zip(read_jsonl(path) if n_whole else (), names, strict=False):
        if record.get("id") != name:
            raise InputError(f"{path}: line {number} belongs to prompt {record.get('id')!r}, expected {name!r}; delete the file")
    return n_whole


def render(folder: Path, prompts: dict[str, list[dict]]) -> dict[str, str]:
    """id → the conversation as the model reads it, up to where the assistant begins."""
    to_text, texts = prompt_renderer(folder), {}
    for name, messages in prompts.items():
        try:
            texts[name] = to_text(messages)
        except ValueError as error:
            raise InputError(f"MODEL {folder}: prompt {name!r}: {error}") from None
    return texts


def load(folder: Path):
    """(model on its device, tokenizer that pads on the left)."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError:
        raise InputError("generating in this process needs transformers: pip install -e '.[eval]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:  # a package, files, shapes, memory
        raise InputError(f"MODEL {folder}: transformers cannot load it ({first_line(error)})") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def check_lengths(prompts: dict[str, list[int]], model, max_new_tokens: int) -> None:
    """InputError for a prompt that leaves no room for its answer."""
    context = getattr(model.config, "max_position_embeddings", None)
    for name, ids in prompts.items():
        if context and len(ids) + max_new_tokens > context:
            raise InputError(
                f"prompt {name!r}: {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed the model's context of "
                f"{context}; shorten one of them"
            )


def answer(
    model, tokenizer, prompts: dict[str, list[int]], batch: int, max_new_tokens: int
) -> Iterator[list[tuple[str, tuple[str, str, int, int]]]]:
    """For every slice of `batch` prompts: [(id, (answer, finish_reason, completion_tokens, turn_tokens))]."""
    import torch
    from transformers import GenerationConfig

    from nanomed.evaluation.inference import check_finite

    def checked(_, logits):  # of the next token, on their way to the argmax
        check_finite(logits, f"MODEL {model.name_or_path}")
        return logits

    ends = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else []
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    model.generation_config = GenerationConfig()  # ignore its sampling and penalties
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns = special & set().union(*prompts.values())  # with which the template marks turns
    names = list(prompts)
    for start in range(0, len(names), batch):
        part = names[start : start + batch]
        length = max(len(prompts[name]) for name in part)
        padded = torch.tensor([[pad] * (length - len(prompts[n])) + prompts[n] for n in part], device=model.device)
        mask = torch.tensor([[0] * (length - len(prompts[n])) + [1] * len(prompts[n]) for n in part])
        with torch.inference_mode():
            full = model.generate(
                padded,
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=[checked],
            )
        yield [(name, _read(tokenizer, ids, ends, turns)) for name, ids in zip(part, full[:, length:].tolist(), strict=True)]


def _read(tokenizer, ids: list[int], ends: list[int], turns: set[int]) -> tuple[str, str, int, int]:
    """(answer, finish_reason, tokens with the end, turn tokens) of what was generated, without the padding after the end.

    Special tokens are removed from the answer. Those of the template that have text after them continue the conversation.
    """
    n_tokens = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    ended = bool(ids) and ids[n_tokens - 1] in ends
    decode = lambda part: tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    n_turns, written = 0, ids[: n_tokens - ended]
    for place, token in enumerate(written):
        if token in turns and decode(written[:place]).strip() and decode(written[place + 1 :]).strip():
            n_turns += 1
    return decode(ids[:n_tokens]), "stop" if ended else "length", n_tokens, n_turns
