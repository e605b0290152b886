"""`megasparse generate`: an exported model continues a text on the console. Imports torch only when it runs."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasparse.arguments import count
from megasparse.hf.errors import AccelerateError, GenerateError, first_line

if TYPE_CHECKING:
    from torch import Tensor


def add_generate(commands: Any) -> None:
    """Add `generate` to the sub-commands of the command line."""
    parser = commands.add_parser(
        "generate",
        help="continue a text with an exported model",
        description="The text goes to the standard output as it is made; tokens a second and the mean number of active "
        "neurons follow on the standard error. Of the model's generation_config.json only the tokens that end a text "
        "count.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that `convert to-hf` wrote, or a name on the hub")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads the standard input")
    parser.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="of sampling; 0 takes the most likely (0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this much probability (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (%(default)s)")
    parser.add_argument("--dense", action="store_true", help="as transformers computes it, without the sparse MLP")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    _check(args)
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = _load(args.model)
    if not args.dense:
        from megasparse.hf.inference import accelerate

        try:
            accelerate(model)
        except AccelerateError as error:
            raise AccelerateError(f"{args.model}: {error}; --dense generates without it") from None
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    end = tokenizer.eos_token
    if end is not None and ids[:, -1:].tolist() == [[tokenizer.eos_token_id]] and not prompt.endswith(end):
        ids = ids[:, :-1]  # some tokenizers put an end to every text, and this one is to go on
    limit = getattr(model.config, "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise GenerateError("--prompt: has no tokens; give some text")
    if limit is not None and ids.shape[1] + args.max_new_tokens > limit:
        raise GenerateError(
            f"--prompt: {ids.shape[1]} tokens and --max-new-tokens {args.max_new_tokens} are more than the model's "
            f"{limit} positions; shorten one"
        )
    torch.manual_seed(args.seed)
    streamer = _streamer(tokenizer)
    # Not the settings that the model brings: its penalties and beams would change what a temperature means.
    settings = GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    if args.temperature > 0:
        settings.update(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=0)
    model.generation_config = settings  # `generate` takes from here what is not set
    print(prompt, end="", flush=True)
    with torch.inference_mode():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    _report(model, text, ids.shape[1], streamer, args.dense)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.temperature < 0:
        raise GenerateError(f"--temperature: {args.temperature:g} is negative; give 0 or more")
    if not 0 < args.top_p <= 1:
        raise GenerateError(f"--top-p: {args.top_p:g} is not in (0, 1]")
    if args.temperature == 0 and args.top_p < 1:
        raise GenerateError("--top-p: has no effect without sampling; give --temperature too")
    folder = Path(args.model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise GenerateError(
            f"{args.model}: has no config.json, so it is no exported model; a checkpoint or run is exported by "
            f"megasparse convert to-hf {args.model} OUTPUT"
        )


def _load(name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megasparse.hub import local_model

    folder = local_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:  # transformers and the hub's client raise many types
        raise GenerateError(
            f"{name}: model or tokenizer does not load ({first_line(error)}); give a folder that megasparse convert "
            "to-hf wrote with a tokenizer, or a name on the Hugging Face hub"
        ) from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _streamer(tokenizer: Any) -> Any:
    """Prints tokens as they come, and keeps when they came."""
    from transformers import TextStreamer

    class Timed(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times = [time.perf_counter()]

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())  # the first call brings the prompt, the second its next token
            super().put(value)

    return Timed()


def _report(model: Any, text: Tensor, prompt: int, streamer: Any, dense: bool) -> None:
    start, first, last = streamer.times[1], streamer.times[2], streamer.times[-1]
    new = text.shape[1] - prompt
    words = f"prompt: {prompt} tokens in {first - start:.2f} s; then {new} tokens"
    if new > 1:
        words += f", {(new - 1) / (last - first):.1f} a second"
    if not dense:
        from megasparse.hf.inference import measure_sparsity

        layers = measure_sparsity(model, text)
        mean, hidden = sum(layer.l0 for layer in layers) / len(layers), model.config.intermediate_size
        words += f"; mean L0 {mean:.1f} of {hidden} neurons ({mean / hidden:.1%})"
    print(words, file=sys.stderr)
